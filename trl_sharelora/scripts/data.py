"""`trl-sharelora data check | import | split`: look at a preference log, make one of another schema, split it."""

import argparse
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..data import check_output, load_preferences
from ..doctor import check_data, write_report
from ..errors import ConfigError
from ..importers import ASPECTS, FORMATS, ROW_FILES, Columns, import_preferences, write_rows
from ..splits import FRACTIONS, ITEMS, NEAR, SHOTS, TOO_FEW, Split, split_by_comparison, split_by_item, split_by_user


SPLIT_FILES = (".json", ".json.gz")


def _written(numbers: Mapping[str, Any]) -> str:
    return ",".join(f"{name}={number}" for name, number in numbers.items())


# How a split is made. The parser leaves them None, to tell what was given: with --apply the split file settles them.
_MAKING: dict[str, Any] = {
    "by": "comparison",
    "fractions": _written(FRACTIONS),
    "fewest": "train=1",
    "too_few": "raise",
    "seed": 0,
    "item": "auto",
    "near": NEAR,
    "unseen": "0.2",
    "shots": ",".join(map(str, SHOTS)),
    "n_test": 20,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the three tools."""
    tools = parser.add_subparsers(dest="tool", metavar="check|import|split", required=True)

    check = tools.add_parser(
        "check",
        help="what is wrong with a log, what leaks, what personalisation can gain",
        description="Examine a preference log. Exit status: 0 clean, 1 something to look at, 2 unusable.",
    )
    check.add_argument("file", metavar="FILE", help="preference rows: a file or a hub id")
    check.add_argument("--user_column", default="user_id", metavar="NAME", help="the column that names the user")
    check.add_argument("--split_column", default="split", metavar="NAME", help="the column that names the split")
    check.add_argument("--position_column", metavar="NAME", help="a column that says where the chosen reply was shown")
    check.add_argument("--no_gain", action="store_true", help="do not estimate what personalisation can gain")
    check.add_argument("--seed", type=int, default=0, metavar="N", help="of folds and samples (default 0)")
    check.add_argument("--json", metavar="FILE", help="also write the report there")

    load = tools.add_parser(
        "import",
        help="standard rows of a log in another schema",
        description="Make standard preference rows. "
        + " ".join(f"{name}: {schema.what}." for name, schema in FORMATS.items()),
    )
    load.add_argument("--format", required=True, choices=list(FORMATS), help="the schema of SRC")
    load.add_argument("source", metavar="SRC", help="a file, a folder or a hub id; 'hub' for the format's own dataset")
    load.add_argument("output", metavar="OUT", help="where to write: .jsonl, .jsonl.gz or .parquet")
    load.add_argument("--split", metavar="NAME", help="take one split only")
    for name, text in (("user", "who judged"), ("prompt", "prompts"), ("chosen", "chosen"), ("rejected", "rejected")):
        default = getattr(Columns(), name)
        load.add_argument(f"--{name}_column", default=default, metavar="NAME", help=f"{text} (default {default})")
    load.add_argument("--left", metavar="NAME", help="Label Studio: the field of the left text")
    load.add_argument("--right", metavar="NAME", help="Label Studio: the field of the right text")
    load.add_argument(
        "--aspect", choices=ASPECTS, default="overall", help="MultiPref: which judgement (default overall)"
    )

    split = tools.add_parser(
        "split",
        help="split a log in a way that can be repeated",
        description="Split a log by comparison, by item or by user. OUT.json(.gz) is a split file (digests, no texts), which --apply takes; "
        "OUT.jsonl(.gz) or OUT.parquet are the rows with a column `split`.",
    )
    split.add_argument("file", metavar="FILE", help="preference rows: a file or a hub id")
    split.add_argument(
        "output", metavar="OUT", help=".json, .json.gz: the split; .jsonl, .jsonl.gz, .parquet: the rows"
    )
    split.add_argument("--apply", metavar="SPLIT", help="apply this split file instead of making a new split")
    split.add_argument(
        "--user_column", metavar="NAME", help="the column that names the user (default user_id, or what SPLIT says)"
    )

    def making(name: str, help: str, **more: Any) -> None:
        split.add_argument(f"--{name}", help=f"{help} (default {_MAKING[name]})", **more)

    making("by", "what is split", choices=("comparison", "item", "user"))
    making("fractions", "splits and their shares", metavar="NAME=X,...")
    making("fewest", "rows that each user must have", metavar="NAME=N,...")
    making("too_few", "what to do with users who have fewer", choices=TOO_FEW)
    making("seed", "another seed, another split", type=int, metavar="N")
    making("item", "by item: what an item is", choices=ITEMS)
    making("near", "by item: similarity of near-duplicates", type=float, metavar="X")
    making("unseen", "by user: share or number to keep back", metavar="X")
    making("shots", "by user: answers of the curve", metavar="N,...")
    making("n_test", "by user: test answers of each", type=int, metavar="N")


def _named_numbers(text: str, kind: type, option: str) -> dict[str, Any]:
    """`"train=0.8,test=0.2"` as a dict."""
    try:
        pairs = [part.split("=") for part in text.split(",") if part.strip()]
        return {name.strip(): kind(number) for name, number in pairs}
    except ValueError:
        raise ConfigError(f"{option} {text!r} came; names with numbers are needed, such as train=1.") from None


def _numbers(text: str, option: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise ConfigError(f"{option} {text!r} came; whole numbers with commas between them are needed.") from None


def data(args: argparse.Namespace) -> int:
    """Run one of the three tools.

    Args:
        args (`argparse.Namespace`):
            The arguments of `trl-sharelora data`.

    Returns:
        `int`: Exit status; of `check` that of the report.
    """
    return {"check": _check, "import": _import, "split": _split}[args.tool](args)


def _check(args: argparse.Namespace) -> int:
    if args.json:
        check_output(args.json, ("",))
    report = check_data(
        args.file,
        user_column=args.user_column,
        split_column=args.split_column,
        position_column=args.position_column,
        gain=not args.no_gain,
        seed=args.seed,
    )
    print(report)
    if args.json:
        write_report(report, args.json)
    return report.status


def _import(args: argparse.Namespace) -> int:
    columns = Columns(
        user=args.user_column,
        prompt=args.prompt_column,
        chosen=args.chosen_column,
        rejected=args.rejected_column,
        left=args.left,
        right=args.right,
        aspect=args.aspect,
    )
    source = None if args.source == "hub" and not Path("hub").exists() else args.source
    check_output(args.output, ROW_FILES)
    imported = import_preferences(source, args.format, columns, args.split)
    imported.save(args.output)
    print(f"{imported}\nwritten to {args.output}")
    return 0


def _split(args: argparse.Namespace) -> int:
    given = [f"--{name}" for name in _MAKING if getattr(args, name) is not None]
    if args.apply and given:
        raise ConfigError(
            f"{', '.join(given)} came with --apply, which has no use for it: the split file says which row goes where. Leave it out, or leave "
            "out --apply to make a new split."
        )
    check_output(args.output, (*SPLIT_FILES, *ROW_FILES))
    making = {
        name: default if getattr(args, name) is None else getattr(args, name) for name, default in _MAKING.items()
    }
    shared: dict[str, Any] = {
        "fractions": _named_numbers(making["fractions"], float, "--fractions"),
        "seed": making["seed"],
        "user_column": args.user_column or "user_id",
        "fewest": _named_numbers(making["fewest"], int, "--fewest"),
        "too_few": making["too_few"],
    }
    dataset = load_preferences(args.file)
    if args.apply:
        split = Split.load(args.apply)
        split = replace(split, user_column=args.user_column or split.user_column)
    elif making["by"] == "comparison":
        split = split_by_comparison(dataset, **shared)
    elif making["by"] == "item":
        split = split_by_item(dataset, **shared, item=making["item"], near=making["near"])
    else:
        unseen = making["unseen"]
        try:
            unseen = float(unseen) if "." in unseen else int(unseen)
        except ValueError:
            raise ConfigError(f"--unseen {unseen!r} came; a share such as 0.2 or a number is needed.") from None
        shots = _numbers(making["shots"], "--shots")
        split = split_by_user(dataset, **shared, unseen=unseen, shots=shots, n_test=making["n_test"])
    if "split" in dataset.column_names:
        before = ", ".join(f"{name!r} {n}" for name, n in sorted(Counter(map(str, dataset["split"][:])).items()))
        print(
            f"note: the rows have a column 'split' already ({before}); all of them are split anew, and it is replaced."
        )
    names = split.names_of(dataset)  # also checks that the split is of these rows
    if str(args.output).endswith((".json", ".json.gz")):
        split.save(args.output)
    else:
        rows = dataset.with_format(None)
        places = split.places_of(dataset) if split.places else None
        write_rows(
            [
                row | {"split": name} | ({"support_place": places[number]} if places else {})
                for number, (row, name) in enumerate(zip(rows, names, strict=True))
            ],
            args.output,
        )
    print(f"{split}\nwritten to {args.output}")
    return 0
