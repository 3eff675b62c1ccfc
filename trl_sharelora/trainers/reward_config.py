"""ShareLoraRewardConfig: TRL's RewardConfig and what concerns the users."""

from dataclasses import dataclass, field

from trl import RewardConfig

from .user_arguments import UserArguments


@dataclass
class ShareLoraRewardConfig(UserArguments, RewardConfig):
    r"""
    Configuration of the [`ShareLoraRewardTrainer`].

    Everything of [`~trl.RewardConfig`] with its defaults, the fields of [`UserArguments`], and:

    Parameters:
        warm_start (`str`, *optional*):
            Directory of a plain LoRA of the same base, rank and modules, with its head: all users start as that LoRA, exactly
            (Algorithm 2 of P-ShareLoRA, step (b)). See [`~trl_sharelora.starts.warm_start`].
    """

    warm_start: str | None = field(
        default=None,
        metadata={
            "help": "Directory of a plain LoRA of the same base, rank and modules: all users start as that LoRA, as in (G) and (WU) of the "
            "paper. By default the shared factor starts at zero, (SI)."
        },
    )
