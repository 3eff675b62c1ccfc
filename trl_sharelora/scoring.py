"""A saved reward model, and what is read off it: rewards, last-layer features, gradients with respect to the users' part.

[`UserReward`] and [`fit_confidence`] stand on it. Everything here is of one model; what is made of the numbers is in pessimism.py.
"""

import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import AutoPeftModelForSequenceClassification, PeftModel
from peft.utils.other import ModulesToSaveWrapper
from torch import nn
from transformers import AutoTokenizer

from .errors import ConfigError, PessimismError, UnsupportedError, UserIdError
from .evaluation import _check_model
from .sharelora.bank import SlotBank
from .sharelora.config import PERSONAL_FACTOR, ShareLoraConfig
from .sharelora.head import HEAD_MOVES, PersonalHead
from .sharelora.layer import ShareLoraLayer
from .sharelora.routing import use_users
from .users import UserRegistry


logger = logging.getLogger(__name__)

# Numbers that the gradient with respect to a user's factor is reduced to. An inner product of two gradients is kept with a standard
# deviation of at most sqrt(2 / 1024) = 4 % of the product of their lengths (Charikar et al., 2002).
SKETCH_SIZE = 1024


def check_known(name: str, value: Any, known: Sequence[Any]) -> None:
    if value not in known:
        raise ConfigError(f"{name}={value!r} is unknown; one of {', '.join(map(repr, known))} is needed.")


