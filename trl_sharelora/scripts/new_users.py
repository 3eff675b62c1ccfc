"""`trl-sharelora add-users`, `fit-users` and `shrink-users`: users after the training."""

from argparse import Namespace
from pathlib import Path

from ..data import load_preferences
from ..errors import ConfigError, UserIdError, some_rows
from ..new_users import UserSpread
from ..new_users import add_users as add
from ..new_users import fit_users as fit
from ..scoring import load_reward_model, read_config
from ..shrinkage import shrink_users as shrink
from .confidence import loading_arguments


def add_users(args: Namespace) -> None:
    """Give rows to the users `args.users` and those of `args.users_file`, as the common model.

    Args:
        args (`argparse.Namespace`):
            The arguments of `trl-sharelora add-users`.

    Raises:
        ConfigError: no users came, or the file is missing.
        UserIdError: the file is not UTF-8, or blanks are around its ids.
    """
    user_ids = list(args.users or [])
    if args.users_file:
        path = Path(args.users_file)
        if not path.is_file():
            raise ConfigError(f"--users_file {str(path)!r} is no file; one with a user id per line is needed.")
        try:
            # with the mark that Windows' editors put in front, which is no letter of the first id
            lines = path.read_text(encoding="utf-8-sig").split("\n")
        except UnicodeDecodeError as error:
            raise UserIdError(f"{path} is not UTF-8 text ({error.reason}); write one user id per line.") from None
        user_ids += [line for line in lines if line.strip()]
        padded = [number for number, line in enumerate(lines, start=1) if line.strip() not in ("", line)]
        if padded:
            raise UserIdError(
                f"There are blanks around the ids in {some_rows(padded).replace('row', 'line', 1)} of {path}. Ids are compared as they are "
                "written, so each would be another user than the same without. Remove them; if they belong to the ids, give these with --users."
            )
    if not user_ids:
        raise ConfigError("No users came; give --users ID [ID ...], or --users_file FILE with an id per line.")
    directory = _directory(args.model_name_or_path)
    model, _ = load_reward_model(directory, **loading_arguments(args))
    before = len(read_config(directory).users)
    rows = add(model, user_ids)
    model.save_pretrained(directory)
    new = len({row for row in rows if row >= before})
    print(
        f"{new} new users, {len(set(rows)) - new} known already; they start as the common model. Saved in {directory}"
    )


def fit_users(args: Namespace) -> None:
    """Fit newcomers to their first answers and save the adapter; with `args.report_dir`, write the table.

    Args:
        args (`argparse.Namespace`):
            The arguments of `trl-sharelora fit-users`.
    """
    dataset = load_preferences(args.dataset_name, split=args.dataset_split)
    result = fit(
        _directory(args.model_name_or_path),
        dataset,
        method=args.method,
        user_column=args.user_column,
        refit=args.refit,
        spread=UserSpread.load(args.spread_file) if args.spread_file else None,
        batch_size=args.batch_size,
        max_length=args.max_length,
        **loading_arguments(args),
    )
    print(result)
    if args.report_dir:
        path = Path(args.report_dir, "new_users.csv")
        path.parent.mkdir(parents=True, exist_ok=True)
        result.table.to_csv(path, index=False)
        print(f"The whole table is in {path}")
    print(f"Saved in {args.model_name_or_path}")


def shrink_users(args: Namespace) -> None:
    """Shrink every user's own part as far as all users together say, and save the adapter.

    Args:
        args (`argparse.Namespace`):
            The arguments of `trl-sharelora shrink-users`.
    """
    validation = None
    if args.validation_split:
        validation = load_preferences(args.dataset_name, split=args.validation_split)
    directory = _directory(args.model_name_or_path)
    result = shrink(
        directory,
        load_preferences(args.dataset_name, split=args.dataset_split),
        validation=validation,
        scale=args.scale,
        steps=args.steps,
        text_effects=args.text_effects,
        user_column=args.user_column,
        batch_size=args.batch_size,
        max_length=args.max_length,
        output_dir=args.output_dir,
        **loading_arguments(args),
    )
    print(result)
    if args.spread_file:
        print(f"The prior for newcomers is in {result.spread.save(args.spread_file)}")
    print(f"Saved in {args.output_dir or directory}")


def _directory(path: str) -> str:
    if not Path(path).is_dir():
        raise ConfigError(
            f"{path!r} is no directory here; the adapter is changed and saved again, so download it first (one from the hub too)."
        )
    return path
