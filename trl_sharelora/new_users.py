"""Give new users to a model that is there already."""

from collections.abc import Iterable
from typing import Any

from .sharelora.config import ShareLoraConfig
from .sharelora.routing import get_router


def add_users(model: Any, user_ids: Iterable[str | int]) -> list[int]:
    """The rows of users, new ones among them; a new user starts as the common model (D = 0) and can be scored and trained at once.

    All other rows stay bit-identical. In a store (`bank="ram"`, `"mmap"`) a new user costs nothing until his first step; a resident
    bank is copied once per call.

    Args:
        model ([`~peft.PeftModel`]):
            With a ShareLoRA adapter. All its ShareLoRA adapters get the users.
        user_ids (`Iterable[str | int]`):
            Ids, known ones too.

    Raises:
        UserIdError: an id is not usable; nobody is added then.
        RoutingError: the model has no ShareLoRA adapter.

    Example:

    ```python
    add_users(model, ["eve"])
    evaluate_users(model, rows_of_eve, processing_class=tokenizer)
    ```
    """
    router = get_router(model)
    rows = router.users.add(user_ids)
    model.base_model.grow_users()
    for config in model.peft_config.values():
        if isinstance(config, ShareLoraConfig):
            config.set_users(
                router.users
            )  # an additional adapter may have come with a registry of its own, equal until now
    return rows
