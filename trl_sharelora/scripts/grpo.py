"""Train a personalised policy with GRPO. Mirrors TRL's script of that name; the differences are in `policy.py`.

```bash
trl-sharelora grpo --config grpo.yaml
accelerate launch --multi_gpu --num_processes 4 -m trl_sharelora.scripts.grpo --config grpo.yaml
```
"""

import argparse
from typing import Any

from .policy import make_policy_parser, train_policy


def main(*arguments: Any) -> None:
    """Train, save, evaluate; the arguments are those of [`~trl_sharelora.scripts.policy.train_policy`] after the first."""
    from ..trainers.grpo import ShareLoraGRPOTrainer

    train_policy(ShareLoraGRPOTrainer, *arguments)


def make_parser(subparsers: argparse._SubParsersAction | None = None, prog: str | None = None) -> Any:
    """The parser of this script, as a subparser or on its own."""
    from ..trainers.grpo import ShareLoraGRPOConfig

    return make_policy_parser("grpo", ShareLoraGRPOConfig, subparsers, prog)


if __name__ == "__main__":
    from .launch import parse_arguments

    main(*parse_arguments(make_parser()))
