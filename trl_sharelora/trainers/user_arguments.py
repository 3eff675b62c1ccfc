"""What the configuration of every personalised trainer adds to its TRL parent, and what all of them refuse."""

import math
import os
from dataclasses import dataclass, field, fields
from typing import Any

from transformers.training_args import ParallelMode

from ..errors import ConfigError, UnsupportedError
from ..sharelora.routing import UNSEEN
from .sharding import USER_SHARDING


# The optimisers whose step ShareLoraAdamW is; another one would treat the bank as one big parameter.
OPTIMIZERS = ("adamw_torch", "adamw_torch_fused")


def deepspeed_message(came: str) -> str:
    """Why DeepSpeed is refused, and what to do.

    Args:
        came (`str`):
            What asks for it.
    """
    return (
        f"DeepSpeed was asked for ({came}) and is not supported, at any ZeRO stage: its engine clips and steps by itself, so it "
        "would shard the users' rows and their optimiser and move users who had no data. Use DDP: accelerate launch "
        "--config_file accelerate_configs/multi_gpu.yaml, or trl-sharelora reward --accelerate_config multi_gpu. If the base does "
        "not fit on one GPU, quantise it (load_in_4bit or load_in_8bit)."
    )


def refuse_deepspeed(deepspeed: Any = None) -> None:
    """Refuse a run with DeepSpeed, installed or not.

    Args:
        deepspeed (`str` or `dict`, *optional*):
            `TrainingArguments.deepspeed`.

    Raises:
        UnsupportedError: it is given, or `accelerate launch` was started with DeepSpeed.
    """
    if deepspeed:
        what = repr(deepspeed) if isinstance(deepspeed, str) else f"a {type(deepspeed).__name__}"
        raise UnsupportedError(deepspeed_message(f"deepspeed={what}"))
    # what `accelerate launch` sets, as transformers reads it
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() in ("1", "true", "yes", "y", "t", "on"):
        stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE")
        file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
        detail = f", ZeRO stage {stage}" if stage else ""
        detail += f", {file}" if file not in (None, "None") else ""
        raise UnsupportedError(deepspeed_message(f"ACCELERATE_USE_DEEPSPEED in the environment{detail}"))


def refuse_fsdp(args: Any) -> None:
    """Refuse FSDP for a policy, which nobody has tested with personal parameters.

    Args:
        args ([`~transformers.TrainingArguments`]):
            Of the trainer.

    Raises:
        UnsupportedError: it is asked for, there or by `accelerate launch`.
    """
    if args.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true"):
        raise UnsupportedError(
            "FSDP was asked for; it is tested for the reward model only. A policy generates, and computes its reference beside itself, "
            "through other paths of FSDP. Use DDP (accelerate_configs/multi_gpu.yaml) with an 8-bit or 4-bit base."
        )


def refuse_data_parallel(args: Any) -> None:
    """Refuse `nn.DataParallel`, which the Trainer uses when several GPUs are visible and nothing has started processes.

    Args:
        args ([`~transformers.TrainingArguments`]):
            Of the trainer.

    Raises:
        UnsupportedError: the model would be wrapped in `nn.DataParallel`.
    """
    if args.n_gpu > 1 and args.parallel_mode == ParallelMode.NOT_DISTRIBUTED:
        raise UnsupportedError(
            f"{args.n_gpu} GPUs are visible to one process, which would train with nn.DataParallel: it splits each batch among "
            "threads that share one route, so rows would be given to wrong users. Start one process per GPU (accelerate launch "
            "--config_file accelerate_configs/multi_gpu.yaml, or trl-sharelora reward --accelerate_config multi_gpu), or show "
            "one GPU only (CUDA_VISIBLE_DEVICES=0)."
        )


