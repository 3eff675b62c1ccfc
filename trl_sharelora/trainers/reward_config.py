"""ShareLoraRewardConfig: TRL's RewardConfig and what concerns the users."""

import math
from dataclasses import dataclass, field

from trl import RewardConfig

from ..errors import ConfigError
from ..sharelora.routing import UNSEEN


# The optimisers whose step ShareLoraAdamW is; another one would treat the bank as one big parameter.
OPTIMIZERS = ("adamw_torch", "adamw_torch_fused")


@dataclass
class ShareLoraRewardConfig(RewardConfig):
    r"""
    Configuration of the [`ShareLoraRewardTrainer`].

    Everything of [`~trl.RewardConfig`] with its defaults, and:

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

    > [!NOTE]
    > These parameters have default values different from [`~trl.RewardConfig`]:
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
    ddp_find_unused_parameters: bool | None = field(
        default=False,
        metadata={
            "help": "Every parameter has a gradient in every step; True breaks reentrant gradient checkpointing."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        if self.unseen not in UNSEEN:
            raise ConfigError(f"unseen={self.unseen!r} is unknown; one of {', '.join(map(repr, UNSEEN))} is needed.")
        if not isinstance(self.user_column, str) or not self.user_column:
            raise ConfigError(f"user_column={self.user_column!r}; the name of a column is needed (usually 'user_id').")
        rate = self.learning_rate_shared
        if rate is not None and not (math.isfinite(rate) and rate >= 0):
            raise ConfigError(f"learning_rate_shared={rate!r}; a finite number of at least 0 is needed, or None.")
        if not (math.isfinite(self.user_weight_decay) and self.user_weight_decay >= 0):
            raise ConfigError(
                f"user_weight_decay={self.user_weight_decay!r}; a finite number of at least 0 is needed."
            )
        if self.optim not in OPTIMIZERS:
            raise ConfigError(
                f"optim={getattr(self.optim, 'value', self.optim)!r}; the users' rows are stepped one by one by AdamW, so one of "
                f"{', '.join(map(repr, OPTIMIZERS))} is needed. Another optimiser would move users who have no data."
            )
