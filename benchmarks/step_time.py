"""Time of a ShareLoRA training step: against plain LoRA, against itself with more users, against a loop over per-user adapters.

    python benchmarks/step_time.py                 # the whole table, some five minutes on one core
    python benchmarks/step_time.py --case new --rounds 31
    python benchmarks/step_time.py --case growth   # how a step grows with users, rank, batch and length
    python benchmarks/step_time.py --shape llama3-8b --device cuda [--quantize 8bit]

All contestants run in one process, in random order within each round, on the same texts; a figure is the median over rounds of
the ratio of two times of the same round, with quartiles. Times are process CPU time on one thread, because other jobs on a
shared machine do not add to it (wall time on a GPU). A step is what the trainers do: the batches of the window and their users,
forward, TRL's loss and metrics, backward, clipping, optimizer, zeroing. The model is a Llama of 4 layers, width 512, with
adapters of rank 8 on all its linear modules. Resident memory is that of a process of its own per number of users.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import common  # first: it sets the number of threads
import torch
from common import Contestant
from peft import LoraConfig, get_peft_model
from trl import RewardConfig, RewardTrainer

from trl_sharelora import ShareLoraConfig, ShareLoraRewardConfig, ShareLoraRewardTrainer, UserRegistry


CASES = ("lora", "users", "new", "loop", "memory")  # of the table; "growth" is apart
MANY = (1_000, 100_000, 1_000_000)


class AdapterLoop(Contestant):
    """Per-user PEFT adapters: each user's rows in a forward and backward of their own."""

    def __init__(self, trainer, batches, user_index):
        super().__init__(trainer, batches)
        self.user_index = user_index

    def forward_backward(self, batch, items):
        model = self.trainer.model
        users = self.user_index
        pairs = len(users)
        for user in users.unique().tolist():
            rows = (users == user).nonzero().flatten()
            rows = torch.cat([rows, rows + pairs])
            model.set_adapter(f"user{user}" if user else "default")
            with self.trainer.compute_loss_context_manager():
                part = {key: value[rows] for key, value in batch.items() if torch.is_tensor(value)}
                loss = self.trainer.compute_loss(model, part) * len(rows) / (2 * pairs)
            self.trainer.accelerator.backward(loss)


def share_trainer(
    folder: str,
    data,
    pairs: int,
    bf16: bool,
    bank: str,
    registry: UserRegistry | None = None,
    r: int = 8,
    model: Any = None,
    **more: Any,
) -> ShareLoraRewardTrainer:
    """A ShareLoRA trainer; each bank in files has a folder of its own in `folder`, which lies on a disk."""
    share_trainer.count = number = getattr(share_trainer, "count", 0) + 1
    return ShareLoraRewardTrainer(
        common.base_model() if model is None else model,
        ShareLoraRewardConfig(**common.training_arguments(f"{folder}/{number}", pairs, bf16, **more)),
        train_dataset=data,
        processing_class=common.tokenizer(),
        peft_config=ShareLoraConfig(r=r, lora_alpha=2 * r, target_modules=common.LINEARS, bank=bank),
        users=registry,
    )


def plain_trainer(folder: str, data, pairs: int, bf16: bool, r: int = 8) -> RewardTrainer:
    return RewardTrainer(
        common.base_model(),
        RewardConfig(**common.training_arguments(f"{folder}/plain", pairs, bf16)),
        train_dataset=data,
        processing_class=common.tokenizer(),
        peft_config=LoraConfig(task_type="SEQ_CLS", r=r, lora_alpha=2 * r, target_modules=common.LINEARS),
    )


def loop_trainer(folder: str, data, pairs: int, bf16: bool, users: int) -> RewardTrainer:
    lora = {"task_type": "SEQ_CLS", "r": 8, "lora_alpha": 16, "target_modules": common.LINEARS}
    model = get_peft_model(common.base_model(), LoraConfig(**lora))
    for user in range(1, users):
        model.add_adapter(f"user{user}", LoraConfig(**lora))
    trainer = RewardTrainer(
        model,
        RewardConfig(**common.training_arguments(f"{folder}/loop", pairs, bf16)),
        train_dataset=data,
        processing_class=common.tokenizer(),
    )
    # every adapter's parameters belong to the optimiser, whichever is active now
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.requires_grad_(True)
    return trainer


