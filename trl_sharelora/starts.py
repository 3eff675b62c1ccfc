"""Start all users from one plain LoRA: the exact copy of Algorithm 2 of P-ShareLoRA, step (b), into an adapter or as a new one.

"Shared factor <- global one, every user's factor <- a copy of the global one", and the trained head with them. A_u is held as
A_0 + D_u, so the copy is A_0 := A with all D_u = 0.
"""

import logging
import os
import re
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.utils.other import ModulesToSaveWrapper
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from .errors import ConfigError, MethodError
from .export import WEIGHTS_FILE
from .scoring import default_device
from .sharelora.bank import SlotBank
from .sharelora.config import ShareLoraConfig
from .sharelora.head import HEAD_MOVES, PersonalHead
from .sharelora.layer import ShareLoraLayer
from .sharelora.routing import get_router


logger = logging.getLogger(__name__)

_FACTOR = re.compile(r"(.+)\.lora_(A|B)\.weight")
# what a LoRA may have beside two factors per module, and these layers do not
_STARTS = ("gaussian", "eva", "orthogonal", "true", "false")  # draws of A and B that leave the base as it is
_EXTRAS = ("use_dora", "lora_bias", "rank_pattern", "alpha_pattern", "trainable_token_indices", "layer_replication")


def from_lora(
    lora: str | os.PathLike,
    users: Any,
    *,
    share: str = "B",
    base: nn.Module | None = None,
    processing_class: Any = None,
    check_base: bool = True,
    quantization_config: Any = None,
    model_init_kwargs: dict[str, Any] | None = None,
    device: torch.device | str | None = None,
    **config: Any,
) -> PeftModel:
    """A plain LoRA as a ShareLoRA adapter in which every user is that LoRA, until [`shrink_users`] or a training moves him.

    Args:
        lora (`str` or `os.PathLike`):
            Directory of a plain LoRA as PEFT saves it, of a reward model (with its head) or a policy.
        users (`list[str]` or [`~trl_sharelora.users.UserRegistry`]):
            Who gets a row.
        share (`str`, *optional*, defaults to `"B"`):
            See [`ShareLoraConfig`].
        base (`~torch.nn.Module`, *optional*):
            The model that the LoRA was trained on; it is adapted in place. By default it is loaded by the name in the LoRA's config.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Whose pad token the base's config gets: a decoder's reward is read before the padding. By default the tokenizer saved with the LoRA,
            if one is.
        check_base (`bool`, *optional*, defaults to `True`):
            See [`warm_start`].
        quantization_config, model_init_kwargs, device (*optional*):
            How the base is loaded, as in [`~trl_sharelora.scoring.load_reward_model`].
        **config:
            More of [`ShareLoraConfig`]'s arguments: `personal_head`, `bank`, ...

    Raises:
        MethodError: it is no plain LoRA, or one that cannot be copied exactly, or of another base; see [`warm_start`].
        ConfigError: neither a reward model nor a policy, and no `base`; or arguments that do not fit each other.

    Example:

    ```python
    model = from_lora("rm-for-all", users=sorted(set(train["user_id"])))
    shrink_users(model, train, tokenizer, validation=held_out)
    model.save_pretrained("rm-per-user")
    ```
    """
    lora = Path(lora)
    found = _read_lora(lora)
    if base is None:
        loaders = {"SEQ_CLS": AutoModelForSequenceClassification, "CAUSAL_LM": AutoModelForCausalLM}
        loader = loaders.get(str(found.task_type))
        if loader is None or not found.base_model_name_or_path:
            raise ConfigError(
                f"The LoRA in {lora} is for task_type={found.task_type!r} of base {found.base_model_name_or_path!r}; a reward model (SEQ_CLS) or a "
                "policy (CAUSAL_LM) that names its base can be loaded. Load the base yourself and give base=model."
            )
        options: dict[str, Any] = {
            "dtype": "float32",
            "device_map": {"": default_device() if device is None else device},
        }
        options |= {"num_labels": 1} if found.task_type == "SEQ_CLS" else {}
        base = loader.from_pretrained(
            found.base_model_name_or_path,
            quantization_config=quantization_config,
            **({"revision": found.revision or "main"} | options | (model_init_kwargs or {})),
        )
    alike = {
        name: getattr(found, name)
        for name in (
            "task_type",
            "r",
            "lora_alpha",
            "lora_dropout",
            "use_rslora",
            "fan_in_fan_out",
            "target_modules",
            "exclude_modules",
            "layers_to_transform",
            "layers_pattern",
            "modules_to_save",
            "revision",
        )
    }
    alike["target_modules"] = _plain(found.target_modules)
    alike["exclude_modules"] = _plain(found.exclude_modules)
    model = get_peft_model(base, ShareLoraConfig(**(alike | {"share": share, "users": users} | config)))
    try:
        warm_start(model, lora, check_base=check_base)
    except MethodError:
        model.unload()  # `base` is as it came
        raise
    if processing_class is None and (lora / "tokenizer_config.json").is_file():
        processing_class = AutoTokenizer.from_pretrained(lora)
    if processing_class is not None:
        model.config.get_text_config().pad_token_id = processing_class.pad_token_id
    return model.eval()


