"""Make the data of P-ShareLoRA (https://huggingface.co/papers/2503.19201): preferences over summaries of posts.

    python examples/paper/prepare_tldr.py tldr.jsonl.gz
    python examples/paper/prepare_tldr.py helpsteer2.jsonl.gz --dataset helpsteer2

The first takes the comparisons of `openai/summarize_from_feedback`, from the hub or from a local copy (`--source`),
and writes rows {"user_id", "prompt", "chosen", "rejected", "split"}, splits train and validation, of the five workers
with most training comparisons, each cut to as many as the least busy of them has. In the paper that is 5,373
comparisons for training and 1,238 for validation each.

Which rows: as the authors' code takes them, with the same seed the same ones (it permutes a worker's rows with numpy's
`default_rng(42)` and keeps the first), unless rows were left out. Left out here, and counted, not there: comparisons
of news articles (CNN/DM, validation only; another task, whose rows have no post), empty summaries and pairs of equal
summaries (they hold no preference). The user id is the worker's id. Text: as the authors' code has it, "SUBREDDIT:
r/...\\nTITLE: ...\\nPOST: ...\\nTL;DR: summary"; the prompt ends at the colon, so `prompt + chosen` is their text to
the letter. The end token that TRL adds is ours.

`--dataset helpsteer2` is in the authors' code only, not in the paper: each two consecutive rows of `nvidia/HelpSteer2`
answer one prompt, and each of the five attributes is a "labeler" who prefers the higher score; equal scores are
decided by a coin (`--seed`).
"""

import argparse
import gzip
import io
import json
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict, Features, Value, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError

from trl_sharelora.data import load_preferences
from trl_sharelora.errors import DataError, ShareLoraError, some_rows


# The dataset's main branch is a loading script, which `datasets` no longer runs; the hub keeps its output on this one.
TLDR_SOURCE = {"path": "openai/summarize_from_feedback", "revision": "refs/convert/parquet", "data_dir": "comparisons"}
HELPSTEER2_SOURCE = {"path": "nvidia/HelpSteer2"}
# For folders whose files differ in what they lack: the original batches of posts have no article, those of news no post.
TEXT = Value("string")
COMPARISON = Features(
    {
        "info": dict.fromkeys(("id", "post", "title", "subreddit", "site", "article"), TEXT),
        "summaries": [dict.fromkeys(("text", "policy", "note"), TEXT)],
        "choice": Value("int32"),
        **dict.fromkeys(("worker", "batch", "split"), TEXT),
        "extra": {"confidence": Value("int32")},
    }
)
ATTRIBUTES = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
SPLITS = ("train", "validation")


