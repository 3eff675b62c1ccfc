"""Train a personalised policy with DPO. Mirrors TRL's script of that name; the differences are in `policy.py`.

```bash
trl-sharelora dpo --config dpo.yaml
accelerate launch --multi_gpu --num_processes 4 -m trl_sharelora.scripts.dpo --config dpo.yaml
```
"""

import argparse
from typing import Any

from .policy import make_policy_parser, train_policy


def main(*arguments: Any) -> None:
    """Train, save, evaluate; the arguments are those of [`~trl_sharelora.scripts.policy.train_policy`] after the first."""
    from ..trainers.dpo import ShareLoraDPOTrainer

    train_policy(ShareLoraDPOTrainer, *arguments)


def make_parser(subparsers: argparse._SubParsersAction | None = None, prog: str | None = None) -> Any:
    """The parser of this script, as a subparser or on its own."""
    from ..trainers.dpo import ShareLoraDPOConfig

    return make_policy_parser("dpo", ShareLoraDPOConfig, subparsers, prog)


if __name__ == "__main__":
    from .launch import parse_arguments

    main(*parse_arguments(make_parser()))
