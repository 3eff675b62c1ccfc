"""What the demo is about: rows of users, a model to start from and a budget; made up here, or one's own."""

import argparse
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..errors import DataError
from .story import Story


if TYPE_CHECKING:
    import pandas as pd
    from datasets import Dataset


# Share of a user's comparisons that are kept for the test when the data have no column `split`.
TEST_SHARE = 0.2


@dataclass(frozen=True)
class Budget:
    """What both methods get alike.

    Args:
        learning_rate (`float`), epochs (`float`), batch_size (`int`):
            Of training; the rate goes down to zero on a half cosine. The batch is in pairs.
        learning_rate_users (`float`):
            Of the users' own part in ShareLoRA, which the pooled model does not have.
        r (`int`), lora_alpha (`int`), target_modules (`str`, *optional*):
            Of the adapters. None stands for the modules PEFT adapts for the model's family.
        share (`str`):
            Of ShareLoRA: which factor all users share, see [`~trl_sharelora.ShareLoraConfig`].
        max_length (`int`, *optional*):
            Longer rows (in tokens) are left out of training and test.
        on_cpu (`bool`):
            Do not use an accelerator.
        seed (`int`):
            Of the head's and the adapters' first values and of the order of the rows.
    """

    learning_rate: float
    learning_rate_users: float
    epochs: float
    batch_size: int
    r: int
    lora_alpha: int
    target_modules: str | None
    share: Literal["B", "A", "AB", "diagonal"]
    max_length: int | None
    on_cpu: bool
    seed: int


@dataclass(frozen=True)
class Task:
    """Who is to be served: the rows, the model to start from, and the truth where it is known.

    Args:
        train ([`~datasets.Dataset`]), test ([`~datasets.Dataset`]):
            Preference rows.
        user_column (`str`):
            The column that names the user.
        model (`str`):
            Path (or hub id) of the base model.
        budget ([`Budget`]):
            For both methods.
        truth (`pd.DataFrame`, *optional*):
            `user_id`, `main_taste`, `best_possible`, `best_realised` of each user.
    """

    train: "Dataset"
    test: "Dataset"
    user_column: str
    model: str
    budget: Budget
    truth: "pd.DataFrame | None" = None


@dataclass(frozen=True)
class Scale:
    """How big the made-up world is. The first is the demo's, found by trying (docs/log.md); the second is for a quick look."""

    users: int = 24
    fewest: int = 10
    most: int = 200
    test_rows: int = 200
    texts: int = 4000
    reading_steps: int = 100
    epochs: float = 6


FULL = Scale()
QUICK = Scale(users=6, fewest=8, most=40, test_rows=25, texts=400, reading_steps=15, epochs=2)


