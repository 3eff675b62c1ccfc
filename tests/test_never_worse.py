"""Fitted newcomers against the common model: on made-up people, on people who do not differ, and on the answers of real people.

The model is cheap and needs no download: hashed words, a projection (the identity) with ShareLoRA, a linear head. What is asked is not a gain but
that nobody loses: the mean difference of accuracy over the newcomers must not be below zero with all of its 95 % interval.
"""

import gzip
import json
import math
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers import tiny_tokenizer
from scipy import stats
from torch import nn
from transformers import BertConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from trl_sharelora import ShareLoraConfig, ShareLoraRewardConfig, ShareLoraRewardTrainer, evaluate_users
from trl_sharelora.demo.generator import make_log, make_users
from trl_sharelora.new_users import fit_users, user_spread


DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
FILES = (
    "mtbench_human",
    "polis_bowling_green",
    "polis_bowling_green.300",
    "polis_bowling_green.small",
    "ukpconvarg",
    "ukpconvarg.small",
)
FEATURES = 64
DECAY, EPOCHS = 3.0, 5
ROWS = 60  # of a real user in each split
ANSWERS = (1, 2, 5, 10, 20, 50)
TOKENIZER = tiny_tokenizer()


def hashed(text: str) -> np.ndarray:
    """Words and their length as `FEATURES` numbers of about 1."""
    found = np.zeros(FEATURES)
    words = text.lower().split()
    for word in words:
        number = zlib.crc32(word.encode())
        found[number % (FEATURES - 1)] += 1 if number >> 16 & 1 else -1
    found /= max(np.linalg.norm(found), 1e-9) / math.sqrt(FEATURES)
    found[-1] = math.log(1 + len(words)) - 3
    return found


class BagReward(PreTrainedModel):
    """A text's number in, its reward out."""

    config_class = BertConfig

    def __init__(self, config: BertConfig, features: torch.Tensor):
        super().__init__(config)
        self.features = features
        self.projection = nn.Linear(FEATURES, FEATURES, bias=False)
        self.classifier = nn.Linear(FEATURES, 1, bias=False)
        nn.init.eye_(self.projection.weight)
        nn.init.normal_(self.classifier.weight, std=0.02)

    def forward(self, input_ids, **kwargs):
        return SequenceClassifierOutput(logits=self.classifier(self.projection(self.features[input_ids[:, 0]])))