def line(case: str, against: str, asked: float | None, times: dict, ours: str, theirs: str, **more: Any) -> dict:
    """One line of the table."""
    milliseconds = {
        f"{name}_ms": round(1000 * statistics.median(times[key]), 1)
        for name, key in (("this", ours), ("other", theirs))
    }
    result = {"case": case, "against": against, "asked": asked, "rounds": len(times[ours])}
    return {**result, **common.ratio(times, ours, theirs), **milliseconds, **more}


# -- the cases ----------------------------------------------------------------------------------------------------------------


def against_lora(users: int, pairs: int, tokens: int, bf16: bool, rounds: int, loop: bool = False, r: int = 8) -> list:
    """Against TRL's step with plain LoRA of the same rank and, with `loop`, one PEFT adapter per user."""
    data = common.comparisons(users, pairs, tokens, batches=4)
    with common.disk_folder() as folder:
        resident = share_trainer(folder, data, pairs, bf16, "resident", r=r)
        batches = common.batches_of(resident, pairs)
        without = [{k: v for k, v in batch.items() if k != "user_index"} for batch in batches]
        mmap = share_trainer(folder, data, pairs, bf16, "mmap", r=r)
        contestants: dict[str, Contestant] = {
            "resident": Contestant(resident, common.endless(batches)),
            "mmap": Contestant(mmap, common.endless(batches)),
            "lora": Contestant(plain_trainer(folder, data, pairs, bf16, r), common.endless(without)),
        }
        if loop:
            many = loop_trainer(folder, data, pairs, bf16, users)
            contestants["loop"] = AdapterLoop(many, common.endless(without), batches[0]["user_index"])
        times = common.race(contestants, rounds)
    number = "1 user" if users == 1 else f"{users} users"
    case = f"{'bf16-autocast' if bf16 else 'fp32'}, {number}, {pairs} pairs x {tokens} tokens"
    lines = [
        line(f"{case}, {bank}", "TRL step, plain LoRA", 0.97, times, bank, "lora", r=r)
        for bank in ("resident", "mmap")
    ]
    if loop:
        lines.append(line(case, "loop over per-user PEFT adapters", 0.42, times, "resident", "loop"))
    return lines


def registry(users: int) -> UserRegistry:
    return UserRegistry(f"user{number:07d}" for number in range(users))