def _plain(names: Any) -> Any:
    return sorted(names) if isinstance(names, set) else names


def warm_start(model: Any, lora: str | os.PathLike, adapter_name: str = "default", check_base: bool = True) -> None:
    """Copy a plain LoRA into a ShareLoRA adapter that nobody has trained yet: every user starts as that LoRA, exactly.

    What each form of sharing takes over: `share="B"`: B and A_0; `"A"`: A and B_0; `"AB"` and `"diagonal"`: A and B (the core starts as
    the identity); `"none"`: A_0 and B_0, so that each user goes on from the common LoRA by himself.

    Args:
        model ([`~peft.PeftModel`]):
            With the ShareLoRA adapter.
        lora (`str` or `os.PathLike`):
            Directory of a plain LoRA as PEFT saves it: of the same rank, scaling, modules and base; a reward model with its score head.
        adapter_name (`str`, *optional*, defaults to `"default"`):
            Which adapter of the model.
        check_base (`bool`, *optional*, defaults to `True`):
            Whether the bases' names must agree (their last part: a local copy may lie elsewhere). `False`: the caller vouches for it.

    Raises:
        MethodError: it is no plain LoRA, of another rank, scaling, modules, shapes or base, or not finite, or lacks the head; or users of
            the model have moved already. Nothing has been copied then.
    """
    config = getattr(model, "peft_config", {}).get(adapter_name)
    if not isinstance(config, ShareLoraConfig):
        raise MethodError(
            f"{type(model).__name__} has no ShareLoRA adapter {adapter_name!r}; make one with get_peft_model first."
        )
    lora = Path(lora)
    lora_config = _read_config(lora, config, check_base)
    layers = {
        name: m for name, m in model.named_modules() if isinstance(m, ShareLoraLayer) and adapter_name in m.share
    }
    _check_nobody_has_moved(model, layers, adapter_name)
    state = load_file(lora / WEIGHTS_FILE)
    factors: dict[str, dict[str, torch.Tensor]] = {}
    rest = {}
    for key, tensor in state.items():
        match = _FACTOR.fullmatch(key)
        if match is None:
            rest[key] = tensor
        else:
            factors.setdefault(match[1], {})[match[2]] = tensor
    _check_modules(lora, layers, factors, adapter_name)
    targets = _saved_modules(model, adapter_name, lora, lora_config, rest)
    bad = sorted(key for key, tensor in state.items() if not tensor.isfinite().all())
    if bad:
        raise MethodError(
            f"{lora / WEIGHTS_FILE} holds NaN or infinite numbers ({bad[0]}, {len(bad)} tensors in all): the training of this LoRA has "
            "diverged, or the file is damaged. Take an earlier checkpoint of it."
        )
    with torch.no_grad():
        for name, layer in layers.items():
            share, common = layer.share[adapter_name], layer.sharelora_common[adapter_name].weight
            A = common if share in ("B", "none") else layer.sharelora_A[adapter_name].weight
            B = common if share == "A" else layer.sharelora_B[adapter_name].weight
            A.copy_(factors[name]["A"])
            B.copy_(factors[name]["B"])
        for target, tensor in targets:
            target.copy_(tensor)
    logger.info("%d modules of %d users start from %s.", len(layers), len(config.users), lora)


def _read_lora(lora: Path) -> LoraConfig:
    if not (lora / "adapter_config.json").is_file() or not (lora / WEIGHTS_FILE).is_file():
        raise MethodError(
            f"{lora} is not the directory of a saved LoRA: adapter_config.json and {WEIGHTS_FILE} are needed. For a run of TRL's trainer "
            "give its output_dir or one of its checkpoint-* folders."
        )
    found = PeftConfig.from_pretrained(str(lora))
    if not isinstance(found, LoraConfig):
        what = (
            "one user can be exported to a plain LoRA with export_user" if isinstance(found, ShareLoraConfig) else ""
        )
        raise MethodError(
            f"{lora} holds a {type(found).__name__}; a plain LoRA (LoraConfig) is needed{'; ' if what else ''}{what}."
        )
    extras = [name for name in _EXTRAS if getattr(found, name, None)]
    start = found.init_lora_weights
    if isinstance(start, str) and start.lower() not in _STARTS:
        raise MethodError(
            f"The LoRA in {lora} was made with init_lora_weights={start!r}, for which PEFT changes the base's weights too; its factors fit that "
            "base only. Convert it to an ordinary LoRA first (PEFT's path_initial_model_for_weight_conversion)."
        )
    if extras or found.bias != "none":
        raise MethodError(
            f"The LoRA in {lora} has {', '.join(extras) or f'bias={found.bias!r}'}, which ShareLoRA does not have; it could not be copied "
            "exactly. Train a plain one."
        )
    return found