def trained(rows: list[dict], folder: Path) -> tuple[nn.Module, dict[str, list[dict]], dict[str, list[dict]]]:
    """A reward model of four fifths of the users, and the answers and the test rows of the others."""
    texts = {
        text: number for number, text in enumerate(sorted({row[s] for row in rows for s in ("chosen", "rejected")}))
    }
    features = torch.tensor(np.stack([hashed(text) for text in texts]), dtype=torch.float32)
    for row in rows:
        row |= {f"{side}_ids": [texts[row[side]]] for side in ("chosen", "rejected")}
    users = sorted({row["user_id"] for row in rows})
    users = [users[number] for number in np.random.default_rng(0).permutation(len(users))]
    newcomers = users[len(users) * 4 // 5 :]
    kept = [row for row in rows if row["user_id"] not in newcomers and row["split"] == "train"]
    torch.manual_seed(0)
    arguments = ShareLoraRewardConfig(
        output_dir=str(folder),
        num_train_epochs=EPOCHS,
        learning_rate=3e-2,
        learning_rate_shared=3e-3,
        user_weight_decay=DECAY,
        per_device_train_batch_size=64,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = ShareLoraRewardTrainer(
        model=BagReward(BertConfig(hidden_size=FEATURES, num_labels=1, initializer_range=0.02), features),
        args=arguments,
        train_dataset=tokenised(kept),
        processing_class=TOKENIZER,
        peft_config=ShareLoraConfig(r=8, lora_alpha=8, target_modules=["projection"], share="AB"),
    )
    trainer.train()
    of = {
        split: {user: [row for row in rows if row["user_id"] == user and row["split"] == split] for user in newcomers}
        for split in ("train", "test")
    }
    having = [user for user in newcomers if of["train"][user] and of["test"][user]]
    return trainer.model.eval(), {u: of["train"][u] for u in having}, {u: of["test"][u] for u in having}


def tokenised(rows: list[dict]) -> Dataset:
    return Dataset.from_list([{name: row[name] for name in ("user_id", "chosen_ids", "rejected_ids")} for row in rows])


def accuracy(model: nn.Module, test: dict[str, list[dict]]) -> np.ndarray:
    rows = tokenised([row for of_user in test.values() for row in of_user])
    table = evaluate_users(model, rows, TOKENIZER, unseen="common", batch_size=256).table.set_index("user_id")
    return table["accuracy"].loc[list(test)].to_numpy()


def differences(model: nn.Module, answers: dict[str, list[dict]], test: dict[str, list[dict]], n: int) -> np.ndarray:
    """Per newcomer, accuracy after a fit to his first n answers minus the common model's. (Those who have fewer give what they have.)"""
    spread = user_spread(model, [user for user in model.peft_config["default"].users if user not in answers])
    rows = tokenised([row for of_user in answers.values() for row in of_user[:n]])
    fit_users(model, rows, TOKENIZER, spread=spread, refit=True, batch_size=64)
    return accuracy(model, test)


def upper_end(values: np.ndarray) -> float:
    """Of the 95 % Student interval of the mean over newcomers."""
    error = values.std(ddof=1) / math.sqrt(len(values))
    return float(values.mean() + stats.t.ppf(0.975, len(values) - 1) * error)


def check(rows: list[dict], folder: Path, numbers: tuple[int, ...] = ANSWERS) -> dict[int, np.ndarray]:
    model, answers, test = trained(rows, folder)
    common = accuracy(model, test)
    found = {n: differences(model, answers, test, n) - common for n in numbers}
    for n, gains in found.items():
        assert upper_end(gains) >= 0, f"{len(gains)} newcomers lost {-gains.mean():.3f} with {n} answers"
    return found


def made_up_log(users: int, alike: bool) -> list[dict]:
    draw = np.random.default_rng(3)
    people = make_users(users, 60, 60, draw)
    if alike:
        people = [replace(one, mixture=people[0].mixture, weights=people[0].weights) for one in people]
    return make_log(people, 60, draw)


def test_made_up_people_gain_where_tastes_differ(tmp_path):
    gains = check(made_up_log(50, alike=False), tmp_path)
    assert (
        gains[20].mean() > 0.02 and gains[50].mean() > 0.03
    )  # else the test would also hold for a fit that does nothing


def test_people_who_do_not_differ_lose_nothing(tmp_path):
    check(made_up_log(50, alike=True), tmp_path)


@pytest.mark.parametrize("kind", ["as the common model", "coin"])
def test_newcomers_who_are_the_common_model_or_toss_a_coin_lose_nothing(kind, tmp_path):
    """The trained users differ, so the prior says that newcomers do too."""
    log = made_up_log(50, alike=False)
    model, *_ = trained(log, tmp_path)
    draw = np.random.default_rng(1)
    pool = [log[number] for number in draw.permutation(len(log))]
    unknown = tokenised([row | {"user_id": "nobody"} for row in pool])
    margins = evaluate_users(model, unknown, TOKENIZER, unseen="common", batch_size=256).rows["margin"].to_numpy()
    kept = draw.random(len(pool)) < (1 / (1 + np.exp(-margins)) if kind != "coin" else 0.5)
    for row, keep in zip(pool, kept, strict=True):
        if not keep:
            row["chosen_ids"], row["rejected_ids"] = row["rejected_ids"], row["chosen_ids"]
    half = len(pool) // 2
    ids = [f"null{number}" for number in range(half // 50)]
    answers = {user: pool[50 * n : 50 * n + 50] for n, user in enumerate(ids)}
    test = {user: pool[half + 50 * n : half + 50 * n + 50] for n, user in enumerate(ids)}
    for part in (answers, test):
        for user, rows in part.items():
            part[user] = [row | {"user_id": user} for row in rows]
    common = accuracy(model, test)
    for n in ANSWERS:
        gains = differences(model, answers, test, n) - common
        assert upper_end(gains) >= 0, f"{len(gains)} newcomers lost {-gains.mean():.3f} with {n} answers"


@pytest.mark.parametrize("name", FILES)
def test_real_newcomers_lose_nothing(name, tmp_path):
    path = DATA / f"{name}.jsonl.gz"
    if not path.is_file():
        pytest.skip(f"{path} is not there: the answers of real people are no part of this repository")
    by_user: dict[str, list[dict]] = {}
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            if row["split"] != "validation" and row["chosen"] != row["rejected"]:
                by_user.setdefault(row["user_id"], []).append(row)
    for user, rows in by_user.items():
        by_user[user] = [
            row for split in ("train", "test") for row in [one for one in rows if one["split"] == split][:ROWS]
        ]
    drawn = np.random.default_rng(0).permutation(sorted(by_user))[:100]
    check([row for user in drawn for row in by_user[user]], tmp_path, (1, 5, 20))