def read_splits(source: str | None, hub: dict[str, str], features: Features | None = None) -> dict[str, Dataset]:
    """The training and the validation rows, as they are.

    Args:
        source (`str`, *optional*):
            A file (`.jsonl`, `.json`, each also `.gz`, `.parquet`), a folder of such files or of `save_to_disk`, or an
            id of the hub. Without separate splits, a row's own `split` tells: `train`, or what begins with `valid`
            (the original files have valid1, valid2).
        hub (`dict[str, str]`):
            Arguments of [`~datasets.load_dataset`] for the hub; its `path` is taken where `source` is not given.
        features ([`~datasets.Features`], *optional*):
            Of a row, for a folder whose files do not agree by themselves.

    Raises:
        DataError: It cannot be read, or has not these splits.
    """
    name = source or hub["path"]
    path = Path(name)
    saved = path.is_dir() and any((path / file).is_file() for file in ("state.json", "dataset_dict.json"))
    try:
        if path.is_file():
            loaded = load_preferences(path)
        elif saved:
            loaded = load_from_disk(str(path))
        else:
            arguments = hub if name == hub["path"] and not path.is_dir() else {"path": name}
            try:
                loaded = load_dataset(**arguments)
            except DatasetGenerationError:
                if features is None or not path.is_dir():
                    raise
                loaded = load_dataset(**arguments, features=features)
    except ShareLoraError:
        raise
    except Exception as error:  # `datasets` raises a dozen kinds, from the network's to pyarrow's
        raise DataError(
            f"{name!r} cannot be read: {type(error).__name__}: {error} A file or folder that exists, or an id of the hub, is needed. "
            "Without a network, download it elsewhere and give the copy with --source."
        ) from error
    if isinstance(loaded, DatasetDict) and len(loaded) == 1:
        loaded = next(iter(loaded.values()))
    if isinstance(loaded, DatasetDict):
        if not set(SPLITS) <= set(loaded):
            raise DataError(f"{name!r} has the splits {sorted(loaded)}; train and validation are needed.")
        return {split: loaded[split] for split in SPLITS}
    if "split" not in loaded.column_names:
        raise DataError(
            f"{name!r} is one table without a column 'split' (its columns are {loaded.column_names}); train and validation are needed, as "
            "files of these names in a folder or as such a column."
        )
    rows: dict[str, list[int]] = {split: [] for split in SPLITS}
    values = loaded["split"][:]
    for row, value in enumerate(values):
        split = "train" if value == "train" else "validation" if str(value).startswith("valid") else None
        if split is None:
            raise DataError(f"{name!r}, row {row}: split={value!r}; 'train' or what begins with 'valid' is needed.")
        rows[split].append(row)
    if not all(rows.values()):
        raise DataError(
            f"{name!r} has only the splits {dict(Counter(values))}; rows for training and for validation are needed."
        )
    return {split: loaded.select(rows[split]) for split in SPLITS}


def problem_of_comparison(row: dict[str, Any]) -> str | None:
    """What is wrong with a row of `summarize_from_feedback`, config comparisons; None if nothing is."""
    missing = [key for key in ("info", "summaries", "choice", "worker") if row.get(key) is None]
    if missing:
        return f"no {' and no '.join(missing)}; its columns are {sorted(row)}"
    info, summaries = row["info"], row["summaries"]
    if not isinstance(info, dict):
        return f"`info` is a {type(info).__name__}, not a record with post, title and subreddit"
    if (
        not isinstance(summaries, list)
        or len(summaries) != 2
        or any(not isinstance(summary, dict) or not isinstance(summary.get("text"), str) for summary in summaries)
    ):
        return f"`summaries` is not two records with a text: {str(summaries)[:80]}"
    if isinstance(row["choice"], bool) or row["choice"] not in (0, 1):
        return f"`choice` is {row['choice']!r}, not 0 or 1"
    if not isinstance(row["worker"], str) or not row["worker"].strip():
        return f"`worker` is {row['worker']!r}, not an id as text"
    if not info.get("post"):
        # the config axis has one summary a row and stops above
        return None if info.get("article") else "`info` has neither a post nor an article"
    for key in ("title", "subreddit"):
        if not isinstance(info.get(key), str):
            return f"`info` has a post and no {key}"
    return None


def comparison_text(row: dict[str, Any]) -> dict[str, str]:
    """Prompt, chosen and rejected of a row; joined, they are the text of the authors' code."""
    info, (first, second) = row["info"], row["summaries"]
    chosen, rejected = (second, first) if row["choice"] else (first, second)
    return {
        "prompt": f"SUBREDDIT: r/{info['subreddit']}\nTITLE: {info['title']}\nPOST: {info['post']}\nTL;DR:",
        "chosen": " " + chosen["text"],
        "rejected": " " + rejected["text"],
    }