def made_up_task(story: Story, output_dir: Path, scale: Scale, share: Any, seed: int) -> Task:
    """Make users, their log and a small language model; write log, truth and model to `output_dir`."""
    import numpy as np
    import pandas as pd
    from datasets import Dataset

    from .base_model import build_base_model
    from .generator import TASTES, best_possible, make_corpus, make_log, make_users

    rng = np.random.default_rng(seed)
    with story.stage(f"{scale.users} made-up users compare replies to household questions"):
        users = make_users(scale.users, scale.fewest, scale.most, rng)
        rows = make_log(users, scale.test_rows, rng)
        truth = []
        for user in users:
            margins = np.array(
                [r["true_margin"] for r in rows if r["user_id"] == user.user_id and r["split"] == "test"]
            )
            truth.append(
                {
                    "user_id": user.user_id,
                    "main_taste": user.main_taste,
                    "best_possible": best_possible(margins),
                    "best_realised": float(((margins > 0) + (margins == 0) / 2).mean()),
                    "mixture": user.mixture,
                }
            )
        _write_lines(rows, output_dir / "log.jsonl")
        _write_lines(truth, output_dir / "truth.jsonl")
        n_train = sum(user.n_train for user in users)
        story.say(
            f"All like a reply to be polite and safe; each leans to one of: {', '.join(TASTES)}. Their answers are noisy."
        )
        story.say(
            f"They give {scale.fewest} to {scale.most} comparisons each, {n_train} in all, and {scale.test_rows} more for the test."
        )
        sure = [row for row in rows if row["true_margin"] > 2]
        example = min(sure, key=lambda row: len(row["chosen"]) + len(row["rejected"]))
        story.say(f"Asked {example['prompt'].strip()!r}, {example['user_id']} prefers")
        story.say(f"   {example['chosen']!r} to")
        story.say(f"   {example['rejected']!r}")

    with story.stage("A small language model reads texts of that kind, without anybody's judgement"):
        corpus = make_corpus(scale.texts, rng)
        built = build_base_model(
            output_dir / "base_model",
            corpus,
            [row["prompt"] + row[side] for row in rows for side in ("chosen", "rejected")],
            steps=scale.reading_steps,
            seed=seed,
        )
        story.say(
            f"A Llama of {built['parameters']:,} weights and {built['words']} words; "
            f"its loss fell from {built['first_loss']:.2f} to {built['last_loss']:.2f} nats per word."
        )

    def part(split: str) -> Dataset:
        columns = ("user_id", "prompt", "chosen", "rejected")
        return Dataset.from_list([{name: row[name] for name in columns} for row in rows if row["split"] == split])

    budget = Budget(
        learning_rate=5e-3,
        learning_rate_users=1e-3,
        epochs=scale.epochs,
        batch_size=32,
        r=8,
        lora_alpha=16,
        target_modules="all-linear",
        share=share,
        max_length=None,
        on_cpu=True,
        seed=seed,
    )
    model = str((output_dir / "base_model").resolve())
    return Task(
        part("train"), part("test"), "user_id", model, budget, truth=pd.DataFrame(truth).drop(columns="mixture")
    )


def make_world(output_dir: Path, users: int, comparisons: int, seed: int) -> Path:
    """Users whose true rewards differ in a space of low rank, their log and a small base model, without a word; made once.

    A user's weights on the replies' attributes are SHARED plus a mixture of three tastes: all differences between users lie in a space of
    two dimensions, which no method is told. Attributes are worded in many ways, most of which one user hardly sees.

    Args:
        output_dir (`Path`):
            Gets `log.jsonl` (splits train, validation, test) and `base_model`; if they are there, nothing is made.
        users (`int`):
            2 to 50.
        comparisons (`int`):
            Of each user for training; 50 more are for validation and 100 for the test.
        seed (`int`):
            Of everything.

    Returns:
        `Path`: `output_dir`.

    Raises:
        DataError: another world is there.
    """
    import numpy as np

    from .base_model import build_base_model
    from .generator import RICH, make_corpus, make_log, make_users

    asked = {"users": users, "comparisons": comparisons, "seed": seed}
    if (output_dir / "log.jsonl").is_file():
        made = json.loads((output_dir / "world.json").read_text(encoding="utf-8"))
        if made != asked:
            raise DataError(f"The world in {output_dir} is {made}, asked for is {asked}. Give another folder.")
        return output_dir
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / "world.json").write_text(json.dumps(asked) + "\n", encoding="utf-8")
    rng = np.random.default_rng(seed)
    rows = make_log(make_users(users, comparisons, comparisons, rng), 150, rng, RICH)
    seen: Counter[str] = Counter()
    for row in rows:
        if row["split"] == "test":
            seen[row["user_id"]] += 1
            row["split"] = "validation" if seen[row["user_id"]] <= 50 else "test"
    build_base_model(
        output_dir / "base_model",
        make_corpus(FULL.texts, rng, RICH),
        [row["prompt"] + row[side] for row in rows for side in ("chosen", "rejected")],
        steps=FULL.reading_steps,
        seed=seed,
    )
    _write_lines(rows, output_dir / "log.jsonl.part")
    (output_dir / "log.jsonl.part").replace(output_dir / "log.jsonl")  # last: a world with a log is a whole one
    return output_dir


