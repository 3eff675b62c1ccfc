"""trl_sharelora: personalised reward models and policies on TRL and PEFT, one shared factor and one of each user's own.

Importing this registers the PEFT method, so that saved adapters load; the trainers (and TRL with them) load at first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .errors import ShareLoraError
from .sharelora import ShareLoraConfig, ShareLoraModel, use_users
from .users import UserRegistry


__version__ = "0.1.0"

if TYPE_CHECKING:
    from .confidence import add_comparisons, fit_confidence
    from .doctor import check_data
    from .evaluation import Calibration, PerUserResult, calibrate, evaluate_users
    from .export import export_user
    from .forget import forget_user
    from .importers import import_preferences
    from .new_users import add_users, fit_users, next_comparisons
    from .rewards import RewardEstimate, SampledReferences, UserReward
    from .shrinkage import shrink_users
    from .splits import split_by_comparison, split_by_item, split_by_user
    from .starts import from_lora, warm_start
    from .trainers.dpo import ShareLoraDPOConfig, ShareLoraDPOTrainer
    from .trainers.grpo import ShareLoraGRPOConfig, ShareLoraGRPOTrainer
    from .trainers.methods import train_method
    from .trainers.ppo import ShareLoraPPOConfig, ShareLoraPPOTrainer
    from .trainers.reward import ShareLoraRewardTrainer
    from .trainers.reward_config import ShareLoraRewardConfig
    from .trainers.rloo import ShareLoraRLOOConfig, ShareLoraRLOOTrainer
    from .usage import user_usage

# public name -> module that holds it (PEP 562)
_LAZY = {
    "Calibration": ".evaluation",
    "PerUserResult": ".evaluation",
    "calibrate": ".evaluation",
    "evaluate_users": ".evaluation",
    "add_users": ".new_users",
    "fit_users": ".new_users",
    "next_comparisons": ".new_users",
    "check_data": ".doctor",
    "import_preferences": ".importers",
    "shrink_users": ".shrinkage",
    "split_by_comparison": ".splits",
    "split_by_item": ".splits",
    "split_by_user": ".splits",
    "user_usage": ".usage",
    "export_user": ".export",
    "forget_user": ".forget",
    "from_lora": ".starts",
    "RewardEstimate": ".rewards",
    "SampledReferences": ".rewards",
    "UserReward": ".rewards",
    "add_comparisons": ".confidence",
    "fit_confidence": ".confidence",
    "ShareLoraDPOConfig": ".trainers.dpo",
    "ShareLoraDPOTrainer": ".trainers.dpo",
    "ShareLoraGRPOConfig": ".trainers.grpo",
    "ShareLoraGRPOTrainer": ".trainers.grpo",
    "ShareLoraPPOConfig": ".trainers.ppo",
    "ShareLoraPPOTrainer": ".trainers.ppo",
    "ShareLoraRLOOConfig": ".trainers.rloo",
    "ShareLoraRLOOTrainer": ".trainers.rloo",
    "ShareLoraRewardConfig": ".trainers.reward_config",
    "ShareLoraRewardTrainer": ".trainers.reward",
    "train_method": ".trainers.methods",
    "warm_start": ".starts",
}

__all__ = [
    "Calibration",
    "PerUserResult",
    "RewardEstimate",
    "SampledReferences",
    "ShareLoraConfig",
    "ShareLoraDPOConfig",
    "ShareLoraDPOTrainer",
    "ShareLoraError",
    "ShareLoraGRPOConfig",
    "ShareLoraGRPOTrainer",
    "ShareLoraModel",
    "ShareLoraPPOConfig",
    "ShareLoraPPOTrainer",
    "ShareLoraRLOOConfig",
    "ShareLoraRLOOTrainer",
    "ShareLoraRewardConfig",
    "ShareLoraRewardTrainer",
    "UserRegistry",
    "UserReward",
    "add_comparisons",
    "add_users",
    "calibrate",
    "check_data",
    "evaluate_users",
    "export_user",
    "fit_confidence",
    "fit_users",
    "forget_user",
    "from_lora",
    "import_preferences",
    "next_comparisons",
    "shrink_users",
    "split_by_comparison",
    "split_by_item",
    "split_by_user",
    "train_method",
    "use_users",
    "user_usage",
    "warm_start",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