def prepare_tldr(
    splits: dict[str, Iterable[dict[str, Any]]],
    workers: int = 5,
    seed: int = 42,
    cap: int | None = None,
    cap_validation: int | None = None,
) -> tuple[list[dict[str, str]], dict[str, Any]]:
    """The busiest workers' comparisons, equally many of each.

    Workers are ranked by their usable training rows; among equals, also at the last place, the one who comes first in
    the training split is taken, as in the authors' code.

    Args:
        splits (`dict[str, Iterable[dict]]`):
            Rows of `train` and `validation` in the schema of `openai/summarize_from_feedback`, config comparisons.
        workers (`int`, *optional*, defaults to `5`):
            How many; the paper's number.
        seed (`int`, *optional*, defaults to `42`):
            Of the choice of rows, the same permutation for each worker and split, as in the authors' code.
        cap (`int`, *optional*), cap_validation (`int`, *optional*):
            At most so many rows of each worker; by default as many as the least busy of the taken workers has, as in
            the paper.

    Returns:
        `tuple[list[dict], dict]`: Rows `{"user_id", "prompt", "chosen", "rejected", "split"}`, the busiest worker's
        first, and a report: `workers` (one record each, `user_id`, `train` and `validation` taken, `train_of` and
        `validation_of` usable, `articles` left out of his validation rows), `left_out` by split and reason,
        `all_workers`, `cut_tie` (ids of workers not taken who have as many rows as the last one taken).

    Raises:
        DataError: Another schema, too few workers, or one of the taken workers has nothing in validation.
    """
    for name, value in (("workers", workers), ("cap", cap), ("cap_validation", cap_validation)):
        if value is not None and value < 1:
            raise DataError(f"{name}={value}; at least 1 is needed.")
    usable: dict[str, dict[str, list[dict[str, str]]]] = {}
    left_out: dict[str, Counter[str]] = {}
    articles: Counter[str] = Counter()  # in validation; training has none
    for split in SPLITS:
        usable[split], left_out[split] = {}, Counter()
        bad: list[int] = []
        first = ""
        for number, row in enumerate(splits[split]):
            problem = problem_of_comparison(row)
            if problem:
                first = first or problem
                bad.append(number)
                continue
            texts = comparison_text(row)
            if not row["info"].get("post"):
                left_out[split]["news articles"] += 1
                articles[row["worker"]] += split == "validation"
            elif not texts["chosen"].strip() or not texts["rejected"].strip():
                left_out[split]["empty summaries"] += 1
            elif texts["chosen"] == texts["rejected"]:
                left_out[split]["equal summaries"] += 1
            else:
                usable[split].setdefault(row["worker"], []).append(texts)
        if bad:
            raise DataError(
                f"The {split} split is not of openai/summarize_from_feedback, config 'comparisons': {some_rows(bad)}. The first has {first}. "
                "A row there is {'info': {'post', 'title', 'subreddit', ...}, 'summaries': [{'text'}, {'text'}], 'choice': 0 or 1, 'worker'}."
            )
    # sorted() is stable: equals stay in order of appearance
    ranked = sorted(usable["train"], key=lambda worker: -len(usable["train"][worker]))
    if len(ranked) < workers:
        raise DataError(
            f"{workers} workers were asked for and {len(ranked)} have usable training rows. Ask for fewer with --workers; if the real data was "
            "meant (53 workers), look at the source."
        )
    taken = ranked[:workers]
    absent = [worker for worker in taken if not usable["validation"].get(worker)]
    if absent:
        raise DataError(
            f"The workers {absent} are among the {workers} busiest and have no usable row in validation, so nothing could be said of them. "
            "Take fewer workers (--workers), or a source with their rows."
        )
    rows, take = [], {}
    for split, limit in (("train", cap), ("validation", cap_validation)):
        smallest = min(len(usable[split][worker]) for worker in taken)
        take[split] = smallest if limit is None else min(limit, smallest)
        for worker in taken:
            own = usable[split][worker]
            # what Dataset.shuffle(seed=seed).select(range(n)) keeps, in its order
            for number in np.random.default_rng(seed).permutation(len(own))[: take[split]]:
                rows.append({"user_id": worker, **own[number], "split": split})
    report = {
        "workers": [
            {"user_id": worker}
            | {split: take[split] for split in SPLITS}
            | {f"{split}_of": len(usable[split][worker]) for split in SPLITS}
            | {"articles": articles[worker]}
            for worker in taken
        ],
        "left_out": {split: dict(left_out[split]) for split in SPLITS},
        "all_workers": len(ranked),
        "cut_tie": [
            worker for worker in ranked[workers:] if len(usable["train"][worker]) == len(usable["train"][taken[-1]])
        ],
    }
    return rows, report


