"""A long training over very many users: do step time and memory grow?

    python benchmarks/soak.py                               # 2,000 steps, 50,000 users, mmap
    python benchmarks/soak.py --steps 500 --visits uniform

A tiny Llama is trained through `Trainer.train`, with saves and all. Each step has 8 users, drawn from all by Zipf's law (a few come
often, most rarely or never) or uniformly. Printed are, per 100 steps, the CPU time of a step and the resident memory, then the
slope of both with its 95 % interval over the blocks. The first half of the steps is left out of the fit: libraries fill their caches
then. A checkpoint is saved every `--save-steps` steps; it shall write the users who changed since the last one, not all, and its bytes say
whether it does.
"""

import argparse
import os
import statistics
import time
from pathlib import Path

import common  # first: it sets the number of threads
import numpy as np
import torch
from scipy import stats
from transformers import PrinterCallback, TrainerCallback

from trl_sharelora import ShareLoraConfig, ShareLoraRewardConfig, ShareLoraRewardTrainer, UserRegistry


def drawn_users(visits: str, count: int, users: int, rng: np.random.Generator) -> np.ndarray:
    """`(count,)` rows of users."""
    if visits == "uniform":
        return rng.integers(users, size=count)
    weight = 1 / np.arange(1, users + 1)
    return rng.permutation(users)[rng.choice(users, size=count, p=weight / weight.sum())]


class Watch(TrainerCallback):
    """Notes CPU time and memory after each step, and what each save has written."""

    def __init__(self, folder: str):
        self.folder = folder
        self.seconds: list[float] = []
        self.memory: list[float] = []
        self.saves: list[dict] = []
        self.known: set[int] = set()
        self.start = 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        self.start = time.process_time()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(time.process_time() - self.start)
        self.memory.append(common.resident_mb())

    def on_save(self, args, state, control, **kwargs):
        bank = Path(self.folder, f"checkpoint-{state.global_step}", "bank")
        files = [path.stat() for path in bank.iterdir()]
        new = sum(file.st_size for file in files if file.st_ino not in self.known)
        self.known.update(file.st_ino for file in files)
        self.saves.append(
            {
                "step": state.global_step,
                "written": new,
                "whole": sum(file.st_size for file in files),
                "files": len(files),
            }
        )


def slope(values: list[float]) -> tuple[float, float]:
    """Change per 1,000 steps and half of its 95 % interval, from the medians of blocks of 100 steps."""
    fit = stats.linregress(np.arange(len(values)) / 10, values)
    return float(fit.slope), float(stats.t.ppf(0.975, max(len(values) - 2, 1)) * fit.stderr)


def soak(steps: int, users: int, visits: str, save_steps: int, block: int = 100, seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    pairs, tokens = 8, 16
    with common.disk_folder() as folder:
        rows = drawn_users(visits, steps * pairs, users, rng)
        ids = torch.randint(2, common.VOCAB, (2, 64, tokens), generator=torch.Generator().manual_seed(seed)).tolist()
        data = common.Dataset.from_dict(
            {
                "user_id": [f"user{row:07d}" for row in rows],
                "chosen_ids": [ids[0][number % 64] for number in range(len(rows))],
                "rejected_ids": [ids[1][number % 63] for number in range(len(rows))],
            }
        )
        arguments = common.training_arguments(folder, pairs, False) | {
            "max_steps": steps,
            "logging_strategy": "steps",
            "logging_steps": 50,  # as in any real training: what is noted for the log is let go when it is logged
            "save_strategy": "steps",
            "save_steps": save_steps,
        }
        trainer = ShareLoraRewardTrainer(
            common.base_model(layers=2, hidden=64),
            ShareLoraRewardConfig(**arguments),
            train_dataset=data,
            processing_class=common.tokenizer(),
            peft_config=ShareLoraConfig(r=8, target_modules=common.LINEARS, bank="mmap"),
            users=UserRegistry(f"user{number:07d}" for number in range(users)),
        )
        trainer.remove_callback(PrinterCallback)
        watch = Watch(folder)
        trainer.add_callback(watch)
        (working_set,) = trainer.router.working_sets.values()
        record = working_set.layout.record_bytes
        start = time.perf_counter()
        trainer.train()
        minutes = (time.perf_counter() - start) / 60

    blocks = range(0, len(watch.seconds) - block + 1, block)
    milliseconds = [1000 * statistics.median(watch.seconds[at : at + block]) for at in blocks]
    megabytes = [statistics.median(watch.memory[at : at + block]) for at in blocks]
    print(f"{steps:,} steps, {users:,} users ({len(set(rows.tolist())):,} met, {visits}), a record {record:,} bytes")
    print("  steps          CPU ms a step   resident MB")
    for at, ms, mb in zip(blocks, milliseconds, megabytes, strict=True):
        print(f"  {at + 1:>6,} - {at + block:<6,} {ms:>10.1f} {mb:>14.1f}")
    result = {"steps": steps, "users": users, "visits": visits, "minutes": round(minutes, 2)}
    for name, values, unit in (("CPU time", milliseconds, "ms"), ("resident memory", megabytes, "MB")):
        fitted = values[len(values) // 2 :]
        if len(fitted) < 3:
            print(f"{name}: too few blocks for a slope")
            continue
        change, half = slope(fitted)
        level = statistics.mean(fitted)
        # what is below a thousandth of the level per 1,000 steps is no growth that anybody would meet
        grows = change - half > 0 and change > 0.001 * level
        print(
            f"{name}: {change:+.3f} {unit} per 1,000 steps, 95 % interval {change - half:+.3f} to {change + half:+.3f} "
            f"(level {level:.1f} {unit}): {'GROWS' if grows else 'does not grow'}"
        )
        result[name] = {"slope": change, "half_interval": half, "level": level, "grows": grows}
    print("saves (bank only):")
    for save in watch.saves:
        print(
            f"  step {save['step']:>6,}: {save['written'] / 1e6:8.2f} MB written; the checkpoint names {save['whole'] / 1e6:.2f} MB in "
            f"{save['files']} files, all users at once would be {users * record / 1e6:,.0f} MB"
        )
    print(f"{minutes:.1f} minutes")
    return {**result, "saves": watch.saves, "blocks_ms": milliseconds, "blocks_mb": megabytes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--users", type=int, default=50_000)
    parser.add_argument("--visits", choices=["zipf", "uniform"], default="zipf")
    parser.add_argument("--save-steps", type=int, default=500)
    parser.add_argument("--block", type=int, default=100, help="steps a line (default 100)")
    parser.add_argument("--out", help="append the result to this JSONL file")
    args = parser.parse_args()
    common.quiet()
    torch.set_num_threads(1)
    os.environ["CI"] = "1"
    print(common.machine())
    common.append(args.out, soak(args.steps, args.users, args.visits, args.save_steps, args.block))


if __name__ == "__main__":
    main()
