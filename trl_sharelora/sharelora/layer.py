"""The layer: `W0 x + s * B (A_u x)`, a row of the batch with its own user's factor."""

import functools
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from peft.utils import quantization_extra_repr, resolve_quantization_backend
from peft.utils.other import transpose
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..errors import RoutingError, UnsupportedError
from .bank import ResidentBank, SlotBank
from .config import PERSONAL_FACTOR, ShareLoraConfig
from .routing import Route, Router
from .sandwich import ExpandOwn, ExpandShared, Gather, ShrinkOwn, ShrinkShared, add_shared, factors, gather, project


# Linear modules whose forward and backward make new tensors. By name, because bitsandbytes need not be installed.
_PLAIN = {"torch": ("Linear",), "transformers": ("Conv1D",), "bitsandbytes": ("Linear8bitLt", "Linear4bit")}


class AdapterDropout(nn.Module):
    """Dropout of the adapter's input; not an `nn.Dropout`, whose rate TRL's `disable_dropout` sets to zero unasked.

    Args:
        p (`float`):
            Share of entries set to zero while training.
    """

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(x, self.p, self.training) if self.p else x

    def extra_repr(self) -> str:
        return f"p={self.p}"


class Scale(nn.Module):
    """The common diagonal `(r,)` of `share="diagonal"`, one at the start."""

    def __init__(self, r: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(r))