def same_users(users: int) -> Iterator[list[int]]:
    """The same 8 every step, spread over the whole registry."""
    rows = [number * (users - 1) // 7 for number in range(8)]
    return itertools.repeat(rows)


def new_users(users: int) -> Iterator[list[int]]:
    """8 others every step, who have not been seen before, from all over the registry."""
    stride = users // 8
    return ([place * stride + step for place in range(8)] for step in range(stride))


def known_users(users: int, groups: int = 12) -> Iterator[list[int]]:
    """8 others every step, from a circle of groups: all but the first times their records are read from the disk."""
    return itertools.cycle(itertools.islice(new_users(users), groups))


def contestant(folder: str, users: int, bf16: bool, rows: Iterator[list[int]], bank: str = "mmap", **sizes: int):
    """8 users a step out of so many, the data set holding a few rows only."""
    pairs, tokens = sizes.get("pairs", 8), sizes.get("tokens", 64)
    data = common.comparisons(8, pairs, tokens, batches=4)
    trainer = share_trainer(folder, data, pairs, bf16, bank, registry(users))
    return Contestant(trainer, common.with_users(common.batches_of(trainer, pairs), rows))


def many_users(bf16: bool, rounds: int, many: tuple[int, ...] = MANY, **sizes: int) -> list[dict]:
    """Own step with so many users against that with ten; and the resident memory of each, in a process of its own."""
    with common.disk_folder() as folder:
        contestants = {n: contestant(folder, n, bf16, same_users(n), **sizes) for n in (10, *many)}
        contestants["resident"] = contestant(folder, 10, bf16, same_users(10), bank="resident", **sizes)
        times = common.race(contestants, rounds)
    precision = "bf16-autocast" if bf16 else "fp32"
    lines = [
        line(f"{precision}, {n:,} users, mmap, the same 8 visited", "own step, 10 users, mmap", 1.03, times, n, 10)
        for n in many
    ]
    last = f"{precision}, {many[-1]:,} users, mmap, the same 8 visited"
    lines.append(line(last, "own step, 10 users, resident", None, times, many[-1], "resident"))
    return lines


def resident_memory(many: tuple[int, ...] = MANY, steps: int = 5, bf16: bool = True) -> list[dict]:
    """VmRSS after some steps, a fresh process per number of users."""

    def measured(users: int) -> dict[str, float]:
        command = [sys.executable, __file__, "--rss", str(users), "--rounds", str(steps)]
        done = subprocess.run([*command, *([] if bf16 else ["--fp32"])], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr[-3000:])
        return json.loads(done.stdout.splitlines()[-1])

    few = measured(10)
    lines = []
    for users in many:
        memory = measured(users)
        lines.append(
            {
                "case": f"{users:,} users, mmap, with their registry",
                "against": "resident memory, 10 users, mmap",
                "asked": 50.0,
                "unit": "MB more",
                "median": round(memory["rss_mb"] - few["rss_mb"], 1),
                "this_mb": memory["rss_mb"],
                "other_mb": few["rss_mb"],
                "of_it_registry_mb": memory["registry_mb"],
            }
        )
    return lines


def rss_of(users: int, steps: int, bf16: bool) -> dict[str, float]:
    """Run in a fresh process: some steps with so many users, then the resident memory."""
    before = common.resident_mb()
    people = registry(users)
    of_registry = common.resident_mb() - before
    with common.disk_folder() as folder:
        data = common.comparisons(8, 8, 64, batches=4)
        trainer = share_trainer(folder, data, 8, bf16, "mmap", people)
        step = Contestant(trainer, common.with_users(common.batches_of(trainer, 8), same_users(users)))
        for _ in range(steps):
            step()
        return {"rss_mb": round(common.resident_mb(), 1), "registry_mb": round(of_registry, 1)}


def newcomers(bf16: bool, rounds: int, users: int = 1_000_000, **sizes: int) -> list[dict]:
    """Other users in every step against the same 8 in every step."""
    with common.disk_folder() as folder:
        contestants = {
            "same": contestant(folder, users, bf16, same_users(users), **sizes),
            "new": contestant(folder, users, bf16, new_users(users), **sizes),
            "known": contestant(folder, users, bf16, known_users(users), **sizes),
        }
        for _ in range(12 if rounds > 3 else 1):  # until the circle of known users has been round
            contestants["known"]()
        times = common.race(contestants, rounds)
    precision = "bf16-autocast" if bf16 else "fp32"
    case, same = f"{precision}, {users:,} users, mmap, read ahead: 8 ", "own step, the same 8 users"
    return [
        line(f"{case}never seen every step", same, 1.10, times, "new", "same"),
        line(f"{case}others every step, from the disk", same, None, times, "known", "same"),
    ]


def growth(bf16: bool, rounds: int) -> Iterator[list[dict]]:
    """How a step grows with users in the batch, rank, batch and length; beside plain LoRA."""
    settings = [{"users": 8, "pairs": 8, "tokens": 64, "r": 8}]
    settings += [settings[0] | {"users": users} for users in (1, 2, 4)]
    settings += [settings[0] | {"r": r} for r in (2, 32)]
    settings += [settings[0] | {"pairs": pairs} for pairs in (16, 32)]
    settings += [settings[0] | {"tokens": tokens} for tokens in (16, 32, 128)]
    for case in settings:
        yield against_lora(bf16=bf16, rounds=rounds, **case)


# -- the table ----------------------------------------------------------------------------------------------------------------


def verdict(row: dict) -> str:
    if row["asked"] is None:
        return "-"
    return "pass" if row["median"] <= row["asked"] else "miss"


def shown(row: dict) -> str:
    """A line of the table."""
    unit = row.get("unit")
    number = (lambda value: f"{value:.1f}") if unit else (lambda value: f"{value:.3f}")
    asked = "-" if row["asked"] is None else f"<= {row['asked']:.0f} MB" if unit else f"<= {row['asked']:.2f}"
    measured = number(row["median"]) + (f" {unit}" if unit else "")
    if "low" in row:
        measured += f" [{number(row['low'])} {number(row['high'])}]"
    medians = ""
    if "this_ms" in row:
        medians = f"{row['this_ms']:.0f} / {row['other_ms']:.0f} ms"
    elif "sharelora_mb" in row:
        medians = f"{row['sharelora_mb']:.1f} / {row['lora_mb']:.1f} MiB"
    elif "this_mb" in row:
        medians = f"{row['this_mb']:.0f} / {row['other_mb']:.0f} MB (registry {row['of_it_registry_mb']:.0f})"
    return f"| {row['against']} | {row['case']} | {asked} | {measured} | {medians} | {verdict(row)} |"


def run(cases: list[str], rounds: int, out: str | None) -> list[dict]:
    slowness = common.bf16_slowness()
    fast = slowness <= 5
    if not fast:
        print(
            f"A bf16 product is {slowness:.0f}x slower than a float32 one on this processor (no bf16 instructions): all but the "
            "first cases are in float32, and the bf16 ones have 8 tokens a row instead of 64."
        )
    rows: list[dict] = []

    def add(lines: list[dict]) -> None:
        for row in lines:
            print(shown(row), flush=True)
            common.append(out, row)
        rows.extend(lines)

    print(
        "\n| against | case | asked | measured: median [quartiles] | medians, this / other | |\n|---|---|---|---|---|---|"
    )
    if "lora" in cases:
        for bf16 in (True, False):
            for users in (1, 8):
                add(against_lora(users, 8, 64 if fast or not bf16 else 8, bf16, rounds))
        add(against_lora(32, 32, 32, False, rounds))
    if "lora" in cases or "loop" in cases:
        lines = against_lora(32, 32, 32 if fast else 16, fast, rounds, loop="loop" in cases)
        add([row for row in lines if "lora" in cases or "loop" in row["against"]])
    if "users" in cases:
        add(many_users(fast, rounds))
        add(resident_memory(bf16=fast))
    if "new" in cases:
        add(newcomers(fast, rounds))
    if "memory" in cases:
        import memory

        add([{**row, "rounds": 1} for row in memory.measure_all()])
    if "growth" in cases:
        for lines in growth(fast, rounds):
            add(lines)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--case", nargs="+", choices=[*CASES, "growth"], default=list(CASES), help="by default all but growth"
    )
    parser.add_argument("--rounds", type=int, default=15, help="interleaved rounds per case (default 15)")
    parser.add_argument("--out", help="append the results to this JSONL file")
    parser.add_argument(
        "--shape", choices=["llama3-8b", "gptj-6b", "tiny"], help="random weights of this shape instead"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda", help="for --shape (default cuda)")
    parser.add_argument("--quantize", choices=["none", "8bit", "4bit"], default="none", help="the base, for --shape")
    parser.add_argument("--rss", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--fp32", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    common.quiet()
    torch.set_num_threads(1)
    if args.rss:
        print(json.dumps(rss_of(args.rss, args.rounds, bf16=not args.fp32)))
        return
    print(common.machine())
    if args.shape:
        import shapes

        shapes.run(args.shape, args.device, args.quantize, args.rounds, args.out)
        return
    start = time.perf_counter()
    rows = run(args.case, args.rounds, args.out)
    judged = [verdict(row) for row in rows if row["asked"] is not None]
    print(f"\n{judged.count('pass')} of {len(judged)} pass; {(time.perf_counter() - start) / 60:.1f} minutes")
    print("Not measured here: a GPU (python benchmarks/step_time.py --shape llama3-8b --device cuda).")


if __name__ == "__main__":
    main()