def prepare_helpsteer2(
    splits: dict[str, Iterable[dict[str, Any]]], seed: int = 42
) -> tuple[list[dict[str, str]], dict[str, Any]]:
    """Each attribute of HelpSteer2 as a labeler: of two answers to a prompt he prefers the one with the higher score.

    In the authors' code, not in the paper. It adds a number of (-.5, .5) to one of the whole-numbered scores, which
    decides equal scores by a coin and no others; here the coin is tossed.

    Args:
        splits (`dict[str, Iterable[dict]]`):
            Rows of `train` and `validation` in the schema of `nvidia/HelpSteer2`; rows 2i and 2i + 1 answer the same
            prompt.
        seed (`int`, *optional*, defaults to `42`):
            Of the coins, one for each pair and attribute, whether needed or not. (The authors' code draws from numpy's
            global generator.)

    Returns:
        `tuple[list[dict], dict]`: Rows and report, as of [`prepare_tldr`]; a record of the report's `workers` also has
        `ties`.

    Raises:
        DataError: Another schema, an odd number of rows, or two rows of a pair with different prompts.
    """
    rows: list[dict[str, str]] = []
    left_out: dict[str, Counter[str]] = {split: Counter() for split in SPLITS}
    counts: dict[str, Counter[str]] = {attribute: Counter() for attribute in ATTRIBUTES}
    for split in SPLITS:
        # each split has its own stream, so that the length of one does not move the coins of the other
        draw = np.random.default_rng([seed, SPLITS.index(split)])
        answers = list(splits[split])
        for number, row in enumerate(answers):
            sound = all(isinstance(row.get(key), str) for key in ("prompt", "response"))
            scores = [row.get(key) for key in ATTRIBUTES]
            if not sound or any(isinstance(score, bool) or not isinstance(score, int) for score in scores):
                raise DataError(
                    f"The {split} split is not of nvidia/HelpSteer2: row {number} has the columns {sorted(row)} and the scores {scores}. Texts `prompt` "
                    f"and `response` and the whole numbers {', '.join(ATTRIBUTES)} are needed (the configs preference and disagreements are others)."
                )
        if not answers or len(answers) % 2:
            raise DataError(
                f"The {split} split has {len(answers)} rows; two consecutive rows make a pair, so an even number is needed. Is it cut off?"
            )
        for number in range(0, len(answers), 2):
            first, second = answers[number : number + 2]
            if first["prompt"] != second["prompt"]:
                raise DataError(
                    f"Rows {number} and {number + 1} of the {split} split have different prompts; two consecutive rows must answer the same one. "
                    "Was it shuffled or filtered?"
                )
            coins = draw.random(len(ATTRIBUTES)) < 0.5
            blank = not first["response"].strip() or not second["response"].strip() or not first["prompt"].strip()
            if blank or first["response"] == second["response"]:
                left_out[split]["empty answers" if blank else "equal answers"] += 1
                continue
            for attribute, coin in zip(ATTRIBUTES, coins, strict=True):
                tie = first[attribute] == second[attribute]
                first_wins = coin if tie else first[attribute] > second[attribute]
                chosen, rejected = (first, second) if first_wins else (second, first)
                counts[attribute].update({split: 1, "ties": int(tie)})
                rows.append(
                    {
                        "user_id": attribute,
                        "prompt": first["prompt"],
                        "chosen": " " + chosen["response"],
                        "rejected": " " + rejected["response"],
                        "split": split,
                    }
                )
    report = {
        "workers": [
            {"user_id": attribute}
            | {split: counts[attribute][split] for split in SPLITS}
            | {f"{split}_of": counts[attribute][split] for split in SPLITS}
            | {"ties": counts[attribute]["ties"]}
            for attribute in ATTRIBUTES
        ],
        "left_out": {split: dict(left_out[split]) for split in SPLITS},
        "all_workers": len(ATTRIBUTES),
        "cut_tie": [],
    }
    return rows, report