class ShareLoraLayer(BaseTunerLayer):
    """What a ShareLoRA layer keeps per adapter, whatever module it wraps.

    `sharelora_A`, `sharelora_B`, `sharelora_C` hold the factors: shared ones as `nn.Linear` (or nothing), the personal
    one as a bank of moves; `sharelora_common` holds what the moves start from (A_0 for `share="B"`).
    """

    adapter_layer_names = ("sharelora_A", "sharelora_B", "sharelora_C", "sharelora_common")
    other_param_names = ("r", "lora_alpha", "scaling", "share", "sharelora_dropout")

    def __init__(self, base_layer: nn.Module, router: Router):
        self.base_layer = base_layer
        self.router = router
        self.quantization_backend = resolve_quantization_backend(self.get_base_layer())
        # ModuleDicts, not ParameterDicts: TRL copies a reference adapter by names with ".default." inside (facts: a
        # ParameterDict's end in ".default" and are missed without a word)
        self.sharelora_A = nn.ModuleDict()
        self.sharelora_B = nn.ModuleDict()
        self.sharelora_C = nn.ModuleDict()
        self.sharelora_common = nn.ModuleDict()
        self.sharelora_dropout = nn.ModuleDict()
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self.share: dict[str, str] = {}
        self.frozen_peft_weight_names: dict[str, tuple[str, ...]] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.merged_user = -1  # nobody
        self.in_features, self.out_features = _get_in_out_features(self.get_base_layer())

    def update_layer(self, adapter_name: str, config: ShareLoraConfig) -> None:
        """Add an adapter to the layer."""
        r, users = config.r, len(config.users)
        # Drawn in the order of peft's LoRA, so that the same seed gives the same A.
        A = nn.Linear(self.in_features, r, bias=False)  # weight (r, in)
        B = nn.Linear(r, self.out_features, bias=False)  # weight (out, r)
        if config.init_lora_weights:
            nn.init.kaiming_uniform_(A.weight, a=math.sqrt(5))  # uniform within 1 / sqrt(in)
            nn.init.zeros_(B.weight)

        def bank(*shape: int) -> nn.Module:
            # a bank in a store is connected by the model, which knows all its modules
            return SlotBank(shape) if config.bank in ("ram", "mmap") else ResidentBank(users, shape)

        common: nn.Module
        if config.share == "B":
            self.sharelora_A[adapter_name] = bank(r, self.in_features)
            self.sharelora_B[adapter_name] = B
            common = A
        elif config.share == "A":
            self.sharelora_A[adapter_name] = A
            self.sharelora_B[adapter_name] = bank(self.out_features, r)
            common = B
        elif config.share == "none":
            # the moves of A and of B side by side; both start from what is common, A_0 and B_0
            self.sharelora_A[adapter_name] = bank(r, self.in_features + self.out_features)
            self.sharelora_B[adapter_name] = B
            common = A
        else:
            self.sharelora_A[adapter_name] = A
            self.sharelora_B[adapter_name] = B
            if config.share == "AB":
                self.sharelora_C[adapter_name] = bank(r, r)
                common = nn.Linear(r, r, bias=False)
                nn.init.eye_(common.weight)  # C_0 = I: the common model is plain LoRA
            else:
                self.sharelora_C[adapter_name] = bank(r)
                common = Scale(r)
        self.sharelora_common[adapter_name] = common
        self.sharelora_dropout[adapter_name] = AdapterDropout(config.lora_dropout)
        self.r[adapter_name] = r
        self.lora_alpha[adapter_name] = config.lora_alpha
        self.scaling[adapter_name] = config.scaling
        self.share[adapter_name] = config.share
        if config.init_users == "independent":
            self._draw_starts(adapter_name)
        if not config.train_common:
            # PEFT switches requires_grad on again at every set_adapter or disable_adapter, but not for these
            common_names = ("sharelora_common", "sharelora_B") if config.share == "none" else ("sharelora_common",)
            self.frozen_peft_weight_names[adapter_name] = common_names
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    @torch.no_grad()
    def _draw_starts(self, adapter_name: str) -> None:
        """Give each user an A_u of his own draw, on LoRA's scale: D_u = draw - A_0."""
        common = self.sharelora_common[adapter_name].weight
        bank = self.sharelora_A[adapter_name]
        assert isinstance(bank, ResidentBank)
        for row in bank.weight:
            drawn = torch.empty_like(common)
            nn.init.kaiming_uniform_(drawn, a=math.sqrt(5))  # uniform within 1 / sqrt(in)
            row[:, : self.in_features] = drawn - common

    def start(self, adapter_name: str) -> torch.Tensor:
        """What the moves start from, in the shape of a move: A_0, or `[A_0 | B_0']` of `share="none"`."""
        common = self.sharelora_common[adapter_name].weight
        if self.share[adapter_name] != "none":
            return common
        return torch.cat([common, self.sharelora_B[adapter_name].weight.mT], dim=1)

    def bank(self, adapter_name: str) -> ResidentBank | SlotBank:
        """The users' own part of an adapter."""
        return getattr(self, f"sharelora_{PERSONAL_FACTOR[self.share[adapter_name]]}")[adapter_name]

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT would also cast to the base's dtype. The factors stay float32: in bf16 only a third of A's entries ever move
        # at the default learning rate.
        base_device, _ = self._get_base_layer_device_and_dtype(self.get_base_layer())
        device = device if device is not None else base_device
        for name in (*self.adapter_layer_names, "sharelora_dropout"):
            module = getattr(self, name)
            if adapter_name in module and not any(p.device.type == "meta" for p in module[adapter_name].parameters()):
                module[adapter_name].to(device)

    def extra_repr(self) -> str:
        return quantization_extra_repr(self)


