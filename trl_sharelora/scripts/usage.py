"""`trl-sharelora usage`: does a saved reward model use the user?"""

import json
from argparse import Namespace
from pathlib import Path

from ..data import load_preferences
from ..scoring import load_reward_model
from ..usage import usage_card, user_usage
from .confidence import loading_arguments


def usage(args: Namespace) -> None:
    """Print the three looks; with `args.output_dir`, write `usage.json`, `usage.md` and `usage.parquet` there.

    Args:
        args (`argparse.Namespace`):
            The arguments of `trl-sharelora usage`.
    """
    # before the base model is loaded, which may take minutes
    dataset = load_preferences(args.dataset_name, split=args.dataset_split)
    model, tokenizer = load_reward_model(args.model_name_or_path, **loading_arguments(args))
    report = user_usage(
        model,
        dataset,
        tokenizer,
        user_column=args.user_column,
        batch_size=args.batch_size,
        max_length=args.max_length,
        draws=args.draws,
        flip_users=args.flip_users,
        seed=args.seed,
    )
    print(report)
    if args.output_dir:
        folder = Path(args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "usage.json").write_text(json.dumps(report.as_dict(), indent=2) + "\n", encoding="utf-8")
        (folder / "usage.md").write_text(usage_card(report), encoding="utf-8")
        report.table.to_parquet(folder / "usage.parquet", index=False)
        print(
            f"The table of users is in {folder / 'usage.parquet'}, the section of a model card in {folder / 'usage.md'}"
        )
