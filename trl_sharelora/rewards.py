"""A user's reward as a callable, and its lower end: for RLOO, GRPO, PPO and best-of-n.

[`UserReward`] scores (prompt, completion, user) with a saved reward model. With `pessimism` it returns the lower end
of a confidence set in place of the estimate: Algorithm 1 of P-ShareLoRA (https://huggingface.co/papers/2503.19201),
(3.4) and (3.5), or one of the sets that measure what the data cover. The arithmetic of the sets is in pessimism.py;
here is what connects them with a model: tokens, features, gradients, files.
"""

import copy
import hashlib
import json
import logging
import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification, PeftModel
from peft.utils.other import ModulesToSaveWrapper
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from .data import check_preference_rows, tokenize_completion, tokenize_preference
from .errors import ConfigError, DataError, NonFiniteError, PessimismError, UnknownUserError, UserIdError, some_rows
from .evaluation import _check_model
from .pessimism import (
    EllipsoidBuilder,
    EllipsoidSets,
    ball_norm,
    ball_radius,
    bootstrap_heads,
    ensemble_estimate,
    ensemble_lower_bound,
    lower_bound,
)
from .sharelora.bank import SlotBank
from .sharelora.config import PERSONAL_FACTOR, ShareLoraConfig
from .sharelora.layer import ShareLoraLayer
from .sharelora.routing import UNSEEN, use_users
from .users import UserRegistry, user_id_as_text


logger = logging.getLogger(__name__)

PESSIMISMS = (None, "ball", "ellipsoid", "ensemble")
FORMS = ("std", "worst", "variance")
PARAMETERS = ("last_layer", "own_factor")
BALLS = ("sample", "batch")
KINDS = ("ellipsoid", "heads")
CONFIDENCE_FOLDER = "confidence"
VERSION = 1
# Numbers that the gradient with respect to a user's factor is reduced to. An inner product of two gradients is kept with a standard
# deviation of at most sqrt(2 / 1024) = 4 % of the product of their lengths (Charikar et al., 2002).
SKETCH_SIZE = 1024


class RewardEstimate(NamedTuple):
    """What [`UserReward.score`] gives.

    Args:
        mean (`torch.Tensor` of shape `(n,)`):
            The reward, minus that of the references where there are some.
        std (`torch.Tensor` of shape `(n,)`):
            The width of the set in the direction of the row: a standard deviation (ellipsoid, ensemble) or radius
            times norm of the gradient (ball); for an ensemble of the form `"variance"`, the variance. Zero without
            pessimism. (For the form `"worst"` a call of the reward gives the least member, which no coefficient makes of this.)
    """

    mean: torch.Tensor
    std: torch.Tensor


# -- the model ----------------------------------------------------------------------------------------------------------


class _Scorer:
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
            if ours and f".{self.adapter}." in key and personal not in key:
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
        # TF32 products err by 2^-11 of the sum of magnitudes
        slack = 1e-3 * (hidden.abs() @ head.weight.float().abs().squeeze(0)) + 1e-6
        away = (head(hidden).squeeze(-1) - rewards).abs()
        if bool((away > slack).any()):
            raise PessimismError(
                f"{type(self.model.get_base_model()).__name__} does not read its reward off the last token that is not "
                f"padding (the head gives another reward there, by up to {float(away.max()):.3g}), so its last-layer features are unknown. Use "
                "pessimism='ball', an ensemble of models, or parameters='own_factor'."
            )
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


def _read_config(path: str) -> ShareLoraConfig:
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
    _read_config(path)
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


# -- the callable ---------------------------------------------------------------------------------------------------------