class Scorer:
    """A reward model with ShareLoRA adapters, and what is read off it: rewards, features, gradients."""

    def __init__(self, model: PeftModel, processing_class: Any, batch_size: int):
        config = model.peft_config.get(model.active_adapter) if isinstance(model, PeftModel) else None
        if not isinstance(config, ShareLoraConfig):
            kind = type(model).__name__ if config is None else f"a model with a {type(config).__name__}"
            raise ConfigError(
                f"{kind} came as the reward model; a PeftModel with a ShareLoRA adapter, or the directory of a saved one, is needed. Train "
                "one with ShareLoraRewardTrainer (or `trl-sharelora reward`). A reward that is the same for all users needs no "
                "UserReward: give the model itself to the trainer."
            )
        _check_task(config, "the model")
        if processing_class is None:
            raise ConfigError(
                "The model came without its tokenizer; give processing_class=tokenizer. (It is found by itself in the directory of a "
                "saved reward model.)"
            )
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ConfigError(f"batch_size={batch_size!r} came; a whole number of at least 1 is needed.")
        _check_model(model, processing_class)
        self.model = model
        self.processing_class = processing_class
        self.batch_size = batch_size
        self.adapter: str = model.active_adapter
        self.config = config
        self.users: UserRegistry = config.users
        self.layers = [
            module
            for module in model.modules()
            if isinstance(module, ShareLoraLayer) and self.adapter in module.sharelora_A
        ]

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def positions(self) -> int | None:
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    def head(self) -> nn.Linear:
        """The linear layer whose output is the reward."""
        for module in self.model.modules():
            if isinstance(module, ModulesToSaveWrapper) and self.adapter in module.modules_to_save:
                linear = [
                    part for part in module.modules_to_save[self.adapter].modules() if isinstance(part, nn.Linear)
                ]
                if linear and linear[-1].out_features == 1:
                    return linear[-1]
        raise ConfigError(
            f"{type(self.model.get_base_model()).__name__} has no linear score head with one output among its saved "
            "modules, so there are no last-layer features. Use pessimism='ball', an ensemble of models, or parameters='own_factor'."
        )

    # -- forwards

    def fingerprint(self) -> str:
        """A digest of what all users share: the factors and the head. They are float32 however the base is loaded."""
        personal = f"sharelora_{PERSONAL_FACTOR[self.config.share]}."
        digest = hashlib.sha256()
        for key, parameter in sorted(self.model.named_parameters()):
            ours = ".sharelora_" in key or ".modules_to_save." in key
            if ours and f".{self.adapter}." in key and personal not in key and not key.endswith(HEAD_MOVES):
                digest.update(key.encode())
                digest.update(parameter.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    @contextmanager
    def scoring(self) -> Iterator[None]:
        """The model in eval mode and frozen; all is put back after.

        Frozen, because a gradient with respect to the layers' outputs would otherwise also be added to the rows of
        users that are held in a store.
        """
        modes = [(module, module.training) for module in self.model.modules()]
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        banks = [module for module in self.model.modules() if isinstance(module, SlotBank) and module.trainable]
        self.model.eval()
        try:
            for part in (*trained, *banks):
                part.requires_grad_(False)
            yield
        finally:
            for part in (*trained, *banks):
                part.requires_grad_(True)
            for module, mode in modes:
                module.training = mode

    def batches(self, sequences: Sequence[Sequence[int]]) -> Iterator[list[int]]:
        """Rows of a length together, the longest first, so that memory runs out at once."""
        order = sorted(range(len(sequences)), key=lambda row: len(sequences[row]), reverse=True)
        for start in range(0, len(order), self.batch_size):
            yield order[start : start + self.batch_size]

    def forward(self, sequences: Sequence[Sequence[int]], index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rewards `(rows,)` in float32 and the padded ids `(rows, seq)`, on the model's device."""
        rows = [torch.tensor(sequence) for sequence in sequences]
        pad = self.processing_class.pad_token_id
        input_ids = nn.utils.rnn.pad_sequence(rows, True, pad).to(self.device)
        lengths = torch.tensor([len(row) for row in rows])
        mask = (torch.arange(input_ids.shape[1]) < lengths[:, None]).long().to(self.device)
        unseen = "common" if bool((index < 0).any()) else "raise"
        with use_users(self.model, index.to(self.device), unseen=unseen):
            outputs = self.model(input_ids=input_ids, attention_mask=mask, use_cache=False)
        return outputs.logits.squeeze(-1).float(), input_ids

    @torch.no_grad()
    def rewards(self, sequences: Sequence[Sequence[int]], index: torch.Tensor) -> torch.Tensor:
        """`(rows,)`."""
        found = torch.empty(len(sequences), device=self.device)
        with self.scoring():
            for part in self.batches(sequences):
                found[part] = self.forward([sequences[row] for row in part], index[part])[0]
        return found

    def rewards_and_features(
        self,
        sequences: Sequence[Sequence[int]],
        index: torch.Tensor,
        parameters: str,
        sketch: "CountSketch | None" = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`(rows,)` and `(rows, d)`."""
        rewards, features = [], []
        order = []
        with self.scoring():
            for part in self.batches(sequences):
                some = [sequences[row] for row in part]
                if parameters == "last_layer":
                    reward, feature = self._last_layer(some, index[part])
                elif parameters == "base":
                    reward = self.forward(some, index[part])[0]
                    feature = self._base_layer(some, index[part])
                else:
                    assert sketch is not None
                    reward, inputs, gradients = self.gradients(some, index[part])
                    feature = sketch(self._own_gradients(inputs, gradients))
                rewards.append(reward)
                features.append(feature)
                order += part
        back = torch.tensor(order).argsort().to(self.device)
        return torch.cat(rewards)[back], torch.cat(features)[back]

    @torch.no_grad()
    def _last_layer(
        self, sequences: Sequence[Sequence[int]], index: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rewards and what the score head sees where they are read."""
        head = self.head()
        rewards, hidden = self._input_of(head, sequences, index)
        weight = head.weight.float().squeeze(0)  # (d,), or each row's own
        if isinstance(head, PersonalHead):
            own = torch.cat(
                [head.moves.weight, torch.zeros_like(head.moves.weight[:1])]
            )  # the last for unseen users, -1
            weight = weight + own[index.to(own.device)].squeeze(1)
        # TF32 products err by 2^-11 of the sum of magnitudes
        slack = 1e-3 * (hidden.abs() * weight.abs()).sum(-1) + 1e-6
        bias = 0.0 if head.bias is None else head.bias.float()
        away = ((hidden * weight).sum(-1) + bias - rewards).abs()
        if bool((away > slack).any()):
            raise PessimismError(
                f"{type(self.model.get_base_model()).__name__} does not read its reward off the last token that is not "
                f"padding (the head gives another reward there, by up to {float(away.max()):.3g}), so its last-layer features are unknown. Use "
                "pessimism='ball', an ensemble of models, or parameters='own_factor'."
            )
        return rewards, hidden

    @torch.no_grad()
    def _base_layer(self, sequences: Sequence[Sequence[int]], index: torch.Tensor) -> torch.Tensor:
        """What the score head would see of the base, without the adapter: the same for all users."""
        head = self.head()
        wrapper = next(
            module
            for module in self.model.modules()
            if isinstance(module, ModulesToSaveWrapper) and head in module.modules_to_save[self.adapter].modules()
        )
        original = [part for part in wrapper.original_module.modules() if isinstance(part, nn.Linear)][-1]
        trainable = {parameter: parameter.requires_grad for parameter in self.model.parameters()}
        try:
            with self.model.disable_adapter():
                return self._input_of(original, sequences, index)[1]
        finally:
            for parameter, requires_grad in trainable.items():  # PEFT makes all of an adapter trainable again
                parameter.requires_grad_(requires_grad)

    def _input_of(
        self, head: nn.Module, sequences: Sequence[Sequence[int]], index: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rewards and a head's input `(rows, d)` where they are read."""
        seen: list[torch.Tensor] = []
        hook = head.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        try:
            rewards, input_ids = self.forward(sequences, index)
        finally:
            hook.remove()
        hidden = seen[-1].float()  # (rows, seq, d), or (rows, d) of a model that pools first
        if hidden.ndim == 3:
            # as transformers pools: the rightmost token that is not the pad token, which may be the end token too
            places = torch.arange(input_ids.shape[1], device=input_ids.device)
            last = (places * (input_ids != self.processing_class.pad_token_id)).argmax(-1)
            hidden = hidden[torch.arange(len(hidden), device=hidden.device), last.to(hidden.device)]
        return rewards, hidden

    def gradients(
        self, sequences: Sequence[Sequence[int]], index: torch.Tensor
    ) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
        """Rewards; per ShareLoRA layer its input `(rows, seq, in)` and the gradient at its output `(rows, seq, out)`.

        The gradient of a row's reward with respect to the layer's effective update is `sum_t gradient_t input_t'`. It
        is taken at a zero that is added to the output: the layer writes into its output in place, and frozen weights
        give a graph no start.
        """
        inputs: dict[nn.Module, list[torch.Tensor]] = {layer: [] for layer in self.layers}
        zeros: dict[nn.Module, list[torch.Tensor]] = {layer: [] for layer in self.layers}

        def hook(layer: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
            zero = torch.zeros_like(output, requires_grad=True)
            inputs[layer].append(args[0].detach())
            zeros[layer].append(zero)
            return output + zero

        hooks = [layer.register_forward_hook(hook) for layer in self.layers]
        try:
            # also inside somebody's inference mode, whose tensors could not be differentiated
            with torch.inference_mode(False), torch.enable_grad():
                rewards, _ = self.forward(sequences, index)
                flat = [zero for layer in self.layers for zero in zeros[layer]]
                found = iter(torch.autograd.grad(rewards.sum(), flat, allow_unused=True, materialize_grads=True))
        finally:
            for handle in hooks:
                handle.remove()

        def joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
            # a layer that is used several times in a forward: more places of one sum
            return torch.cat([part.reshape(len(part), -1, part.shape[-1]) for part in parts], 1)

        used = [layer for layer in self.layers if inputs[layer]]
        gradients = [joined([next(found) for _ in zeros[layer]]) for layer in used]
        return rewards.detach(), [joined(inputs[layer]) for layer in used], gradients

    def _own_gradients(self, inputs: list[torch.Tensor], gradients: list[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Per layer the gradient of each row's reward with respect to its user's own factor, `(rows, entries)`."""
        if self.config.share == "none":
            raise UnsupportedError(
                "parameters='own_factor' came with share='none', where a user has two factors and the reward is not linear in both. Use "
                "parameters='last_layer' or 'base'."
            )
        for layer, x, gradient in zip(self.layers, inputs, gradients, strict=True):
            share, scaling = self.config.share, layer.scaling[self.adapter]
            right, left = x.float(), gradient.float()
            if share != "B":
                right = right @ layer.sharelora_A[self.adapter].weight.float().mT
            if share != "A":
                left = left @ layer.sharelora_B[self.adapter].weight.float()
            if share == "diagonal":
                yield scaling * (left * right).sum(1)
            else:
                yield scaling * torch.bmm(left.mT, right).flatten(1)


class CountSketch:
    """Reduces long vectors to `size` numbers and keeps inner products on average.

    Each entry goes to one place with a random sign: `(S x)_j = sum over i with h(i) = j of s(i) x_i`, h and s from a hash of the entry's number (splitmix64), so that
    nothing is stored and a saved set fits again (Charikar, Chen and Farach-Colton, 2002, "Finding frequent items in
    data streams").

    Args:
        size (`int`, *optional*, defaults to 1024):
            Numbers left.
        seed (`int`, *optional*, defaults to 0):
            Of the hash.
    """

    def __init__(self, size: int = SKETCH_SIZE, seed: int = 0):
        self.size, self.seed = size, seed

    def __call__(self, parts: Iterator[torch.Tensor]) -> torch.Tensor:
        """Parts `(rows, n_k)` of a long vector per row -> `(rows, size)`."""
        total: torch.Tensor | None = None
        start = 0
        for part in parts:
            numbers = torch.arange(start, start + part.shape[1], device=part.device)
            hashed = self._hash(numbers)
            sign = 1.0 - 2.0 * (hashed & 1)
            if total is None:
                total = part.new_zeros(len(part), self.size)
            total.index_add_(1, (hashed >> 1 & 0x7FFFFFFF) % self.size, part * sign.to(part.dtype))
            start += part.shape[1]
        assert total is not None
        return total

    def _hash(self, numbers: torch.Tensor) -> torch.Tensor:
        def signed(number: int) -> int:
            number %= 1 << 64
            return number - (1 << 64) if number >> 63 else number

        def shifted(value: torch.Tensor, bits: int) -> torch.Tensor:
            return value >> bits & (1 << (64 - bits)) - 1  # >> of int64 brings the sign along

        golden = 0x9E3779B97F4A7C15
        value = numbers * signed(golden) + signed((2 * self.seed + 1) * golden**2)
        value = (value ^ shifted(value, 30)) * signed(0xBF58476D1CE4E5B9)
        value = (value ^ shifted(value, 27)) * signed(0x94D049BB133111EB)
        return value ^ shifted(value, 31)


def _check_task(config: ShareLoraConfig, where: str) -> None:
    task = str(config.task_type or "").split(".")[-1]
    if task != "SEQ_CLS":
        raise ConfigError(
            f"The ShareLoRA adapter of {where} has task_type={task or None!r}, so it is no reward model (a policy has 'CAUSAL_LM'); "
            "'SEQ_CLS' is needed. Give the output_dir of a ShareLoraRewardTrainer."
        )


def read_config(path: str) -> ShareLoraConfig:
    """The configuration of a saved reward adapter; says what is there instead."""
    folder = Path(path)
    if folder.is_dir() and not (folder / "adapter_config.json").is_file():
        what = "a whole model" if (folder / "config.json").is_file() else "no adapter"
        raise ConfigError(
            f"There is no adapter_config.json in {path!r} ({what}); give the output_dir of a ShareLoraRewardTrainer (or one of its "
            "checkpoints)."
        )
    try:
        config = ShareLoraConfig.from_pretrained(path)
    except (ConfigError, UserIdError):
        raise  # a plain LoRA, or torn
    except (ValueError, OSError, TypeError) as error:
        raise ConfigError(
            f"No ShareLoRA adapter can be read from {path!r}, neither as a directory (looked for in {Path.cwd()}) nor from the hub: "
            f"{error}"
        ) from error
    _check_task(config, repr(path))
    return config


def default_device() -> torch.device:
    """This process's accelerator, or the CPU."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is None:
        return torch.device("cpu")
    # before an Accelerator is made, every process's current device is the first one
    return torch.device(accelerator.type, int(os.environ.get("LOCAL_RANK", torch.accelerator.current_device_index())))


def load_reward_model(
    path: str | os.PathLike,
    processing_class: Any = None,
    *,
    quantization_config: Any = None,
    model_init_kwargs: dict[str, Any] | None = None,
    device: torch.device | str | None = None,
) -> tuple[PeftModel, Any]:
    """A saved reward adapter on its base, frozen, and its tokenizer.

    Args:
        path (`str` or `os.PathLike`):
            The adapter's directory or hub id, as the reward trainer saved it.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            By default the tokenizer saved beside the adapter.
        quantization_config ([`~transformers.BitsAndBytesConfig`], *optional*):
            For an 8-bit or 4-bit base.
        model_init_kwargs (`dict`, *optional*):
            For the base's `from_pretrained`. Without `dtype` it is loaded in float32, as TRL's trainers do.
        device (`torch.device` or `str`, *optional*):
            By default this process's accelerator, or the CPU.

    Raises:
        ConfigError: There is no ShareLoRA reward adapter.
    """
    path = os.fspath(path)
    read_config(path)
    device = default_device() if device is None else device
    tokenizer = AutoTokenizer.from_pretrained(path) if processing_class is None else processing_class
    model = AutoPeftModelForSequenceClassification.from_pretrained(
        path,
        num_labels=1,
        quantization_config=quantization_config,
        **{"dtype": "float32", "device_map": {"": device}, **(model_init_kwargs or {})},
    )
    # as the trainer did: a decoder's reward is read at the last token that is not padding
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    return model, tokenizer
