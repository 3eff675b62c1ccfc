"""The paper's variants and baselines by name: one flag, the same data, budget and evaluation.

P-ShareLoRA (https://huggingface.co/papers/2503.19201), section 5 and appendix D: Algorithm 2 with its three starts, Algorithms 3 and 4,
Share Rep of Park et al. (https://huggingface.co/papers/2405.00254), and what only the authors' code has.
"""

import copy
import difflib
import gc
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import nn
from transformers import AutoConfig, PreTrainedModel, PrinterCallback, TrainerCallback, TrainerState
from transformers.trainer_utils import get_last_checkpoint
from trl import RewardConfig, RewardTrainer

from ..errors import MethodError
from ..sharelora.config import ShareLoraConfig
from ..sharelora.head import keep_in_float32
from .reward import ShareLoraRewardTrainer
from .reward_config import ShareLoraRewardConfig


logger = logging.getLogger(__name__)

WARM_UP_FOLDER = "warm-up"


@dataclass(frozen=True)
class Method:
    """One way to train reward models of many users.

    Args:
        title (`str`):
            As in the paper's figures.
        source (`str`):
            Where it is from: a section, or the authors' code.
        share (`str`, *optional*):
            Of [`ShareLoraConfig`]; None for one plain LoRA for everybody.
        warm_up (`float`, *optional*, defaults to `0.0`):
            T_w / T: share of all epochs that is one LoRA for everybody, from which all users are then copied.
        second_rate (`float`, *optional*, defaults to `1.0`):
            Learning rate of what follows the warm-up, of the learning rate.
        personal_head (`bool`, *optional*, defaults to `False`):
            Whether the score head is the user's own too.
        common_layers (`float`, *optional*, defaults to `0.0`):
            Share of the layers, from below, that are common and frozen.
    """

    title: str
    source: str
    share: str | None = "B"
    warm_up: float = 0.0
    second_rate: float = 1.0
    personal_head: bool = False
    common_layers: float = 0.0


METHODS = {
    "psharelora-si": Method("PSL(SI)", "section 5: shared B from zero, no warm-up; 3 epochs"),
    # 2 of 3 epochs; then 1.67e-5, a third of 5e-5
    "psharelora-g": Method(
        "PSL(G)", "section 5: 2 + 1 epochs, the second stage at lr/3", warm_up=2 / 3, second_rate=1 / 3
    ),
    # 0.3 of 3 epochs; the second stage's rate is from the authors' code
    "psharelora-wu": Method("PSL(WU)", "section 5 and Algorithm 2: 0.3 + 2.7 epochs", warm_up=0.1),
    "lora-global": Method("LoRA-global", "Algorithm 3: one LoRA for all, TRL's RewardTrainer", share=None),
    "lora-local": Method(
        "LoRA-local", "Algorithm 4: a LoRA and a head for each user", share="none", personal_head=True
    ),
    # what a user has of his own in the upper layers is a LoRA here (ours): a copy of the layers for each would not fit
    "share-rep": Method(
        "Share Rep",
        "Park et al. 2024: 70 % of the layers common and frozen",
        "none",
        personal_head=True,
        common_layers=0.7,
    ),
    # the warm-up of (WU), so that it differs in the shared factor only: in Figure 3 share B is (WU)
    "share-a": Method("share A", "appendix D.3, Figure 3: the down-projection shared", share="A", warm_up=0.1),
    "kernel": Method("kernel", "authors' code only: A and B shared, a core r x r for each user", share="AB"),
    "svd": Method("svd", "authors' code only: A and B shared, a diagonal for each user", share="diagonal"),
}


