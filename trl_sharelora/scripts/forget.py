"""`trl-sharelora forget`: a user leaves a saved adapter, its checkpoints and its tables."""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

from ..errors import UserIdError
from ..forget import forget_user
from ..users import Pseudonym
from .confidence import loading_arguments


def forget(args: Namespace) -> None:
    """Forget `args.user` of the adapter in `args.adapter` and print what was done.

    Args:
        args (`argparse.Namespace`):
            The arguments of `trl-sharelora forget`.

    Raises:
        UserIdError: not exactly one of `user` and `pseudonym` is given.
    """
    if (args.user is None) == (args.pseudonym is None):
        raise UserIdError(
            "One user is forgotten at a time; give --user ID, or --pseudonym NAME of a pseudonymous adapter."
        )
    measuring: dict[str, Any] = {}
    if args.report_influence:
        measuring = {
            "user_column": args.user_column,
            "batch_size": args.batch_size,
            "max_length": args.max_length,
            **loading_arguments(args),
        }
    report = forget_user(
        args.adapter,
        Pseudonym(args.pseudonym) if args.user is None else args.user,
        report_influence=args.report_influence,
        key=args.user_key_file,
        **measuring,
    )
    print(report)
    if args.influence_output and report.influence is not None:
        path = Path(args.influence_output)
        path.write_text(json.dumps(report.influence.as_dict(), indent=2) + "\n", encoding="utf-8")
        print(f"The influence is in {path}")