def _read_config(lora: Path, config: ShareLoraConfig, check_base: bool) -> LoraConfig:
    found = _read_lora(lora)
    scaling = found.lora_alpha / (found.r**0.5 if found.use_rslora else found.r)
    if found.r != config.r or abs(scaling - config.scaling) > 1e-9 * scaling:
        raise MethodError(
            f"The LoRA in {lora} has rank {found.r} and scaling {scaling:g}, the adapter rank {config.r} and scaling {config.scaling:g}; a "
            f"copy is exact only if both agree. Use r={found.r}, lora_alpha={found.lora_alpha}, use_rslora={found.use_rslora}."
        )
    bases = [str(one.base_model_name_or_path or "") for one in (found, config)]
    if check_base and all(bases) and bases[0] != bases[1]:
        if Path(bases[0]).name != Path(bases[1]).name:
            raise MethodError(
                f"The LoRA in {lora} was trained on {bases[0]!r}, this model is {bases[1]!r}: its factors mean nothing there. Load that "
                "base, or say that the two are the same with warm_start(..., check_base=False)."
            )
        logger.warning("The LoRA was trained on %r, this model is %r; taken for the same.", *bases)
    return found


def _check_nobody_has_moved(model: Any, layers: dict[str, ShareLoraLayer], adapter_name: str) -> None:
    working_set = get_router(model).working_sets.get(adapter_name)
    if working_set is not None:
        working_set.flush()
        moved = bool(working_set.store.rows())
    else:
        banks = [layer.bank(adapter_name) for layer in layers.values()]
        moved = any(bool(bank.weight.any()) for bank in banks if not isinstance(bank, SlotBank))
        moved |= any(bool(m.moves.weight.any()) for m in model.modules() if isinstance(m, PersonalHead))
    if moved:
        raise MethodError(
            "Users of this adapter have moves of their own already (it was trained, or made with init_users='independent'); a warm start "
            "gives all of them the common factor and would make their moves meaningless. Start from a new adapter."
        )


def _check_modules(
    lora: Path, layers: dict[str, ShareLoraLayer], factors: dict[str, dict[str, torch.Tensor]], adapter_name: str
) -> None:
    missing, surplus = sorted(set(layers) - set(factors)), sorted(set(factors) - set(layers))
    if missing or surplus:
        parts = [f"{len(missing)} modules of this adapter are not in it ({missing[0]}, ...)"] if missing else []
        parts += [f"{len(surplus)} of its modules are not adapted here ({surplus[0]}, ...)"] if surplus else []
        raise MethodError(
            f"The LoRA in {lora} adapts other modules: {'; '.join(parts)}. Give the adapter the same target_modules, and the same base."
        )
    for name, layer in layers.items():
        found = {factor: tuple(tensor.shape) for factor, tensor in factors[name].items()}
        r = layer.r[adapter_name]
        wanted = {"A": (r, layer.in_features), "B": (layer.out_features, r)}
        if found != wanted:
            raise MethodError(
                f"{name}: the LoRA in {lora} has factors of shapes {found}, this model needs {wanted}. It is of another base."
            )


def _saved_modules(
    model: Any, adapter_name: str, lora: Path, lora_config: LoraConfig, rest: dict[str, torch.Tensor]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Where the head and other modules trained in full go; pairs of the tensor here and the one to copy into it."""
    pairs, used = [], set()
    for name, module in model.named_modules():
        if not isinstance(module, ModulesToSaveWrapper) or adapter_name not in module.modules_to_save:
            continue
        own: nn.Module = module.modules_to_save[adapter_name]
        for key, tensor in {**dict(own.named_parameters()), **dict(own.named_buffers())}.items():
            if f".{key}".endswith(HEAD_MOVES):
                continue
            source = rest.get(f"{name}.{key}")
            if source is None or source.shape != tensor.shape:
                came = "not in it" if source is None else f"of shape {tuple(source.shape)}, not {tuple(tensor.shape)}"
                raise MethodError(
                    f"{name}.{key} is trained in full here and in the LoRA in {lora} {came}. A reward model's head must come along: "
                    "train the LoRA with task_type='SEQ_CLS' (and the same modules_to_save)."
                )
            pairs.append((tensor, source))
            used.add(f"{name}.{key}")
    unused = sorted(set(rest) - used)
    if unused:
        raise MethodError(
            f"The LoRA in {lora} brings {', '.join(unused[:3])}{', ...' * (len(unused) > 3)}, which has no place here. Give the adapter "
            f"modules_to_save={lora_config.modules_to_save}."
        )
    return pairs