def method_named(name: str) -> Method:
    """The method of a name.

    Raises:
        MethodError: there is none.
    """
    if name not in METHODS:
        near = difflib.get_close_matches(str(name), METHODS, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise MethodError(f"method={name!r} is unknown{hint}; one of {', '.join(map(repr, METHODS))} is needed.")
    return METHODS[name]


def train_method(
    name: str,
    model: str | Callable[[], PreTrainedModel],
    args: ShareLoraRewardConfig,
    train_dataset: Any,
    peft_config: ShareLoraConfig,
    *,
    callbacks: Sequence[TrainerCallback] = (),
    resume_from_checkpoint: str | bool | None = None,
    **kwargs: Any,
) -> RewardTrainer:
    """Train one method, in one stage or in two, and return its trainer.

    All methods make the same number of passes over the data: what a warm-up takes is taken off the second stage (the paper's 3 = 2 + 1 =
    0.3 + 2.7). The warm-up is the beginning of the LoRA-global run, as the authors' code takes a checkpoint of it: the learning rate goes
    down as for all epochs; the second stage has an optimiser and a schedule of its own.

    Args:
        name (`str`):
            One of `METHODS`.
        model (`str` or `Callable`):
            The base: a path, an id of the hub, or what makes one. It is loaded afresh for each stage.
        args ([`ShareLoraRewardConfig`]):
            Training; `num_train_epochs` (or `max_steps`) is that of all stages together.
        train_dataset ([`~datasets.Dataset`]):
            Preference rows.
        peft_config ([`ShareLoraConfig`]):
            Rank, scaling, dropout, modules, and for (SI) `init_users`; the form of sharing is the method's.
        callbacks (`Sequence[TrainerCallback]`):
            Of every stage.
        resume_from_checkpoint (`str` or `bool`, *optional*):
            Of the last stage; a warm-up that is in `output_dir/warm-up` already is taken as it is then.
        **kwargs:
            Of the trainers: `eval_dataset`, `processing_class`, `quantization_config`.

    Returns:
        [`~trl.RewardTrainer`]: of the last stage, trained; nothing has been saved but the warm-up, in `output_dir/warm-up`.

    Raises:
        MethodError: an unknown method, one that contradicts these arguments, or two stages of one step.
    """
    method = method_named(name)
    kwargs["callbacks"] = list(callbacks)
    if args.warm_start is not None and (method.warm_up or method.share is None):
        raise MethodError(
            f"warm_start={args.warm_start!r} came with method={name!r}, which "
            + ("trains its warm-up itself." if method.warm_up else "is one LoRA for all.")
            + " Use method='psharelora-si' with warm_start to begin from a LoRA of your own."
        )
    if method.share is None:
        return _trained(_plain_trainer(model, args, train_dataset, peft_config, kwargs), resume_from_checkpoint)

    _check_adapter(name, method, peft_config)
    if method.warm_up:
        folder, left = _warm_up(name, method, model, args, train_dataset, peft_config, resume_from_checkpoint, kwargs)
        rate = args.learning_rate * method.second_rate
        shared = None if args.learning_rate_shared is None else args.learning_rate_shared * method.second_rate
        # in steps: two roundings of epochs could add one
        changes: dict[str, Any] = {"learning_rate": rate, "learning_rate_shared": shared, "max_steps": left}
        args = replace(args, warm_start=str(folder), **changes)
        if resume_from_checkpoint is True and get_last_checkpoint(args.output_dir) is None:
            resume_from_checkpoint = None  # it was stopped before the second stage's first checkpoint
    trainer = ShareLoraRewardTrainer(
        model=model if isinstance(model, str) else model(),
        args=args,
        train_dataset=train_dataset,
        peft_config=adapter_of(method, peft_config, model, args.model_init_kwargs),
        **kwargs,
    )
    return _trained(trainer, resume_from_checkpoint)


def _warm_up(
    name: str,
    method: Method,
    model: Any,
    args: ShareLoraRewardConfig,
    train_dataset: Any,
    peft_config: ShareLoraConfig,
    resume_from_checkpoint: str | bool | None,
    kwargs: dict[str, Any],
) -> tuple[Path, int]:
    """One LoRA for everybody for a while: its folder, and the steps that are left for the second stage."""
    folder = Path(args.output_dir, WARM_UP_FOLDER)
    state_file = folder / "trainer_state.json"  # written last
    if not resume_from_checkpoint or not state_file.is_file():
        logger.info("%s: %.3g of the training is one LoRA for everybody.", name, method.warm_up)
        # the last state is what is copied; and only the second stage's model is the run's
        own: dict[str, Any] = {"output_dir": str(folder), "load_best_model_at_end": False, "push_to_hub": False}
        first = _plain_trainer(model, replace(args, **own), train_dataset, peft_config, kwargs)
        first.add_callback(_StopAfter(method.warm_up))
        begun = get_last_checkpoint(str(folder)) if resume_from_checkpoint and folder.is_dir() else None
        _trained(first, begun)
        first.save_model()
        first.save_state()
        first.accelerator.wait_for_everyone()  # all processes read what the first has written
        del first
        gc.collect()
    state = TrainerState.load_from_json(str(state_file))
    left = state.max_steps - state.global_step
    if left < 1:
        raise MethodError(
            f"{name} has two stages, but all of the training is {state.max_steps} optimiser step(s). Train longer, or with smaller batches."
        )
    return folder, left


def _trained(trainer: RewardTrainer, resume_from_checkpoint: str | bool | None = None) -> RewardTrainer:
    if trainer.args.disable_tqdm:  # somebody wants it quiet; the Trainer would print dictionaries instead of bars
        trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=resume_from_checkpoint)
    return trainer