class Linear(nn.Module, ShareLoraLayer):
    """A frozen linear module (`nn.Linear`, `Conv1D`, 8-bit, 4-bit or otherwise quantised) with ShareLoRA.

    Args:
        base_layer (`nn.Module`):
            The module to wrap; frozen.
        adapter_name (`str`):
            Name of its first adapter.
        config ([`ShareLoraConfig`]):
            Of that adapter.
        router ([`Router`]):
            Of the model.

    Raises:
        UnsupportedError: the module is not linear.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: ShareLoraConfig, router: Router):
        nn.Module.__init__(self)
        ShareLoraLayer.__init__(self, base_layer, router)
        base = self.get_base_layer()
        quantised_linear = self.quantization_backend is not None and self.quantization_backend.layer_type == "linear"
        if not isinstance(base, nn.Linear | Conv1D) and not quantised_linear:
            raise UnsupportedError(
                f"ShareLoRA adapts linear modules (nn.Linear, Conv1D, quantised ones); {type(base).__name__} is targeted. Name "
                "only linear modules in target_modules, or list this one in exclude_modules or modules_to_save."
            )
        self.fan_in_fan_out = config.fan_in_fan_out or isinstance(base, Conv1D)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Rows `(batch, ..., in)` -> `(batch, ..., out)`, each with its own user's factor.

        Raises:
            RoutingError: no route is open, or it has another number of users than `x` has rows.
        """
        if self.disable_adapters and self.merged:
            self.unmerge()
        active = [] if self.disable_adapters else [name for name in self.active_adapters if name in self.sharelora_A]
        if not active:
            return self.base_layer(x, *args, **kwargs)
        route = self._route_of(x)
        if self.merged:
            self._check_merged_user(route)
            return self.base_layer(x, *args, **kwargs)
        if torch.compiler.is_compiling():
            y = self.base_layer(x, *args, **kwargs)
            for adapter_name in active:
                y = self.reference(adapter_name, x, y, route)
            return y
        dtype = _compute_dtype(x)
        if x.dtype != dtype and type(self.base_layer) in (nn.Linear, Conv1D):
            # Under autocast with float32 activations the base would cast x by itself. Cast once for both: then dx comes back in
            # the type of the adapter's product, and no second cast is made in the backward.
            x = x.to(dtype)
        expansions = []
        for adapter_name in active:
            x, expand = self._shrink(adapter_name, x, route)
            expansions.append(expand)
        y = self.base_layer(x, *args, **kwargs)
        for expand in expansions:
            y = expand(y)
        return y

    def _shrink(
        self, adapter_name: str, x: torch.Tensor, route: Route
    ) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
        """First half of the sandwich: x for the base to use, and what adds the adapter to the base's output."""
        share, scaling, dtype = self.share[adapter_name], self.scaling[adapter_name], _compute_dtype(x)
        A, B = self.sharelora_A[adapter_name], self.sharelora_B[adapter_name]
        rows = self.bank(adapter_name).rows(route, self.start(adapter_name))
        plain = self._base_is_plain()
        dropped = self.sharelora_dropout[adapter_name](x)
        if share == "none":
            return x, functools.partial(self._add_own, dropped, Gather.apply(*rows, dtype), scaling)

        # The paper's sentence: one B for everybody, one A for each user. (3.3), Algorithm 2.
        if share == "B" and not torch.is_grad_enabled():
            through, h = dropped, project(dropped, factors(rows, dtype), rows.inverse, scaling, dtype)
        elif share == "B":
            through, h = ShrinkOwn.apply(dropped, *rows, scaling, dtype, plain)
        else:
            through, h = ShrinkShared.apply(dropped, A.weight, scaling, dtype, plain)
        if share == "AB":
            h = torch.bmm(h, Gather.apply(*rows, dtype).mT)
        elif share == "diagonal":
            h = h * Gather.apply(*rows, dtype).unsqueeze(1)

        def expand(y: torch.Tensor) -> torch.Tensor:
            fresh = self._fresh(y, plain and y.dtype == dtype)
            if share != "A":
                if fresh is None:
                    return y + F.linear(h, B.weight.to(dtype)).reshape(y.shape).to(y.dtype)
                added = ExpandShared.apply if torch.is_grad_enabled() else add_shared
                return added(fresh, h, B.weight).reshape(y.shape)
            if fresh is None:
                return y + torch.bmm(h, Gather.apply(*rows, dtype).mT).reshape(y.shape).to(y.dtype)
            return ExpandOwn.apply(fresh, h, *rows).reshape(y.shape)

        return (through if dropped is x else x), expand

    def _add_own(self, x: torch.Tensor, own: torch.Tensor, scaling: float, y: torch.Tensor) -> torch.Tensor:
        """`y + s B_u (A_u x)`: both factors of each row's own user, `own` `(batch, r, in + out)`."""
        down, up = own.split([self.in_features, self.out_features], dim=2)
        h = torch.bmm(x.reshape(len(own), -1, x.shape[-1]).to(own.dtype), down.mT) * scaling
        return y + torch.bmm(h, up).reshape(y.shape).to(y.dtype)

    def _base_is_plain(self) -> bool:
        """Whether the base's output and its dx are fresh tensors that nobody else holds."""
        base = self.base_layer
        kind = type(base)
        known = kind.__name__ in _PLAIN.get(kind.__module__.split(".")[0], ())
        return known and not (base._forward_hooks or base._backward_hooks or base._backward_pre_hooks)

    def _fresh(self, y: torch.Tensor, plain: bool) -> torch.Tensor | None:
        """y, or the tensor it is the whole view of, if it can be written into; None if not."""
        if not plain or (y.is_leaf and y.requires_grad):
            return None
        if not y._is_view():
            return y if y.is_contiguous() else None
        # a linear module with a bias gives a view of its product of tokens
        whole = y._base
        sound = (
            type(self.base_layer) in (nn.Linear, Conv1D)
            and whole is not None
            and whole.numel() == y.numel()
            and whole.is_contiguous()
            and y.is_contiguous()
            and not whole.is_leaf
        )
        return whole if sound else None

    def reference(self, adapter_name: str, x: torch.Tensor, y: torch.Tensor, route: Route) -> torch.Tensor:
        """`y + s * B (A_u x)` in plain operations, for `x` `(batch, ..., in)` and the base's output `y` `(batch, ..., out)`."""
        share, scaling, dtype = self.share[adapter_name], self.scaling[adapter_name], _compute_dtype(x)
        A, B = self.sharelora_A[adapter_name], self.sharelora_B[adapter_name]
        rows = self.bank(adapter_name).rows(route, self.start(adapter_name))
        # The factors are cast to x's type, never x to theirs: under autocast x is the larger by far.
        own = gather(rows, dtype)  # (batch, *move)
        if share == "none":
            return self._add_own(self.sharelora_dropout[adapter_name](x), own, scaling, y)
        h = self.sharelora_dropout[adapter_name](x).reshape(x.shape[0], -1, x.shape[-1]).to(dtype)  # (batch, seq, in)
        h = (torch.bmm(h, own.mT) if share == "B" else F.linear(h, A.weight.to(dtype))) * scaling  # (batch, seq, r)
        if share == "AB":
            h = torch.bmm(h, own.mT)
        elif share == "diagonal":
            h = h * own.unsqueeze(1)
        update = torch.bmm(h, own.mT) if share == "A" else F.linear(h, B.weight.to(dtype))
        return y + update.reshape(y.shape).to(y.dtype)

    def _route_of(self, x: torch.Tensor) -> Route:
        route = self.router.current()
        if route is None:
            raise RoutingError(
                f"A batch of {x.shape[0]} row(s) came without user ids. Open a route with `with use_users(model, ids):` or call "
                "the model with user_ids=[...], one per row. (With an activation checkpointing that is not transformers' "
                "own, keep `use_users` open around the backward too.)"
            )
        if len(route.user_index) != x.shape[0]:
            raise RoutingError(
                f"{len(route.user_index)} user ids came for {x.shape[0]} rows. A preference batch has two rows per pair "
                "([chosen; rejected]: repeat the ids twice), beams and several returned sequences multiply the rows. Packed "
                "or padding-free batches and modules that flatten tokens before a linear layer (mixtures of experts) "
                "cannot be used: their rows are not samples."
            )
        return route

    def _check_merged_user(self, route: Route) -> None:
        others = int(torch.ne(route.user_index, self.merged_user).sum())
        if others:
            raise RoutingError(
                f"The adapter of user {self.router.users[self.merged_user]!r} is merged into the base, but {others} row(s) belong "
                "to other users. Unmerge first (model.unmerge_adapter())."
            )

    # -- one user as a weight -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def get_delta_weight(self, adapter_name: str, user_index: int) -> torch.Tensor:
        """`s * B A_u` of one user, as the base stores its weight: `(out, in)`, or `(in, out)` for `Conv1D`."""
        share, common = self.share[adapter_name], self.sharelora_common[adapter_name].weight
        # the personal one of the two is not read
        A = common if share in ("B", "none") else self.sharelora_A[adapter_name].weight
        B = common if share == "A" else self.sharelora_B[adapter_name].weight
        down, up = lora_factors(share, A, B, common, self.bank(adapter_name).move(user_index))
        return transpose(self.scaling[adapter_name] * (up @ down), self.fan_in_fan_out)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the open route's user to the base weight.

        Args:
            safe_merge (`bool`, *optional*, defaults to `False`):
                Check the result for NaN before it replaces the base weight.
            adapter_names (`list[str]`, *optional*):
                Which adapters; by default the active ones.

        Raises:
            RoutingError: the route names no user, or more than one.
        """
        route = self.router.current()
        users = [] if route is None else route.user_index.unique().tolist()
        if self.merged and users != [self.merged_user]:
            raise RoutingError(
                f"User {self.router.users[self.merged_user]!r} is merged into the base already. Unmerge first "
                "(model.unmerge_adapter())."
            )
        adapter_names = check_adapters_to_merge(self, adapter_names)
        if adapter_names and (len(users) != 1 or users[0] < 0):
            raise RoutingError(
                f"Only one user can be merged into the base weights; {len(users)} are named. Call "
                'model.merge_and_unload(user="ann"), or `with use_users(model, ["ann"]): model.merge_adapter()`.'
            )
        for adapter_name in adapter_names:
            if adapter_name in self.sharelora_A:
                self._add_to_base(self.get_delta_weight(adapter_name, users[0]), safe_merge)
                self.merged_adapters.append(adapter_name)
                self.merged_user = users[0]

    def unmerge(self) -> None:
        """Take the merged user out of the base weight again."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        while self.merged_adapters:
            adapter_name = self.merged_adapters.pop()
            self._add_to_base(-self.get_delta_weight(adapter_name, self.merged_user), safe_merge=False)
        self.merged_user = -1

    def _add_to_base(self, delta: torch.Tensor, safe_merge: bool) -> None:
        weight = self.get_base_weight()
        merged = delta.to(weight.device) + weight  # in float32, or a wider base's type
        if safe_merge and not merged.isfinite().all():
            raise ValueError("NaN or Inf in the merged weights; the adapter seems to be broken.")
        self.set_base_weight(merged.to(weight.dtype))

    def __repr__(self) -> str:
        return "sharelora." + super().__repr__()


def _compute_dtype(x: torch.Tensor) -> torch.dtype:
    """The type an adapter is computed in: autocast's, or that of its input."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def lora_factors(
    share: str, A: torch.Tensor, B: torch.Tensor, common: torch.Tensor, move: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """One user as the two factors of an ordinary LoRA, without the scaling.

    Args:
        share (`str`):
            Form of the adapter.
        A (`torch.Tensor`):
            The shared down-projection `(r, in)`; not read for `share="B"` and `"none"`.
        B (`torch.Tensor`):
            The shared up-projection `(out, r)`, or B_0 for `share="none"`; not read for `share="A"`.
        common (`torch.Tensor`):
            What the moves start from: A_0, B_0, C_0 or the diagonal.
        move (`torch.Tensor`):
            The user's own move, of the same shape; for `share="none"` `(r, in + out)`, those of both factors.

    Returns:
        `tuple`: down `(r, in)` and up `(out, r)`.
    """
    if share == "none":
        down, up = move.split([common.shape[1], move.shape[1] - common.shape[1]], dim=1)
        return common + down, B + up.mT
    own = common + move
    if share == "B":
        return own, B
    if share == "A":
        return A, own
    if share == "AB":
        return own @ A, B
    return own.unsqueeze(1) * A, B