class UserReward:
    """The reward of each row's own user, or its lower end, as a function that RLOO and GRPO call.

    A plain callable and no `nn.Module`: TRL gives modules text only, and the users would be lost. Text is made and
    tokenised as it was in training: prompt and completion, closed by the end token (also where the completion was cut
    off at its maximal length), or the chat template of prompt and completion. An empty completion is scored as the
    prompt and the end token, and is counted.

    | `pessimism` | set | width of a row | reward |
    |---|---|---|---|
    | None | the estimate alone | 0 | `r` |
    | `"ball"` | all models within `rho` of the estimate, (3.4) | `rho ‖dr/dΔΘ‖_F` | `r - c width` |
    | `"ellipsoid"` | those that the data cannot tell from it | `sqrt(phi' Sigma_u^-1 phi)` | `r - c width` |
    | `"ensemble"` | a few trained models or heads | their spread | see `form` |

    The ball is the paper's, a first-order solution of the inner minimum in (3.5) (exact where the reward is linear in
    the update). It does not know what the data cover. The ellipsoid does (https://huggingface.co/papers/2301.11270):
    wide where this user, and with `pooled_discount` the others, compared nothing alike. The ensemble is that of
    https://huggingface.co/papers/2310.02743.

    Args:
        model_or_path ([`~peft.PeftModel`], `str`, `os.PathLike` or a list of paths):
            A ShareLoRA reward model, or where one was saved. For `"ensemble"` a list of saved models of the same base
            and users (trained with different seeds; all lie on one base), or one model for which
            `fit_confidence(kind="heads")` was run.
        pessimism (`str`, *optional*):
            One of the table.
        pessimism_coefficient (`float`, *optional*, defaults to 1.0):
            c of the table. 0 gives the plain reward exactly and computes no width. 1 takes one standard deviation;
            [`~trl_sharelora.evaluation.calibrate`] finds the one that covers a wanted share of held-out comparisons.
        reference (`str` or `Callable`, *optional*):
            E_ref of (3.5): what a completion is compared with. The column that holds a reference completion (or a list
            of them) per prompt; or a function `(prompts, user_ids) -> list`, one list of completions per prompt.
            Reward and width then are of the difference from their mean. Without it the ellipsoid is centred on the
            mean training feature.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The tokenizer; by default the one saved with the adapter.
        sets ([`~trl_sharelora.pessimism.EllipsoidSets`] or `torch.Tensor` of shape `(members, d)`, *optional*):
            What [`fit_confidence`] returned, for a model in memory. By default they are read from
            `<adapter>/confidence`.
        form (`str`, *optional*, defaults to `"std"`):
            Of an ensemble: mean minus c standard deviations, `"worst"` the least member, `"variance"` mean minus c
            variances.
        parameters (`str`, *optional*):
            Features of the ellipsoid, by default those it was fitted with: `"last_layer"`, the input of the score head, or `"own_factor"`, the reward's gradient with
            respect to the user's own factor, reduced by a [`CountSketch`] (a backward more, and blind to what the
            shared parts do not know).
        zeta (`float`, *optional*):
            Of the ball, as printed in (3.4): `‖ΔΘ - ΔΘ̂‖_F² <= zeta`, so `rho = sqrt(zeta)`. Without it `rho = 1`, and
            the coefficient is the radius. (The proof of Theorem 4.2 uses zeta itself as the radius.)
        ball (`str`, *optional*, defaults to `"sample"`):
            Each row by its own norm: an upper bound that does not depend on the other rows, so no reward exceeds the
            mean. `"batch"` is the closed form of (3.5), `rho ‖G‖_F` for each user, G the mean gradient of his rows in
            this call minus that of his references. Each of his rows carries its share `rho <G, g_i> / ‖G‖`, the reward
            at the worst point of the ball; the shares average to the norm and a single one may be negative. (The norm
            itself would be the same for all rows of a user and so cancel against the baseline of RLOO and GRPO.) Two
            forwards and backwards. [`~UserReward.score`] always takes `"sample"`.
        batch_size (`int`, *optional*, defaults to 16):
            Sequences per forward.
        max_length (`int`, *optional*):
            Longer texts lose tokens on the left (the reward is read at the end), and are counted. Without it a text
            longer than the model has positions is an error.
        unseen (`str`, *optional*, defaults to `"raise"`):
            Users whom the adapter does not know: an error, or with `"common"` the common model (D = 0) and the
            ellipsoid of what is pooled over users (`pooled_discount` of [`fit_confidence`]); they are counted.
        user_column (`str`, *optional*, defaults to `"user_id"`):
            The column that names the user.
        quantization_config, model_init_kwargs, device:
            See [`load_reward_model`].

    Raises:
        PessimismError: There is no set (run [`fit_confidence`]), or it is of another adapter; references do not fit.
        ConfigError: A setting is unknown, or `model_or_path` is no ShareLoRA reward model.

    Metrics, where TRL gives `log_metric`: `user_reward/mean`, `user_reward/penalty` (how much lower the returned
    rewards are on average), `user_reward/unseen_share` (of rows), `user_reward/unfitted_share` (rows of users of whom the ellipsoids know no comparison), `user_reward/empty_completions` and
    `user_reward/truncated` (rows).

    Example:

    ```python
    reward = UserReward("rm", pessimism="ellipsoid", pessimism_coefficient=1.0)
    trainer = RLOOTrainer("Qwen/Qwen3-0.6B", reward_funcs=reward, train_dataset=prompts_with_user_id)
    ```
    """

    def __init__(
        self,
        model_or_path: PeftModel | str | os.PathLike | Sequence[str | os.PathLike],
        pessimism: str | None = None,
        pessimism_coefficient: float = 1.0,
        reference: str | Callable[[list, list[str]], list] | None = None,
        *,
        processing_class: Any = None,
        sets: EllipsoidSets | torch.Tensor | None = None,
        form: str = "std",
        parameters: str | None = None,
        zeta: float | None = None,
        ball: str = "sample",
        batch_size: int = 16,
        max_length: int | None = None,
        unseen: str = "raise",
        user_column: str = "user_id",
        quantization_config: Any = None,
        model_init_kwargs: dict[str, Any] | None = None,
        device: torch.device | str | None = None,
    ):
        self.__name__ = "user_reward"  # TRL's name of its metrics
        for name, value, known in (
            ("pessimism", pessimism, PESSIMISMS),
            ("form", form, FORMS),
            ("parameters", parameters, (None, *PARAMETERS)),
            ("ball", ball, BALLS),
            ("unseen", unseen, UNSEEN),
        ):
            _check_known(name, value, known)
        lower_bound(torch.zeros(1), torch.zeros(1), pessimism_coefficient)  # refuses what is no coefficient
        if zeta is not None and pessimism != "ball":
            raise ConfigError(f"zeta={zeta} is the size of the ball; it needs pessimism='ball', not {pessimism!r}.")
        if reference is not None and not isinstance(reference, str) and not callable(reference):
            raise PessimismError(
                f"reference={reference!r} came; the name of a column, or a function (prompts, user_ids) -> completions, is needed."
            )
        if max_length is not None and (type(max_length) is not int or max_length < 1):
            raise ConfigError(f"max_length={max_length!r} came; a whole number of at least 1, or None, is needed.")
        if pessimism == "ball" and reference is None:
            logger.warning(
                "pessimism='ball' came without a reference; (3.5) of the paper subtracts the reward of the reference policy. Give "
                "reference=..., a column of completions or a function that samples them (SampledReferences)."
            )
        self.pessimism = pessimism
        self.pessimism_coefficient = pessimism_coefficient
        self.reference = reference
        self.form = form
        self.radius = 1.0 if zeta is None else ball_radius(zeta)
        self.ball = ball
        self.max_length = max_length
        self.unseen = unseen
        self.user_column = user_column
        self._warned: set[str] = set()
        loading = {
            "quantization_config": quantization_config,
            "model_init_kwargs": model_init_kwargs,
            "device": device,
        }

        self.members: list[str] = []
        self.sets: Any = sets
        self.parameters = parameters or "last_layer"
        path: str | None = None
        if isinstance(model_or_path, list | tuple):
            model, processing_class, self.members = _load_members(model_or_path, pessimism, processing_class, loading)
        elif isinstance(model_or_path, str | os.PathLike):
            path = os.fspath(model_or_path)
            model, processing_class = load_reward_model(path, processing_class, **loading)
        else:
            model = model_or_path
        self.scorer = _Scorer(model, processing_class, batch_size)
        self.sketch: CountSketch | None = None
        if pessimism in ("ellipsoid", "ensemble") and not self.members:
            kind = "ellipsoid" if pessimism == "ellipsoid" else "heads"
            settings: dict[str, Any] = {
                "parameters": parameters or "last_layer",
                "sketch_size": SKETCH_SIZE,
                "sketch_seed": 0,
            }
            if self.sets is None:
                self.sets, settings = _load_sets(path, kind, self.scorer)
            parameters = parameters or settings["parameters"]
            if kind == "ellipsoid" and settings["parameters"] != parameters:
                raise PessimismError(
                    f"The ellipsoids of {path!r} are of parameters={settings['parameters']!r}, and {parameters!r} is asked for. Give "
                    f"parameters={settings['parameters']!r}, or fit them again: fit_confidence({path!r}, train_dataset, "
                    f"parameters={parameters!r})."
                )
            self.parameters = parameters
            self._check_sets(kind)
            self.sets = self.sets.to(self.scorer.device)
            if parameters == "own_factor":
                self.sketch = CountSketch(settings["sketch_size"], settings["sketch_seed"])

    def _check_sets(self, kind: str) -> None:
        """Sets and model fit each other."""
        if kind == "heads":
            size = self.scorer.head().in_features
            if (
                not isinstance(self.sets, torch.Tensor)
                or self.sets.ndim != 2
                or self.sets.shape[1] != size
                or len(self.sets) < 2
            ):
                shape = tuple(self.sets.shape) if isinstance(self.sets, torch.Tensor) else type(self.sets).__name__
                raise PessimismError(
                    f"Heads of shape {shape} came; (members, {size}) with 2 or more members is needed."
                )
            return
        if not isinstance(self.sets, EllipsoidSets):
            raise PessimismError(f"sets is a {type(self.sets).__name__}; what fit_confidence returned is needed.")
        size = SKETCH_SIZE if self.parameters == "own_factor" else self.scorer.head().in_features
        if self.sets.feature_size != size or self.sets.num_users > len(self.scorer.users):
            raise PessimismError(
                f"The ellipsoids are of {self.sets.feature_size} features and {self.sets.num_users} users, the model has {size} and "
                f"{len(self.scorer.users)}: they are of another model, or of other parameters. Run fit_confidence for this one."
            )

    # -- rows

    def __call__(
        self,
        prompts: list | None = None,
        completions: list | None = None,
        completion_ids: list | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        log_extra: Callable | None = None,
        trainer_state: Any = None,
        **columns: Any,
    ) -> list[float]:
        """Rewards, as TRL's RLOO and GRPO trainers ask for them.

        Args:
            prompts (`list`):
                Text, or lists of messages; one per completion.
            completions (`list`):
                Of the same form.
            completion_ids, log_extra, trainer_state:
                What TRL passes as well; not read.
            log_metric (`Callable`, *optional*):
                TRL's way to log a number.
            **columns:
                Columns of the dataset, one entry per completion: `user_id` (or what `user_column` says), the
                references', `tools` and `chat_template_kwargs` for the chat template.

        Returns:
            `list[float]`: `lower_bound(mean, width, pessimism_coefficient)` per row.

        Raises:
            DataError, UserIdError, UnknownUserError: The rows cannot be scored.
            PessimismError: The references do not fit.
            NonFiniteError: A reward or a width is NaN or infinite; names the users.
        """
        rows = self._rows(prompts, completions, columns)
        if not rows.sequences:
            return []
        mean, value = self._estimate(rows, self.ball, self._lower_end)
        if log_metric is not None:
            log_metric("user_reward/mean", float(mean.mean()))
            log_metric("user_reward/penalty", float((mean - value).mean()))
            log_metric("user_reward/unseen_share", float((rows.user_index < 0).float().mean()))
            if isinstance(self.sets, EllipsoidSets):
                log_metric("user_reward/unfitted_share", float((~self._fitted(rows.user_index)).float().mean()))
            log_metric("user_reward/empty_completions", float(rows.empty))
            log_metric("user_reward/truncated", float(rows.truncated))
        return value.tolist()

    def _fitted(self, user_index: torch.Tensor) -> torch.Tensor:
        """Which rows are of users whose own comparisons the ellipsoids know, `(rows,)`."""
        known = torch.where(user_index < self.sets.num_users, user_index, -1)
        fitted = torch.zeros(len(known), dtype=torch.bool)
        fitted[known >= 0] = self.sets.has(known[known >= 0].to(self.sets.device)).cpu()
        return fitted

    def score(self, prompts: list, completions: list, user_id: list | None = None, **columns: Any) -> RewardEstimate:
        """Reward and width of each row, float32 on the CPU and without gradient: for best-of-n and reports.

        Args:
            prompts (`list`), completions (`list`):
                As in a call.
            user_id (`list`):
                One user per row.
            **columns:
                As in a call.
        """
        if user_id is not None:
            columns[self.user_column] = user_id
        rows = self._rows(prompts, completions, columns)
        if not rows.sequences:
            return RewardEstimate(torch.zeros(0), torch.zeros(0))
        return RewardEstimate(*self._estimate(rows, "sample", self._width))

    def compare(self, pairs: Sequence[dict[str, list[int]]], user_ids: Sequence[str | int]) -> RewardEstimate:
        """Reward of `chosen` minus reward of `rejected`, and the width of this difference.

        Args:
            pairs (`list[dict]`):
                With `chosen_ids` and `rejected_ids`, see [`~trl_sharelora.data.tokenize_preference`].
            user_ids (`list[str]`):
                One user per pair.
        """
        return RewardEstimate(*self._estimate(self._pairs(pairs, user_ids), "sample", self._width))

    def _pairs(self, pairs: Sequence[dict[str, list[int]]], user_ids: Sequence[str | int]) -> "_Rows":
        """Each pair as its chosen text with the rejected one as the reference."""
        ids, index = self._users(user_ids)
        chosen, _ = self._fit([list(pair["chosen_ids"]) for pair in pairs])
        rejected, _ = self._fit([list(pair["rejected_ids"]) for pair in pairs])
        return _Rows(chosen, ids, index, [[sequence] for sequence in rejected], 0, 0)

    def margins(
        self, prompts: list, chosen: list, rejected: list, user_ids: Sequence[str | int], **columns: list
    ) -> torch.Tensor:
        """Lower end of what the reward of `chosen` is above that of `rejected`: `mean - c width` of the difference, `(rows,)`.

        Args:
            prompts (`list`), chosen (`list`), rejected (`list`):
                Text, or lists of messages.
            user_ids (`list[str]`):
                One user per row.
            **columns:
                `tools` and `chat_template_kwargs` for the chat template, one entry per row.
        """
        rows = zip(prompts, chosen, rejected, *columns.values(), strict=True)
        names = ("prompt", "chosen", "rejected", *columns)
        tokenizer = self.scorer.processing_class
        pairs = [tokenize_preference(dict(zip(names, row, strict=True)), tokenizer) for row in rows]
        return self._estimate(self._pairs(pairs, user_ids), "sample", self._lower_end)[1]

    def _rows(self, prompts: Any, completions: Any, columns: dict[str, Any]) -> "_Rows":
        """What came, checked and tokenised."""
        if self.user_column not in columns:
            came = ", ".join(map(repr, columns)) or "none"
            raise DataError(
                f"The rows came without {self.user_column!r}, so nobody knows whose reward to give; the columns that came are: {came}. Keep "
                "the user's column in the prompt dataset and name it with user_column=... . (Trainers whose remove_unused_columns is "
                "True drop it.)"
            )
        user_ids = columns[self.user_column]
        sizes = {"prompts": prompts, "completions": completions, self.user_column: user_ids}
        for name, values in sizes.items():
            if not isinstance(values, list | tuple):
                raise DataError(
                    f"`{name}` is a {type(values).__name__}; a list with one entry per completion is needed."
                )
        if len({len(values) for values in sizes.values()}) > 1:
            counts = ", ".join(f"{len(values)} {name}" for name, values in sizes.items())
            raise DataError(
                f"{counts} came; one of each per completion is needed (a prompt is repeated for its completions)."
            )
        ids, index = self._users(user_ids)
        for name, values in (("prompt", prompts), ("completion", completions)):
            bad = [row for row, value in enumerate(values) if not _is_text(value)]
            if bad:
                raise DataError(
                    f"A {name} is neither text nor a list of messages: {some_rows(bad)} ({values[bad[0]]!r}). Messages are "
                    '{"role": "user", "content": "..."}.'
                )
        mixed = [row for row, prompt in enumerate(prompts) if type(prompt) is not type(completions[row])]
        if mixed:
            raise DataError(f"Prompt and completion are not of one form (text, or messages): {some_rows(mixed)}.")
        nothing = [row for row, (p, c) in enumerate(zip(prompts, completions, strict=True)) if not p and _is_empty(c)]
        if nothing:
            raise DataError(f"Prompt and completion are both empty: {some_rows(nothing)}. There is nothing to score.")
        empty = sum(map(_is_empty, completions))
        if empty:
            self._warn_once(
                "empty",
                f"{empty} of {len(completions)} completions are empty; they are scored as the prompt and the end token.",
            )
        arguments = _template_arguments(columns, len(prompts))
        sequences, truncated = self._fit(
            [self._tokens(*row) for row in zip(prompts, completions, arguments, strict=True)]
        )
        references = None
        if self.reference is not None:
            references = [
                self._fit([self._tokens(prompt, completion, some) for completion in several])[0]
                for prompt, some, several in zip(
                    prompts, arguments, self._references(list(prompts), ids, columns), strict=True
                )
            ]
        return _Rows(sequences, ids, index, references, empty, truncated)

    def _users(self, user_ids: Sequence[Any]) -> tuple[list[str], torch.Tensor]:
        ids = [user_id_as_text(user_id, where=f"row {row}") for row, user_id in enumerate(user_ids)]
        users = self.scorer.users
        index = torch.tensor(users.find(ids), dtype=torch.long)
        unknown = list(dict.fromkeys(ids[row] for row in (index < 0).nonzero().flatten().tolist()))
        if unknown:
            if self.unseen == "raise":
                raise UnknownUserError(users.unknown_message(unknown))
            self._warn_once(
                "unseen", f"{len(unknown)} users whom the adapter does not know are scored with the common model."
            )
        return ids, index

    def _tokens(self, prompt: Any, completion: Any, template_arguments: dict[str, Any]) -> list[int]:
        return tokenize_completion(prompt, completion, self.scorer.processing_class, template_arguments)

    def _fit(self, sequences: list[list[int]]) -> tuple[list[list[int]], int]:
        """Sequences within `max_length`, and how many were cut."""
        positions = self.scorer.positions
        limit = self.max_length
        longest = max(map(len, sequences), default=0)
        if positions is not None and min(longest, longest if limit is None else limit) > positions:
            long = [row for row, sequence in enumerate(sequences) if len(sequence) > positions]
            raise DataError(
                f"{len(long)} of {len(sequences)} texts have more tokens than the reward model has positions ({positions}), the longest "
                f"{longest}: {some_rows(long)}. Give max_length={positions} (or less) to have them cut on the left and counted, or let the "
                "policy write less (max_completion_length)."
            )
        if limit is None:
            return sequences, 0
        truncated = sum(len(sequence) > limit for sequence in sequences)
        if truncated:
            self._warn_once(
                "truncated",
                f"{truncated} of {len(sequences)} texts are longer than max_length={limit} and are cut on the left.",
            )
        return [sequence[-limit:] for sequence in sequences], truncated

    def _references(self, prompts: list, ids: list[str], columns: dict[str, Any]) -> list[list]:
        """Per prompt a list of reference completions."""
        if isinstance(self.reference, str):
            source = f"The column {self.reference!r}"
            if self.reference not in columns:
                came = ", ".join(map(repr, columns)) or "none"
                raise PessimismError(
                    f"reference={self.reference!r} names no column; those that came are: {came}. Name the one with the reference "
                    "completions, or give a function (prompts, user_ids) -> completions. (TRL keeps 'prompt', 'completion' and "
                    "'completion_ids' to itself: call the column something else.)"
                )
            found = columns[self.reference]
        else:
            source = "reference(prompts, user_ids)"
            assert callable(self.reference)
            found = self.reference(prompts, ids)
        if not isinstance(found, list | tuple) or len(found) != len(prompts):
            count = len(found) if isinstance(found, list | tuple) else type(found).__name__
            raise PessimismError(
                f"{source} gave {count} for {len(prompts)} prompts; one completion or list of completions each is needed."
            )
        several = [[entry] if _is_text(entry) and entry != [] else entry for entry in found]
        if not isinstance(self.reference, str):
            several = list(found)
        form = [type(prompt) for prompt in prompts]
        bad = [
            row
            for row, entries in enumerate(several)
            if not isinstance(entries, list | tuple)
            or not entries
            or not all(_is_text(entry) and type(entry) is form[row] for entry in entries)
        ]
        if bad:
            raise PessimismError(
                f"{source} gave something else than completions of the prompts' form: {some_rows(bad)} ({found[bad[0]]!r}). Needed are text for "
                "text and a list of messages for a list of messages; a column holds one completion or a list of them per row, a function "
                "returns a list of them per prompt; none may be empty lists."
            )
        return [list(entries) for entries in several]

    def _warn_once(self, kind: str, message: str) -> None:
        # of a training's every step only the first; the metrics have the rest
        if kind not in self._warned:
            self._warned.add(kind)
            logger.warning(message)

    # -- estimates

    def _estimate(
        self, rows: "_Rows", ball: str, end: Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Means and what `end` makes of `(mean, width, members)`, on the CPU and finite."""
        scorer, needs_width = self.scorer, end != self._lower_end or self.pessimism_coefficient != 0
        sequences, index, places = rows.distinct()
        members: torch.Tensor | None = None
        width: torch.Tensor | None = None
        if self.members:
            found = []
            for name in self.members:
                scorer.model.set_adapter(name, inference_mode=True)
                found.append(rows.differences(scorer.rewards(sequences, index)[places]))
                self._check_finite(rows, found[-1])
            members = torch.stack(found)
            mean, width = ensemble_estimate(members)
        elif self.pessimism is None or not needs_width:
            # also with coefficient 0: the same forwards, so the same rewards bit by bit
            mean = rows.differences(scorer.rewards(sequences, index)[places])
        elif self.pessimism == "ball":
            mean, width = self._ball(rows, ball)
        else:
            parameters = self.parameters if self.pessimism == "ellipsoid" else "last_layer"
            rewards, features = (
                values[places] for values in scorer.rewards_and_features(sequences, index, parameters, self.sketch)
            )
            mean = rows.differences(rewards)
            self._check_finite(rows, rewards)
            self._check_finite(rows, features)
            if self.pessimism == "ellipsoid":
                features = rows.differences(features) if rows.references is not None else self.sets.centred(features)
                known = torch.where(rows.user_index < self.sets.num_users, rows.user_index, -1).to(features.device)
                width = self.sets.width(features, known).float()
            else:
                # around the trained head, whose reward is the mean: refits differ from it by what the labels' chance does
                spread = rows.differences(features) @ (self.sets - self.sets.mean(0)).to(features).mT  # (n, members)
                members = mean + spread.mT
                width = ensemble_estimate(members)[1]
        if width is None:
            width = torch.zeros_like(mean)
        value = end(mean, width, members)
        self._check_finite(rows, mean)
        self._check_finite(rows, value)
        return mean.float().cpu(), value.float().cpu()

    def _width(self, mean: torch.Tensor, width: torch.Tensor, members: torch.Tensor | None) -> torch.Tensor:
        return width if members is None or self.form != "variance" else members.var(0, correction=0)

    def _lower_end(self, mean: torch.Tensor, width: torch.Tensor, members: torch.Tensor | None) -> torch.Tensor:
        if members is None or self.pessimism_coefficient == 0:
            return lower_bound(mean, width, self.pessimism_coefficient)
        return ensemble_lower_bound(members, self.pessimism_coefficient, self.form)

    def _ball(self, rows: "_Rows", ball: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Means and widths `rho ‖gradient‖_F`, `(n,)` each."""
        scorer, sequences, index = self.scorer, rows.all_sequences(), rows.all_index()
        weights, owner = rows.weights(), rows.owner()
        total = len(sequences)
        rewards = torch.empty(total, device=scorer.device)
        with scorer.scoring():
            if ball == "sample":
                width = torch.empty(len(rows.sequences), device=scorer.device)
                for part in rows.whole_rows(scorer.batch_size):
                    reward, inputs, gradients = scorer.gradients([sequences[place] for place in part], index[part])
                    self._check_finite(rows, reward, part)
                    rewards[part] = reward
                    if rows.references is None:
                        width[part] = ball_norm(inputs, gradients)
                    else:
                        each, groups = owner[part].unique(return_inverse=True)
                        here = weights[part].to(scorer.device), groups.to(scorer.device)
                        width[each] = ball_norm(inputs, gradients, *here)
                return rows.differences(rewards), self.radius * width
            shares = torch.empty(total, device=scorer.device)
            for user_id in dict.fromkeys(rows.ids):
                places = [place for place in range(total) if rows.ids[owner[place]] == user_id]
                batches = [
                    [places[at] for at in part] for part in scorer.batches([sequences[place] for place in places])
                ]

                def pieces(batches: list[list[int]] = batches) -> Iterator[tuple]:
                    for part in batches:
                        yield part, *scorer.gradients([sequences[place] for place in part], index[part])

                # a second forward and backward only where the first do not fit into memory at once
                again = list(pieces()) if len(batches) == 1 else None
                sums: list[torch.Tensor] | None = None  # n G, (out, in) per layer
                for part, reward, inputs, gradients in again or pieces():
                    self._check_finite(rows, reward, part)
                    rewards[part] = reward
                    weight = weights[part].to(scorer.device)
                    products = [
                        torch.einsum("b,bso,bsi->oi", weight, gradient.float(), x.float())
                        for x, gradient in zip(inputs, gradients, strict=True)
                    ]
                    sums = products if sums is None else [a + b for a, b in zip(sums, products, strict=True)]
                assert sums is not None
                norm = torch.stack([part.square().sum() for part in sums]).sum().sqrt()
                for part, _, inputs, gradients in again or pieces():
                    along = [
                        torch.einsum("bso,oi,bsi->b", gradient.float(), direction, x.float())
                        for x, gradient, direction in zip(inputs, gradients, sums, strict=True)
                    ]
                    shares[part] = torch.stack(along).sum(0) / norm.clamp(min=torch.finfo(norm.dtype).tiny)
        return rows.differences(rewards), self.radius * rows.differences(shares)

    def _check_finite(self, rows: "_Rows", values: torch.Tensor, places: list[int] | None = None) -> None:
        """`values` `(n, ...)` of the rows, of all sequences, or of those at `places`, are finite."""
        bad = (~values.isfinite().reshape(len(values), -1).all(1)).nonzero().flatten().cpu()
        if not len(bad):
            return
        owner = rows.owner() if places is None else rows.owner()[places]
        bad_rows = owner[bad].unique().tolist()
        users = list(dict.fromkeys(rows.ids[row] for row in bad_rows))
        named = ", ".join(map(repr, users[:5])) + ", ..." * (len(users) > 5)
        raise NonFiniteError(
            f"The reward, its features or its width is NaN or infinite in {len(bad_rows)} of {len(rows.ids)} rows: user(s) {named}, "
            f"{some_rows(bad_rows)}. The training of these users (or of all, if all are named) has diverged, or the base's dtype "
            "overflows: load it in float32 or bfloat16, or go back to an earlier checkpoint."
        )


class SampledReferences:
    """Completions of the reference policy, for [`UserReward`]: the E_ref of (3.5), estimated by sampling.

    Each prompt of a user is completed once per call, however many completions are compared with it.

    Args:
        policy ([`~transformers.PreTrainedModel`], `str` or `os.PathLike`):
            A causal model, or where one was saved: what the policy starts from. A personal policy (a ShareLoRA adapter) completes
            each prompt as its user.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Its tokenizer; by default the one saved with it.
        num (`int`, *optional*, defaults to 1):
            Completions per prompt: more of them cost more and make E_ref less noisy.
        **generation:
            Of `generate`: `max_new_tokens` (by default 256, as TRL's `max_completion_length`), `temperature`, ....
    """

    def __init__(self, policy: Any, processing_class: Any = None, num: int = 1, **generation: Any):
        if num < 1:
            raise ConfigError(f"num={num} came; at least one completion per prompt is needed.")
        if isinstance(policy, str | os.PathLike):
            path = os.fspath(policy)
            processing_class = processing_class or AutoTokenizer.from_pretrained(path)
            adapter = Path(path, "adapter_config.json").is_file()
            kind = AutoPeftModelForCausalLM if adapter else AutoModelForCausalLM
            policy = kind.from_pretrained(path, dtype="float32", device_map={"": default_device()})
        self.policy = policy.eval()
        self.processing_class = copy.copy(processing_class)
        self.processing_class.padding_side = "left"
        self.num = num
        self.generation = {"max_new_tokens": 256, "do_sample": True} | generation

    def __call__(self, prompts: list, user_ids: list[str]) -> list[list]:
        """`num` completions for each prompt, in its form."""
        tokenizer = self.processing_class
        asked = [(user_id, json.dumps(prompt)) for prompt, user_id in zip(prompts, user_ids, strict=True)]
        distinct = dict(zip(asked, prompts, strict=True))
        messages = isinstance(prompts[0], list)
        texts = list(distinct.values())
        if messages:
            texts = [tokenizer.apply_chat_template(p, tokenize=False, add_generation_prompt=True) for p in texts]
        batch = tokenizer(texts, padding=True, return_tensors="pt", add_special_tokens=not messages)
        batch = batch.to(self.policy.device)
        users = [user_id for user_id, _ in distinct]
        personal = isinstance(getattr(self.policy, "active_peft_config", None), ShareLoraConfig)
        with torch.no_grad(), use_users(self.policy, users) if personal else nullcontext():
            output = self.policy.generate(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                num_return_sequences=self.num,
                pad_token_id=tokenizer.pad_token_id,
                **self.generation,
            )
        found = tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        completions = [[{"role": "assistant", "content": text}] if messages else text for text in found]
        of_key = {key: completions[n * self.num : (n + 1) * self.num] for n, key in enumerate(distinct)}
        return [of_key[key] for key in asked]


class _Rows(NamedTuple):
    """Rows to score; the references of all rows lie behind them, in order."""

    sequences: list[list[int]]
    ids: list[str]
    user_index: torch.Tensor  # (n,) row of the bank, -1 for an unseen user
    references: list[list[list[int]]] | None  # (n, k_i) sequences
    empty: int
    truncated: int

    def counts(self) -> list[int]:
        return [0] * len(self.sequences) if self.references is None else list(map(len, self.references))

    def all_sequences(self) -> list[list[int]]:
        return self.sequences + [sequence for several in self.references or [] for sequence in several]

    def owner(self) -> torch.Tensor:
        """`(n + references,)` the row that each belongs to."""
        own = torch.arange(len(self.sequences))
        return torch.cat([own, own.repeat_interleave(torch.tensor(self.counts()))])

    def all_index(self) -> torch.Tensor:
        return self.user_index[self.owner()]

    def distinct(self) -> tuple[list[list[int]], torch.Tensor, list[int]]:
        """Sequences, users, and the place of each sequence among them: a prompt's generations mostly share their references."""
        index = self.all_index().tolist()
        found: dict[tuple[tuple[int, ...], int], int] = {}
        places = [
            found.setdefault((tuple(sequence), user), len(found))
            for sequence, user in zip(self.all_sequences(), index, strict=True)
        ]
        return [list(sequence) for sequence, _ in found], torch.tensor([user for _, user in found]), places

    def weights(self) -> torch.Tensor:
        """`(n + references,)`: one for a row, -1/k for each of its k references."""
        references = [-1 / count for count in self.counts() for _ in range(count)]
        return torch.tensor([1.0] * len(self.sequences) + references)

    def differences(self, values: torch.Tensor) -> torch.Tensor:
        """`(n + references, ...)` -> `(n, ...)`: a row's value minus the mean of its references'."""
        n = len(self.sequences)
        if self.references is None:
            return values
        owner = self.owner()[n:].to(values.device)
        counts = torch.tensor(self.counts(), device=values.device).reshape(-1, *[1] * (values.ndim - 1))
        return values[:n] - values.new_zeros(values[:n].shape).index_add_(0, owner, values[n:]) / counts

    def whole_rows(self, batch_size: int) -> Iterator[list[int]]:
        """Places in batches that hold a row and its references together; a row with more of them makes a batch of its own."""
        counts, n = self.counts(), len(self.sequences)
        starts = [n + sum(counts[:row]) for row in range(n)]
        batch: list[int] = []
        for row in sorted(range(n), key=lambda row: len(self.sequences[row]), reverse=True):
            places = [row, *range(starts[row], starts[row] + counts[row])]
            if batch and len(batch) + len(places) > batch_size:
                yield batch
                batch = []
            batch = batch + places
        if batch:
            yield batch


def _check_known(name: str, value: Any, known: Sequence[Any]) -> None:
    if value not in known:
        raise ConfigError(f"{name}={value!r} is unknown; one of {', '.join(map(repr, known))} is needed.")


def _is_text(value: Any) -> bool:
    """Text, or a list of messages (an empty one too)."""
    return isinstance(value, str) or (
        isinstance(value, list) and all(isinstance(part, dict) and isinstance(part.get("role"), str) for part in value)
    )


def _is_empty(completion: Any) -> bool:
    if isinstance(completion, str):
        return not completion.strip()
    return not any(message.get("content") or message.get("tool_calls") for message in completion)


def _template_arguments(columns: dict[str, Any], n: int) -> list[dict[str, Any]]:
    """What the chat template is given for each row, as in training."""
    tools = columns.get("tools") or [None] * n
    others = columns.get("chat_template_kwargs") or [None] * n
    return [
        {"tools": json.loads(tool) if isinstance(tool, str) else tool, **(other or {})}
        for tool, other in zip(tools, others, strict=True)
    ]


def _load_members(
    paths: Sequence[str | os.PathLike], pessimism: str | None, processing_class: Any, loading: dict[str, Any]
) -> tuple[PeftModel, Any, list[str]]:
    """Several saved models as adapters on one base."""
    folders = [os.fspath(path) for path in paths]
    if pessimism != "ensemble" or len(folders) < 2:
        raise PessimismError(
            f"{len(folders)} models came with pessimism={pessimism!r}; an ensemble (pessimism='ensemble') has 2 or more, everything else "
            "one. Train the same model with several seeds."
        )
    configs = [_read_config(folder) for folder in folders]
    for folder, config in zip(folders[1:], configs[1:], strict=True):
        same_base = config.base_model_name_or_path == configs[0].base_model_name_or_path
        if not same_base or config.users != configs[0].users:
            raise PessimismError(
                f"{folder!r} (base {config.base_model_name_or_path!r}, {len(config.users)} users) does not fit {folders[0]!r} (base "
                f"{configs[0].base_model_name_or_path!r}, {len(configs[0].users)} users): the members of an ensemble lie on one "
                "base and have the same users in the same order. Train them on the same data, with different seeds only."
            )
    model, processing_class = load_reward_model(folders[0], processing_class, **loading)
    names = [model.active_adapter]
    for number, folder in enumerate(folders[1:], start=1):
        names.append(f"member{number}")
        model.load_adapter(folder, adapter_name=names[-1], torch_device=str(model.device))
    return model, processing_class, names


# -- the sets -------------------------------------------------------------------------------------------------------------


def fit_confidence(
    model_or_path: PeftModel | str | os.PathLike,
    dataset: Dataset,
    processing_class: Any = None,
    kind: str = "ellipsoid",
    *,
    user_column: str = "user_id",
    batch_size: int = 16,
    max_length: int | None = None,
    ridge: float | None = None,
    pooled_discount: float | None = None,
    members: int = 5,
    seed: int = 0,
    parameters: str = "last_layer",
    save: bool = True,
    output_dir: str | os.PathLike | None = None,
    **loading: Any,
) -> EllipsoidSets | torch.Tensor:
    """What the training comparisons have told about the reward: one pass over them, kept beside the adapter.

    Run it after training, with the data of the training (`trl-sharelora reward --confidence ellipsoid` does). The
    features are those of the model as it is now: after more training, run it again.

    Args:
        model_or_path ([`~peft.PeftModel`], `str` or `os.PathLike`):
            A ShareLoRA reward model, or where it was saved.
        dataset ([`~datasets.Dataset`]):
            The comparisons it was trained on; see [`~trl_sharelora.data.check_preference_rows`].
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The tokenizer; by default the one saved with the adapter.
        kind (`str`, *optional*, defaults to `"ellipsoid"`):
            `"ellipsoid"`, or `"heads"`: an ensemble of score heads, each fitted to a bootstrap sample of the
            comparisons.
        user_column (`str`, *optional*, defaults to `"user_id"`):
            The column that names the user.
        batch_size (`int`, *optional*, defaults to 16):
            Sequences per forward.
        max_length (`int`, *optional*):
            Comparisons with a longer text are left out and counted in the log, as in training.
        ridge (`float`, *optional*), pooled_discount (`float`, *optional*):
            Of the ellipsoids (and the ridge of the heads), see [`~trl_sharelora.pessimism.EllipsoidBuilder`]; by
            default its own.
        members (`int`, *optional*, defaults to 5):
            Number of heads; https://huggingface.co/papers/2310.02743 finds 4 to 5 enough.
        seed (`int`, *optional*, defaults to 0):
            Of the bootstrap samples.
        parameters (`str`, *optional*, defaults to `"last_layer"`):
            Features of the ellipsoids, see [`UserReward`].
        save (`bool`, *optional*, defaults to `True`):
            Write the sets into `confidence/` of the adapter's directory. A model in memory needs `output_dir` for that
            and is not saved without.
        output_dir (`str` or `os.PathLike`, *optional*):
            The adapter's directory, if it is not `model_or_path`.
        **loading:
            See [`load_reward_model`].

    Returns:
        [`~trl_sharelora.pessimism.EllipsoidSets`], or `torch.Tensor` `(members, d)` for heads.

    Raises:
        ConfigError, DataError, UserIdError, UnknownUserError: Before any forward.
        NonFiniteError: A feature is NaN or infinite; names the users.
    """
    _check_known("kind", kind, KINDS)
    _check_known("parameters", parameters, PARAMETERS)
    scorer, path = _open(model_or_path, processing_class, batch_size, loading)
    directory = os.fspath(output_dir) if output_dir is not None else path
    if save and path is not None and directory is not None and not Path(directory).is_dir():
        raise ConfigError(
            f"{directory!r} is no directory here, so nothing can be saved in it; give output_dir=... or save=False."
        )
    if kind == "heads" and parameters != "last_layer":
        raise ConfigError(f"Heads stand on the last layer; parameters={parameters!r} is for kind='ellipsoid'.")
    settings: dict[str, Any] = {"parameters": parameters, "sketch_size": SKETCH_SIZE, "sketch_seed": 0}
    chosen_options = {"ridge": ridge, "pooled_discount": pooled_discount}
    options: dict[str, Any] = {name: value for name, value in chosen_options.items() if value is not None}
    # index (n,), chosen (n, d), rejected (n, d) of some comparisons at a time
    pieces = _features_of(scorer, dataset, user_column, max_length, parameters, CountSketch())
    sets: EllipsoidSets | torch.Tensor
    if kind == "ellipsoid":
        size = SKETCH_SIZE if parameters == "own_factor" else scorer.head().in_features
        builder = EllipsoidBuilder(size, len(scorer.users), **options)
        for index, chosen, rejected in pieces:
            builder.add(index, chosen, rejected)
        sets = builder.finish()
    else:
        found = [(index, chosen - rejected) for index, chosen, rejected in pieces]
        users, differences = (torch.cat(part) for part in zip(*found, strict=True))
        options.pop("pooled_discount", None)
        head = scorer.head().weight.detach().float().squeeze(0).cpu()
        sets = bootstrap_heads(differences, head, members=members, seed=seed, user_index=users, **options)
        settings |= {"members": members, "seed": seed}
    if save and directory is not None:
        _save_sets(directory, kind, sets, settings, scorer)
    return sets


def add_comparisons(
    model_or_path: PeftModel | str | os.PathLike,
    dataset: Dataset,
    processing_class: Any = None,
    *,
    sets: EllipsoidSets | None = None,
    user_column: str = "user_id",
    batch_size: int = 16,
    max_length: int | None = None,
    parameters: str = "last_layer",
    output_dir: str | os.PathLike | None = None,
    **loading: Any,
) -> EllipsoidSets:
    """Count new comparisons of some users, without a pass over the others'; a user's ellipsoid never widens by it.

    The model stays as it is. Users who were added after [`fit_confidence`] get their first. Nothing remembers which comparisons were
    counted: the same ones again would be counted twice.

    Args:
        model_or_path ([`~peft.PeftModel`], `str` or `os.PathLike`):
            As in [`fit_confidence`]; a saved one's ellipsoids are saved again.
        dataset ([`~datasets.Dataset`]):
            The new comparisons only.
        sets ([`~trl_sharelora.pessimism.EllipsoidSets`], *optional*):
            Of a model in memory; changed in place. By default those saved with the adapter.
        parameters (`str`, *optional*, defaults to `"last_layer"`):
            What `sets` are of; saved ones know.
        processing_class, user_column, batch_size, max_length, output_dir, **loading:
            As in [`fit_confidence`].

    Raises:
        PessimismError: There are no ellipsoids, or those of another adapter.
    """
    scorer, path = _open(model_or_path, processing_class, batch_size, loading)
    directory = os.fspath(output_dir) if output_dir is not None else path
    settings: dict[str, Any] = {"parameters": parameters, "sketch_size": SKETCH_SIZE, "sketch_seed": 0}
    if sets is None:
        sets, settings = _load_sets(directory, "ellipsoid", scorer)
    assert sets is not None
    sketch = CountSketch(settings["sketch_size"], settings["sketch_seed"])
    for index, chosen, rejected in _features_of(
        scorer, dataset, user_column, max_length, settings["parameters"], sketch
    ):
        sets.add_comparisons(index, chosen - rejected)
    if directory is not None:
        _save_sets(directory, "ellipsoid", sets, settings, scorer)
    return sets


def _open(
    model_or_path: Any, processing_class: Any, batch_size: int, loading: dict[str, Any]
) -> tuple[_Scorer, str | None]:
    path = None
    if isinstance(model_or_path, str | os.PathLike):
        path = os.fspath(model_or_path)
        model_or_path, processing_class = load_reward_model(path, processing_class, **loading)
    return _Scorer(model_or_path, processing_class, batch_size), path


def _features_of(
    scorer: _Scorer, dataset: Dataset, user_column: str, max_length: int | None, parameters: str, sketch: CountSketch
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """`(user_index, features of chosen, features of rejected)` on the CPU, some batches of the dataset at a time."""
    check_preference_rows(dataset, user_column, name="confidence")
    dataset = dataset.with_format(None)
    ids = list(map(user_id_as_text, dataset[user_column][:]))
    all_index = torch.tensor(scorer.users.index(ids))
    step = 32 * scorer.batch_size  # enough to put rows of a length together
    dropped = 0
    for start in range(0, len(dataset), step):
        rows = dataset.select(range(start, min(start + step, len(dataset))))
        pairs = [tokenize_preference(row, scorer.processing_class) for row in rows]
        longest = [max(len(pair["chosen_ids"]), len(pair["rejected_ids"])) for pair in pairs]
        kept = [row for row, length in enumerate(longest) if max_length is None or length <= max_length]
        dropped += len(pairs) - len(kept)
        if scorer.positions is not None and any(longest[row] > scorer.positions for row in kept):
            long = [start + row for row in kept if longest[row] > scorer.positions]
            raise DataError(
                f"Comparisons have more tokens than the model has positions ({scorer.positions}): {some_rows(long)}. Give max_length, as in "
                "training, to leave them out."
            )
        if not kept:
            continue
        index = all_index[start:][kept]
        sequences = [pairs[row][side] for side in ("chosen_ids", "rejected_ids") for row in kept]
        _, features = scorer.rewards_and_features(sequences, index.repeat(2), parameters, sketch)
        features = features.cpu()
        bad = (~features.isfinite().all(1)).reshape(2, -1).any(0)
        if bool(bad.any()):
            users = list(dict.fromkeys(ids[start + kept[row]] for row in bad.nonzero().flatten().tolist()))
            raise NonFiniteError(
                f"The features of {int(bad.sum())} comparisons are NaN or infinite: user(s) {', '.join(map(repr, users[:5]))}. Their "
                "training has diverged, or the base's dtype overflows; go back to an earlier checkpoint."
            )
        yield index, features[: len(kept)], features[len(kept) :]
    if dropped:
        logger.warning(
            f"{dropped} of {len(dataset)} comparisons are longer than max_length={max_length} and are left out."
        )
    if dropped == len(dataset):
        raise DataError(f"All {len(dataset)} comparisons are longer than max_length={max_length} tokens; raise it.")


def _save_sets(directory: str, kind: str, sets: Any, settings: dict[str, Any], scorer: _Scorer) -> None:
    tensors = {"heads": sets} if kind == "heads" else sets.tensors()
    tensors = {f"set.{name}": tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    content = {
        **settings,
        "version": VERSION,
        "registry_id": scorer.users.registry_id,
        "num_users": len(scorer.users),
        "model": scorer.fingerprint(),
        "set": {} if kind == "heads" else sets.settings(),
    }
    folder = Path(directory, CONFIDENCE_FOLDER)
    folder.mkdir(parents=True, exist_ok=True)
    _write_sets(folder, kind, tensors, content)


def _write_sets(folder: Path, kind: str, tensors: dict[str, torch.Tensor], content: dict[str, Any]) -> None:
    """Tensors, then the settings, each whole or not at all; a token in both says that they belong together."""
    if os.environ.get("RANK", "0") != "0":
        return  # every process of a launched script gets here with the same sets
    token = uuid.uuid4().hex
    temporary = folder / f"{kind}.{token}.tmp"
    save_file(tensors, temporary, metadata={"token": token})
    os.replace(temporary, folder / f"{kind}.safetensors")
    temporary = folder / f"{kind}.{token}.tmp"
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump({**content, "token": token}, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, folder / f"{kind}.json")


def forget_in_confidence(directory: str | os.PathLike, row: int) -> bool:
    """Drop a user's own comparisons from the saved ellipsoids of an adapter; the other users' stay as they are.

    Args:
        directory (`str` or `os.PathLike`):
            Of the adapter.
        row (`int`):
            The user's row of the bank.

    Returns:
        `bool`: whether there were ellipsoids.
    """
    folder = Path(directory, CONFIDENCE_FOLDER)
    if not (folder / "ellipsoid.json").is_file():
        return False
    content = json.loads((folder / "ellipsoid.json").read_text(encoding="utf-8"))
    tensors = load_file(folder / "ellipsoid.safetensors")
    inner = {name.removeprefix("set."): tensor for name, tensor in tensors.items() if name.startswith("set.")}
    sets = EllipsoidSets.from_tensors(inner, content["set"])
    if row < sets.num_users:
        sets.remove(row)
        changed = {f"set.{name}": tensor.contiguous() for name, tensor in sets.tensors().items()}
        _write_sets(folder, "ellipsoid", tensors | changed, content)
    return True


def _load_sets(directory: str | None, kind: str, scorer: _Scorer) -> tuple[Any, dict[str, Any]]:
    """The sets of an adapter and their settings.

    Raises:
        PessimismError: never fitted, torn, of another registry or of other weights.
    """
    remedy = (
        f"Fit them to the training comparisons: fit_confidence({repr(directory) if directory else 'model'}, train_dataset, "
        f"kind={kind!r}), or train with "
        f"`trl-sharelora reward --confidence {kind}`."
    )
    what = "ellipsoids" if kind == "ellipsoid" else "ensemble of heads"
    if directory is None:
        raise PessimismError(f"A model in memory came without its {what}. {remedy} Give what it returns as sets=... .")
    folder = Path(directory, CONFIDENCE_FOLDER)
    if not Path(directory).is_dir():
        folder = _from_hub(directory, kind) or folder
    if not (folder / f"{kind}.json").is_file():
        raise PessimismError(
            f"There are no {what} in {str(folder)!r}: they were never fitted for this adapter. {remedy}"
        )
    try:
        settings = json.loads((folder / f"{kind}.json").read_text(encoding="utf-8"))
        with safe_open(folder / f"{kind}.safetensors", "pt") as file:
            token = (file.metadata() or {}).get("token")
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        if settings["version"] != VERSION or token != settings["token"]:
            raise ValueError(f"version {settings['version']}, tokens {token!r} and {settings['token']!r}")
        registry_id, num_users = settings["registry_id"], settings["num_users"]
        inner = {name.removeprefix("set."): tensor for name, tensor in tensors.items() if name.startswith("set.")}
        sets = inner["heads"] if kind == "heads" else EllipsoidSets.from_tensors(inner, settings["set"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise PessimismError(
            f"The {what} in {str(folder)!r} are torn, or of two different saves ({error!r}). {remedy}"
        ) from error
    if registry_id != scorer.users.registry_id or num_users > len(scorer.users):
        raise PessimismError(
            f"The {what} in {str(folder)!r} are of another list of users ({num_users} users; the adapter has {len(scorer.users)}), so their "
            f"rows would be of the wrong users. {remedy}"
        )
    if settings["model"] != scorer.fingerprint():
        raise PessimismError(
            f"The {what} in {str(folder)!r} were fitted to other weights: the adapter was trained on since, and its features are others "
            f"now. {remedy}"
        )
    return sets, settings


def _from_hub(repo_id: str, kind: str) -> Path | None:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo_id, allow_patterns=f"{CONFIDENCE_FOLDER}/{kind}.*"), CONFIDENCE_FOLDER)
    except (OSError, ValueError):
        return None