def write_rows(rows: Sequence[dict[str, str]], path: str | Path) -> None:
    """Write rows as JSON lines; the same rows always give the same bytes.

    Args:
        rows (`Sequence[dict]`):
            What [`prepare_tldr`] returns.
        path (`str` or `Path`):
            Ends in `.jsonl` or `.jsonl.gz`.

    Raises:
        DataError: Another ending.
    """
    path = Path(path)
    if not path.name.endswith((".jsonl", ".jsonl.gz")):
        raise DataError(f"The output {str(path)!r} does not end in .jsonl or .jsonl.gz.")
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    # no file name and no time in gzip's header
    with open(path, "wb") as file:
        if path.suffix == ".gz":
            with (
                gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0) as packed,
                io.TextIOWrapper(packed) as out,
            ):
                out.write(text)
        else:
            file.write(text.encode())


def show_report(report: dict[str, Any]) -> str:
    """The report as a table."""
    width = max(len(worker["user_id"]) for worker in report["workers"])
    lines = [f"{'labeler':<8}  {'user_id':<{width}}  {'train':>15}  {'validation':>15}"]
    for number, worker in enumerate(report["workers"]):
        cells = [f"{worker[split]:,} of {worker[f'{split}_of']:,}" for split in SPLITS]
        more = f"  {worker['ties']:,} ties by coin" if "ties" in worker else ""
        more += f"  without {worker['articles']:,} of news" if worker.get("articles") else ""
        lines.append(f"{number:<8}  {worker['user_id']:<{width}}  {cells[0]:>15}  {cells[1]:>15}{more}")
    totals = {split: sum(worker[split] for worker in report["workers"]) for split in SPLITS}
    lines.append(f"{totals['train']:,} rows for training, {totals['validation']:,} for validation")
    for split, reasons in report["left_out"].items():
        lines += [f"left out of {split}: {number:,} with {reason}" for reason, number in reasons.items()]
    if report["cut_tie"]:
        lines.append(
            f"{len(report['cut_tie'])} more have as many training rows as the last one taken; who comes first in the data was taken: "
            + ", ".join(report["cut_tie"])
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="where to write: .jsonl or .jsonl.gz")
    parser.add_argument("--dataset", choices=("tldr", "helpsteer2"), default="tldr")
    parser.add_argument("--source", metavar="PATH_OR_ID", help="a local copy, or another id of the hub")
    parser.add_argument("--workers", type=int, help="how many workers (tldr; default 5, as in the paper)")
    parser.add_argument("--seed", type=int, default=42, help="default 42, as in the authors' code")
    parser.add_argument("--cap", type=int, metavar="N", help="at most N training rows of each worker (tldr)")
    parser.add_argument("--cap_validation", type=int, metavar="N", help="at most N validation rows of each (tldr)")
    args = parser.parse_args(argv)
    try:
        if args.dataset == "tldr":
            splits = read_splits(args.source, TLDR_SOURCE, COMPARISON)
            workers = 5 if args.workers is None else args.workers
            rows, report = prepare_tldr(splits, workers, args.seed, args.cap, args.cap_validation)
        else:
            for name in ("workers", "cap", "cap_validation"):
                if getattr(args, name) is not None:
                    raise DataError(f"--{name} is for tldr; helpsteer2 has five attributes with equally many rows.")
            rows, report = prepare_helpsteer2(read_splits(args.source, HELPSTEER2_SOURCE), args.seed)
        write_rows(rows, args.output)
    except ShareLoraError as error:
        print(f"prepare_tldr: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    print(f"{show_report(report)}\nwritten to {args.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
