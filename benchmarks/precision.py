"""What smaller records cost in accuracy: bank_dtype="bfloat16" and bank_second_moment="row" against float32 with all moments.

    python benchmarks/precision.py                 # 24 made-up users, 3 seeds, some minutes
    python benchmarks/precision.py --seeds 5

The task is the demo's (trl_sharelora.demo): made-up users with known tastes, a small language model that has read texts of that kind,
a personal reward model trained on 10 to 200 comparisons per user. Per seed, users, comparisons, base model, first values and the
order of the rows are the same for all forms; only the records differ. The working set has as many slots as a batch has users and no
more (`bank_slots`), so that records do go through the store, where rounding happens, about every step. Reported is the accuracy
on each user's test comparisons, mean over users, and its difference to float32 with all moments: mean over seeds, plus and minus 95 %.
"""

import argparse
import itertools
import statistics
import time
from pathlib import Path

import common  # first: it sets the number of threads
import numpy as np
import torch
from datasets import Dataset
from scipy import stats
from transformers import PrinterCallback, set_seed

from trl_sharelora import ShareLoraConfig, ShareLoraRewardConfig, ShareLoraRewardTrainer, evaluate_users
from trl_sharelora.demo.base_model import build_base_model
from trl_sharelora.demo.generator import make_corpus, make_log, make_users


FORMS = list(itertools.product(("float32", "bfloat16"), ("full", "row")))


def world(folder: Path, seed: int, users: int, most: int, test_rows: int, texts: int, reading: int):
    """Train and test rows, and the base model in `folder`."""
    rng = np.random.default_rng(seed)
    rows = make_log(make_users(users, min(10, most), most, rng), test_rows, rng)
    words = [row["prompt"] + row[side] for row in rows for side in ("chosen", "rejected")]
    build_base_model(folder, make_corpus(texts, rng), words, steps=reading, seed=seed)
    columns = ("user_id", "prompt", "chosen", "rejected")
    return [
        Dataset.from_list([{name: row[name] for name in columns} for row in rows if row["split"] == split])
        for split in ("train", "test")
    ]


def accuracy(base: str, folder: str, train, test, dtype: str, second: str, seed: int, epochs: float) -> float:
    set_seed(seed)
    pairs = 16
    arguments = common.training_arguments(folder, pairs, False) | {
        "num_train_epochs": epochs,
        "seed": seed,
        "learning_rate": 1e-3,
        "learning_rate_shared": 3e-3,
        "lr_scheduler_type": "cosine",
    }
    trainer = ShareLoraRewardTrainer(
        base,
        ShareLoraRewardConfig(**arguments),
        train_dataset=train,
        peft_config=ShareLoraConfig(
            r=8,
            lora_alpha=16,
            target_modules="all-linear",
            train_common=True,
            bank="ram",
            bank_slots=pairs,
            bank_dtype=dtype,
            bank_second_moment=second,
        ),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return evaluate_users(trainer.model, test, processing_class=trainer.processing_class, batch_size=pairs).macro


def compare(seeds: int, epochs: float, **sizes: int) -> list[dict]:
    scores: dict[tuple[str, str], list[float]] = {form: [] for form in FORMS}
    for seed in range(seeds):
        with common.disk_folder() as folder:
            base = Path(folder, "base")
            train, test = world(base, seed, **sizes)
            for number, form in enumerate(FORMS):
                scores[form].append(accuracy(str(base), f"{folder}/{number}", train, test, *form, seed, epochs))
        print(f"seed {seed}: " + ", ".join(f"{'/'.join(f)} {100 * s[-1]:.2f}" for f, s in scores.items()), flush=True)
    lines = []
    for form, values in scores.items():
        changes = [value - whole for value, whole in zip(values, scores[FORMS[0]], strict=True)]
        lines.append(
            {
                **{"bank_dtype": form[0], "bank_second_moment": form[1], "seeds": seeds},
                **{"accuracy": statistics.mean(values), "accuracy_half": half(values)},
                **{"difference": statistics.mean(changes), "difference_half": half(changes)},
            }
        )
    return lines


def half(values: list[float]) -> float:
    """Half of the 95 % interval of the mean (Student's t)."""
    if len(values) < 2:
        return float("nan")
    return float(stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--users", type=int, default=24)
    parser.add_argument("--most", type=int, default=200, help="comparisons of the busiest user (200)")
    parser.add_argument("--test-rows", type=int, default=200, help="test comparisons of each user (200)")
    parser.add_argument("--texts", type=int, default=4000, help="texts the language model reads (4000)")
    parser.add_argument("--reading", type=int, default=100, help="steps it reads them in (100)")
    parser.add_argument("--epochs", type=float, default=5)
    parser.add_argument("--out", help="append the results to this JSONL file")
    args = parser.parse_args()
    common.quiet()
    torch.set_num_threads(1)
    print(common.machine())
    start = time.perf_counter()
    lines = compare(
        args.seeds,
        args.epochs,
        users=args.users,
        most=args.most,
        test_rows=args.test_rows,
        texts=args.texts,
        reading=args.reading,
    )
    print(
        "| bank_dtype | bank_second_moment | accuracy, mean over users | difference to float32, full |\n|---|---|---|---|"
    )
    for line in lines:
        print(
            f"| {line['bank_dtype']} | {line['bank_second_moment']} | {100 * line['accuracy']:.2f} ± {100 * line['accuracy_half']:.2f} | "
            f"{100 * line['difference']:+.2f} ± {100 * line['difference_half']:.2f} |"
        )
        common.append(args.out, line)
    print(f"{args.seeds} seeds, {(time.perf_counter() - start) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