def _check_adapter(name: str, method: Method, config: ShareLoraConfig) -> None:
    """What of the given adapter contradicts the method."""
    found = []
    if method.personal_head and (config.bank in ("ram", "mmap") or config.bank_dtype != "float32"):
        found.append(
            (f"bank={config.bank!r}, bank_dtype={config.bank_dtype!r}", "needs a resident bank for its heads")
        )
    if config.init_users == "independent" and (method.warm_up or method.share != "B"):
        found.append(("init_users='independent'", "starts all users alike"))
    if method.common_layers and config.layers_to_transform is not None:
        upper = f"adapts the uppermost {1 - method.common_layers:.0%} of the layers"
        found.append((f"layers_to_transform={config.layers_to_transform}", upper))
    if found:
        raise MethodError(
            f"{found[0][0]} came with method={name!r} ({method.title}), which {found[0][1]}. Leave it out."
        )


def adapter_of(
    method: Method, peft_config: ShareLoraConfig, model: Any, model_init_kwargs: dict[str, Any] | None = None
) -> ShareLoraConfig:
    """The adapter of a method: the given one in the method's form, on the method's layers.

    Args:
        method ([`Method`]):
            Not LoRA-global.
        peft_config ([`ShareLoraConfig`]):
            Rank, scaling, dropout, modules.
        model (`str` or `Callable`):
            The base, for its number of layers.
        model_init_kwargs (`dict`, *optional*):
            How it is loaded.
    """
    config = copy.deepcopy(peft_config)
    changes: dict[str, Any] = {"share": method.share, "personal_head": method.personal_head}
    if method.personal_head:
        changes["bank"] = "resident"
    if method.common_layers:
        if isinstance(model, str):
            names = ("revision", "trust_remote_code")
            loading = {name: value for name, value in (model_init_kwargs or {}).items() if name in names}
            base = AutoConfig.from_pretrained(model, **loading)
        else:
            base = model().config
        layers = base.get_text_config().num_hidden_layers
        first = min(math.floor(method.common_layers * layers), layers - 1)  # at least the last layer is personal
        changes["layers_to_transform"] = list(range(first, layers))
    return replace(config, **changes)


def _plain_trainer(
    model: Any, args: ShareLoraRewardConfig, train_dataset: Any, config: ShareLoraConfig, kwargs: dict[str, Any]
) -> RewardTrainer:
    """TRL's own trainer with PEFT's own LoRA, on the same arguments; dropout and precision as the others have them."""
    values = {item.name: getattr(args, item.name) for item in fields(RewardConfig) if item.init}
    if args.learning_rate_shared is not None:
        values["learning_rate"] = args.learning_rate_shared  # all of it is shared
    names = ["r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "use_rslora", "fan_in_fan_out"]
    names += ["layers_to_transform", "layers_pattern", "trainable_token_indices"]
    lora = LoraConfig(
        task_type="SEQ_CLS",
        modules_to_save=copy.copy(config.modules_to_save),
        **{name: copy.copy(getattr(config, name)) for name in names},
    )
    trainer = RewardTrainer(
        model=model if isinstance(model, str) else model(),
        args=RewardConfig(**values),
        train_dataset=train_dataset,
        peft_config=lora,
        **kwargs,
    )
    for module in trainer.model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            keep_in_float32(module.modules_to_save["default"])  # in bf16 close rewards are ties
        if isinstance(module, LoraLayer):
            for dropout in module.lora_dropout.values():
                if isinstance(dropout, nn.Dropout):
                    dropout.p = config.lora_dropout  # TRL's disable_dropout has switched it off
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # of a quantised base TRL casts them to bf16
    return trainer


class _StopAfter(TrainerCallback):
    """Stops a training after a share of its steps; at least one."""

    def __init__(self, share: float):
        self.share = share

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= max(1, round(self.share * state.max_steps)):
            control.should_training_stop = True