@dataclass
class UserArguments:
    r"""
    What concerns the users, in the configuration of every personalised trainer; goes before the TRL config in a class
    statement.

    Parameters:
        > Parameters that control the users

        user_column (`str`, *optional*, defaults to `"user_id"`):
            Column of the datasets that names the user of a row.
        unseen (`str`, *optional*, defaults to `"raise"`):
            What an evaluation row of a user without training data gets: `"raise"` an error before anything is computed,
            `"common"` the common model (D = 0), counted and logged.

        > Parameters that control the training

        learning_rate_shared (`float`, *optional*):
            Learning rate of what all users share: B, the head and, if trained, A_0. `learning_rate` is then that of the
            users' own part. By default the same, as in the paper.
        user_weight_decay (`float`, *optional*, defaults to `0.0`):
            Decoupled weight decay of the users' own moves D_u, applied when a user is visited. It shrinks a user towards the
            common model. Off by default, as in the authors' code; `weight_decay` is that of the shared part.

        user_norm_bound (`float`, *optional*):
            The constraint ||dTheta_u||_F <= B of the paper's (3.3), on the user's own move s B D_u over all adapted modules (what is
            common, s B A_0, is not bounded), by projection: after a step a visited user who is beyond it is scaled back, and at the end of a
            training all users of a resident bank. Off by default: the paper's experiments and the authors' code have none.
        user_ridge (`float`, *optional*, defaults to `0.0`):
            The same as a penalty, `user_ridge / 2 * ||s B D_u||_F^2`, in an implicit step per visit. Unlike `user_weight_decay`, which
            shrinks the entries of D_u, it shrinks what they do to the model.

        user_sharding (`str`, *optional*, defaults to `"union"`):
            With several processes. `"union"`: any sampler; every process keeps the users of all processes' batches and their
            gradients are averaged. `"owner"`: each user belongs to one process, which gets all of his comparisons, balanced by
            their number; nothing of a user's own part travels. Needs a bank in a store. By default `"union"`, because it trains on
            the same batches as one process.

    > [!NOTE]
    > These parameters have default values different from TRL's:
    > - `ddp_find_unused_parameters`: Defaults to `False`; every parameter has a gradient in every step, and `True`
    >   breaks reentrant gradient checkpointing.
    """

    user_column: str = field(
        default="user_id", metadata={"help": "Column of the datasets that names the user of a row."}
    )
    unseen: str = field(
        default="raise",
        metadata={
            "help": "What an evaluation row of a user without training data gets: 'raise' an error before anything is "
            "computed (nothing is guessed), 'common' the common model (D = 0), counted and logged.",
            "choices": list(UNSEEN),
        },
    )
    learning_rate_shared: float | None = field(
        default=None,
        metadata={
            "help": "Learning rate of what all users share (B, the head and, if trained, A_0). By default that of the users' "
            "own part, `learning_rate`, as in the paper."
        },
    )
    user_weight_decay: float = field(
        default=0.0,
        metadata={
            "help": "Decoupled weight decay of the users' own moves, applied when a user is visited; shrinks towards the common "
            "model. Off by default, as in the authors' code."
        },
    )
    user_norm_bound: float | None = field(
        default=None,
        metadata={
            "help": "Bound on the Frobenius norm of what a user's own move adds to the weights, (3.3) of the paper, by projection. Off by "
            "default, as in the paper's experiments; with few comparisons per user unconstrained fits blow up (docs/paper.md)."
        },
    )
    user_ridge: float = field(
        default=0.0,
        metadata={"help": "Ridge on the same norm instead of a bound. Off by default, as in the paper's experiments."},
    )
    user_sharding: str = field(
        default="union",
        metadata={
            "help": "With several processes: 'union', every process keeps the users of all batches and their gradients are averaged "
            "(the same batches as one process); 'owner', each user belongs to one process and nothing of his travels.",
            "choices": list(USER_SHARDING),
        },
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False,
        metadata={
            "help": "Every parameter has a gradient in every step; True breaks reentrant gradient checkpointing."
        },
    )

    def __post_init__(self):
        refuse_deepspeed(self.deepspeed)  # the parent imports DeepSpeed, or fails to
        super().__post_init__()
        self.check_user_arguments()

    def check_user_arguments(self) -> None:
        """Raise a [`ConfigError`] for a value that is unknown or out of its range."""
        if self.unseen not in UNSEEN:
            raise ConfigError(f"unseen={self.unseen!r} is unknown; one of {', '.join(map(repr, UNSEEN))} is needed.")
        if self.user_sharding not in USER_SHARDING:
            raise ConfigError(
                f"user_sharding={self.user_sharding!r} is unknown; one of {', '.join(map(repr, USER_SHARDING))} is needed."
            )
        if not isinstance(self.user_column, str) or not self.user_column:
            raise ConfigError(f"user_column={self.user_column!r}; the name of a column is needed (usually 'user_id').")
        rate = self.learning_rate_shared
        if rate is not None and not (math.isfinite(rate) and rate >= 0):
            raise ConfigError(f"learning_rate_shared={rate!r}; a finite number of at least 0 is needed, or None.")
        if not (math.isfinite(self.user_weight_decay) and self.user_weight_decay >= 0):
            raise ConfigError(
                f"user_weight_decay={self.user_weight_decay!r}; a finite number of at least 0 is needed."
            )
        bound = self.user_norm_bound
        if bound is not None and not (math.isfinite(bound) and bound > 0):
            raise ConfigError(f"user_norm_bound={bound!r}; a finite number above 0 is needed, or None.")
        if not (math.isfinite(self.user_ridge) and self.user_ridge >= 0):
            raise ConfigError(f"user_ridge={self.user_ridge!r}; a finite number of at least 0 is needed.")
        if self.optim not in OPTIMIZERS:
            raise ConfigError(
                f"optim={getattr(self.optim, 'value', self.optim)!r}; the users' rows are stepped one by one by AdamW, so one of "
                f"{', '.join(map(repr, OPTIMIZERS))} is needed. Another optimiser would move users who have no data."
            )


def with_user_arguments(args: Any) -> Any:
    """The arguments of a TRL trainer, with what concerns the users at its defaults where it is not there.

    Args:
        args ([`~transformers.TrainingArguments`]):
            One of this package's configs, or TRL's own (a `DPOConfig`, say), to which the missing fields are added.
    """
    if not isinstance(args, UserArguments):
        refuse_deepspeed(args.deepspeed)
        for item in fields(UserArguments):
            if not hasattr(args, item.name):
                setattr(args, item.name, item.default)
        if args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = False
        UserArguments.check_user_arguments(args)
    return args


def default_output_dir(model: Any, method: str) -> str:
    """TRL's default of `output_dir`: the model's name and the method's.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]):
            As the trainer gets it.
        method (`str`):
            `"DPO"`, `"RLOO"`, ....
    """
    name = model if isinstance(model, str) else model.config._name_or_path
    return f"{name.split('/')[-1]}-{method}"
