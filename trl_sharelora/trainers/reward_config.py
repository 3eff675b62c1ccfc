"""ShareLoraRewardConfig: TRL's RewardConfig and what concerns the users."""

from dataclasses import dataclass

from trl import RewardConfig

from .user_arguments import UserArguments


@dataclass
class ShareLoraRewardConfig(UserArguments, RewardConfig):
    r"""
    Configuration of the [`ShareLoraRewardTrainer`].

    Everything of [`~trl.RewardConfig`] with its defaults, and the fields of [`UserArguments`].
    """
