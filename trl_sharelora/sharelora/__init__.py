"""The PEFT method: config, layer, model, and its registration."""

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from .bank import ResidentBank, SlotBank, WorkingSet
from .config import ShareLoraConfig, ShareLoraType
from .layer import Linear, ShareLoraLayer
from .model import ShareLoraModel
from .optimizer import ShareLoraAdamW
from .routing import Route, Router, get_router, use_users
from .store import Layout, UserStore


# `peft.utils.register_peft_method` takes members of peft's own closed enum only; it would write these three entries.
PEFT_TYPE_TO_CONFIG_MAPPING[ShareLoraType.SHARELORA] = ShareLoraConfig
PEFT_TYPE_TO_TUNER_MAPPING[ShareLoraType.SHARELORA] = ShareLoraModel
PEFT_TYPE_TO_PREFIX_MAPPING[ShareLoraType.SHARELORA] = ShareLoraModel.prefix

__all__ = [
    "Layout",
    "Linear",
    "ResidentBank",
    "Route",
    "Router",
    "ShareLoraAdamW",
    "ShareLoraConfig",
    "ShareLoraLayer",
    "ShareLoraModel",
    "ShareLoraType",
    "SlotBank",
    "UserStore",
    "WorkingSet",
    "get_router",
    "use_users",
]
