"""One user as an ordinary LoRA adapter, which PEFT, vLLM and others load without this package.

For one user the layer *is* a LoRA: A_u = A_0 + D_u and B. The export bakes the scaling into B and writes `lora_alpha = r`, one
rank for all modules and no patterns, because servers read only those fields.
"""

import os
import re
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from .errors import AdapterMismatchError, ConfigError
from .sharelora.config import PERSONAL_FACTOR, ShareLoraConfig
from .sharelora.head import HEAD_MOVES
from .sharelora.layer import lora_factors
from .sharelora.model import VALUE_HEAD
from .sharelora.routing import get_router
from .sharelora.store import BANK_FOLDER, read_row


WEIGHTS_FILE = "adapter_model.safetensors"
# <module>.sharelora_<factor>.weight, as PEFT saves them
_FACTOR = re.compile(r"(.+)\.sharelora_(A|B|C|common)\.weight")


def export_user(model_or_dir: PeftModel | str | Path, user_id: str, output_dir: str | Path) -> Path:
    """Write one user as a plain LoRA adapter.

    Args:
        model_or_dir ([`~peft.PeftModel`], `str` or `Path`):
            A model with a ShareLoRA adapter, or the directory of a saved one (the base is not needed then).
        user_id (`str`):
            Whose.
        output_dir (`str` or `Path`):
            Where `adapter_config.json` and `adapter_model.safetensors` go. No user id is written into them.

    Returns:
        `Path`: `output_dir`.

    Raises:
        UnknownUserError: the user is not in the registry; nothing is written.
        ConfigError: the model has no ShareLoRA adapter.
        AdapterMismatchError: a tensor is missing, or there are not as many rows as users; nothing is written.

    Example:

    ```python
    export_user("rm", "ann", "rm-ann")
    model = PeftModel.from_pretrained(base, "rm-ann")  # an ordinary LoRA
    ```
    """
    if isinstance(model_or_dir, str | Path):
        config = ShareLoraConfig.from_pretrained(str(model_or_dir))
        weights = Path(model_or_dir, WEIGHTS_FILE)
        if not weights.is_file():
            raise AdapterMismatchError(
                f"No {WEIGHTS_FILE} in {model_or_dir}: the adapter's tensors are missing. Save it again with save_pretrained, "
                "which writes safetensors."
            )
        state = load_file(weights)
    else:
        config = getattr(model_or_dir, "peft_config", {}).get(getattr(model_or_dir, "active_adapter", None))
        if not isinstance(config, ShareLoraConfig):
            raise ConfigError(
                f"{type(model_or_dir).__name__} has no active ShareLoRA adapter; give a PeftModel with one, or its directory."
            )
        state = get_peft_model_state_dict(model_or_dir, adapter_name=model_or_dir.active_adapter)
    row = config.users.index([user_id])[0]

    exported: dict[str, torch.Tensor] = {}
    modules: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in state.items():
        if f".{VALUE_HEAD}." in key:
            continue  # a critic is of the training, not of the policy, and a plain base has no place for it
        match = _FACTOR.fullmatch(key)
        if match is None:
            exported[key] = tensor  # head, other modules_to_save, trained tokens: shared by all users
        else:
            modules.setdefault(match[1], {})[match[2]] = tensor
    if config.personal_head:
        for key in [key for key in exported if key.endswith(HEAD_MOVES)]:
            own_heads = exported.pop(key)
            head = key.removesuffix(HEAD_MOVES) + ".weight"
            exported[head] = exported[head] + _row_of(own_heads, key, config, row)
    if config.bank in ("ram", "mmap"):
        # his record only, however many users there are
        if isinstance(model_or_dir, str | os.PathLike):
            moves = read_row(Path(model_or_dir, BANK_FOLDER), row)
        else:
            moves = get_router(model_or_dir).working_sets[model_or_dir.active_adapter].moves(row)
        for name, move in moves.items():
            factors = modules.setdefault(f"base_model.model.{name}", {})
            factors[PERSONAL_FACTOR[config.share]] = move.unsqueeze(0).to(next(iter(factors.values()), move).device)
    for module, factors in modules.items():
        down, up = _user_factors(module, factors, config, row)
        exported[f"{module}.lora_A.weight"] = down
        exported[f"{module}.lora_B.weight"] = config.scaling * up

    lora = LoraConfig(
        r=config.r,
        lora_alpha=config.r,  # scaling 1: it is in B
        target_modules=_target_modules(list(modules), config),
        modules_to_save=[name for name in dict.fromkeys(config.modules_to_save or ()) if name != VALUE_HEAD] or None,
        trainable_token_indices=config.trainable_token_indices,
        layers_to_transform=None,
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        fan_in_fan_out=config.fan_in_fan_out,
        inference_mode=True,
    )
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    tensors = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in exported.items()}
    save_file(tensors, output_dir / WEIGHTS_FILE, metadata={"format": "pt"})
    lora.save_pretrained(str(output_dir))
    return output_dir


def _user_factors(
    module: str, factors: dict[str, torch.Tensor], config: ShareLoraConfig, row: int
) -> tuple[torch.Tensor, torch.Tensor]:
    personal = PERSONAL_FACTOR[config.share]
    missing = {"A", "B", "common", personal} - set(factors)
    if missing:
        raise AdapterMismatchError(
            f"{module} lacks {', '.join('sharelora_' + name for name in sorted(missing))}; the adapter's file is incomplete. Take it "
            "from a backup."
        )
    moves = factors[personal]
    if config.bank in ("ram", "mmap"):
        return lora_factors(config.share, factors["A"], factors["B"], factors["common"], moves[0])
    move = _row_of(moves, f"{module}.sharelora_{personal}", config, row)
    return lora_factors(config.share, factors["A"], factors["B"], factors["common"], move)


def _row_of(moves: torch.Tensor, name: str, config: ShareLoraConfig, row: int) -> torch.Tensor:
    if len(moves) != len(config.users):
        raise AdapterMismatchError(
            f"{name} has {len(moves)} rows for {len(config.users)} users: the adapter's files are of two different saves. Copy the "
            "whole directory again."
        )
    return moves[row]


def _target_modules(names: list[str], config: ShareLoraConfig) -> Any:
    """The modules as short as they can be named: what was asked for, or the full names where layers were left out."""
    everywhere = config.layers_to_transform is None and config.exclude_modules is None
    if everywhere and isinstance(config.target_modules, set | list):
        return sorted(config.target_modules)
    return sorted(name.removeprefix("base_model.model.") for name in names)