def own_task(story: Story, args: argparse.Namespace) -> Task:
    """Read one's own rows and split them; write them with their split to `args.output_dir`."""
    import torch
    from transformers import AutoConfig

    from ..data import check_preference_rows, load_preferences

    with story.stage(f"Reading {args.dataset}"):
        dataset = load_preferences(args.dataset)
        check_preference_rows(dataset, args.user_column, name="whole")
        splits = split_of_rows(dataset, args.user_column, args.seed)
        columns = [
            name
            for name in (args.user_column, "prompt", "chosen", "rejected", "margin")
            if name in dataset.column_names
        ]
        dataset = dataset.select_columns(columns)
        train, test = (
            dataset.select([row for row, split in enumerate(splits) if split == name]) for name in ("train", "test")
        )
        if len(test) == 0:
            raise DataError(
                f"No row is left for the test: {len(dataset)} rows, and no user has two different pairs. Is "
                f"{args.user_column!r} the column that names the user?"
            )
        _write_lines(
            ({**row, "split": split} for row, split in zip(dataset, splits, strict=True) if split),
            args.output_dir / "log.jsonl",
        )
        n_users = len(set(train[args.user_column]) | set(test[args.user_column]))
        story.say(f"{n_users} users, {len(train)} comparisons to train on, {len(test)} for the test.")
        if len(train) + len(test) < len(dataset):
            story.say(f"{len(dataset) - len(train) - len(test)} rows of other splits are left out.")
    on_cpu = not torch.accelerator.is_available()
    positions = getattr(AutoConfig.from_pretrained(args.model).get_text_config(), "max_position_embeddings", None)
    budget = Budget(
        learning_rate=args.learning_rate,
        learning_rate_users=args.learning_rate,  # as in the paper
        epochs=args.epochs,
        batch_size=args.batch_size,
        r=8,
        lora_alpha=16,
        target_modules=None,
        share=args.share,
        max_length=min(1024, positions or 1024),  # 1024 is TRL's default
        on_cpu=on_cpu,
        seed=args.seed,
    )
    return Task(train, test, args.user_column, args.model, budget)


def split_of_rows(dataset: "Dataset", user_column: str, seed: int) -> list[str | None]:
    """Which split each row is in: `"train"`, `"test"` or None (left out).

    By the column `split` where there is one (`validation` stands in for a missing `test`). Otherwise a fifth of each user's
    pairs, drawn by `seed`, is the test; the same two answers of one user to one prompt are never on both sides.

    Raises:
        DataError: the column `split` has no `train`, or neither `test` nor `validation`.
    """
    import numpy as np

    if "split" in dataset.column_names:
        named = dataset["split"][:]
        found = Counter(named)
        test = "test" if "test" in found else "validation"
        if "train" not in found or test not in found:
            raise DataError(
                f"The column 'split' holds {dict(found)}; rows with 'train' and rows with 'test' (or 'validation') are needed. "
                "Rename its values, or drop the column to have a fifth of each user's comparisons kept for the test."
            )
        return [{"train": "train", test: "test"}.get(name) for name in named]

    pairs: dict[Any, dict[str, list[int]]] = {}
    for number, row in enumerate(dataset):
        answers = sorted(json.dumps(row[side], sort_keys=True) for side in ("chosen", "rejected"))
        key = json.dumps([row.get("prompt"), answers], sort_keys=True)
        pairs.setdefault(row[user_column], {}).setdefault(key, []).append(number)
    splits: list[str | None] = ["train"] * len(dataset)
    rng = np.random.default_rng(seed)
    for of_user in pairs.values():
        rows = list(of_user.values())
        n_test = max(1, round(TEST_SHARE * len(rows))) if len(rows) > 1 else 0
        for place in rng.permutation(len(rows))[:n_test]:
            for number in rows[place]:
                splits[number] = "test"
    return splits


def _write_lines(rows: Any, path: Path) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
