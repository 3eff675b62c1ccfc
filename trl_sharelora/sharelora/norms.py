"""The norm constraint of (3.3), `||dTheta_u||_F <= B`, on each user's own move: by projection, or as a ridge.

The paper (https://huggingface.co/papers/2503.19201, section 3) bounds the norm in the class its maximum likelihood searches; how is not
said, and its experiments do without. The two mechanisms here are ours. Both act on what a user's own move D_u adds to the
effective weights of all adapted modules together,

    M_u = s B D_u  (share="B"),  s D_u A  ("A"),  s B D_u A  ("AB"),  s B diag(D_u) A  ("diagonal"),

and for share="none", where both factors move, on M_u = s ((B_0 + D_B)(A_0 + D_A) - B_0 A_0). Norms come from r x r Gram matrices; M_u, of
the size of the base's weights, is never formed.
"""

from typing import NamedTuple

import torch
from torch import nn

from ..errors import ConfigError
from .bank import ResidentBank, SlotBank, WorkingSet
from .layer import ShareLoraLayer


BISECTIONS = 40  # of the factor in (0, 1]: to float32's last digit


class _Part(NamedTuple):
    """One module: its users' moves, and what makes a norm of them."""

    layer: ShareLoraLayer
    moves: torch.Tensor  # (slots, *shape)
    at: torch.Tensor  # (users,) int64: the slots of the users asked for


class UserNorms:
    """Norms of the users' own moves, kept below a bound or shrunk.

    Args:
        model (`nn.Module`):
            With ShareLoRA layers.
        adapter_name (`str`):
            Which adapter.
        bound (`float`, *optional*):
            B of (3.3), in the units of the effective weights, over all adapted modules together. A user beyond it is scaled back onto it.
        ridge (`float`, *optional*, defaults to 0):
            Strength of a penalty `ridge / 2 * ||M_u||_F^2`.

    Raises:
        ConfigError: a ridge with `share="none"`, where it is not a quadratic of the move.
    """

    def __init__(
        self, model: nn.Module, adapter_name: str = "default", bound: float | None = None, ridge: float = 0.0
    ):
        self.adapter_name = adapter_name
        self.layers = [
            module for module in model.modules() if isinstance(module, ShareLoraLayer) and adapter_name in module.share
        ]
        self.bound, self.ridge = bound, ridge
        if ridge and any(layer.share[adapter_name] == "none" for layer in self.layers):
            raise ConfigError(
                f"user_ridge={ridge} came with share='none', where both factors of a user move and the penalty is no quadratic of them. Use "
                "user_norm_bound, or user_weight_decay."
            )

    @torch.no_grad()
    def norms(self, rows: list[int]) -> torch.Tensor:
        """`||M_u||_F` of some users, `(rows,)`, in float32."""
        working_set = self._working_set()
        if working_set is None:
            linear, cross, quadratic = self._polynomial(self._parts(rows))
        else:  # outside of a step nobody is in
            lease = working_set.acquire(torch.tensor(rows))
            try:
                linear, cross, quadratic = self._polynomial(self._parts(rows))
            finally:
                working_set.release(lease)
        return (linear + 2 * cross + quadratic).clamp(min=0).sqrt().float()

    @torch.no_grad()
    def after_step(self, rows: list[int], learning_rate: float) -> None:
        """Shrink and project the users who had data, after their rows were stepped.

        The ridge is an implicit step, D <- (I + lr ridge s^2 B'B)^-1 D: stable however large it is.

        Args:
            rows (`list[int]`):
                Rows of these users.
            learning_rate (`float`):
                Of the users' own part in this step.
        """
        working_set = self._working_set()
        rows = rows if working_set is None else working_set.mine(rows)
        if not rows or not self.layers:
            return
        parts = self._parts(rows)
        if self.ridge and learning_rate:
            for part in parts:
                self._shrink(part, learning_rate * self.ridge)
        if self.bound is not None:
            factor = self._factor(*self._polynomial(parts)).float()
            far = factor < 1
            if far.any():
                for _, moves, at in parts:
                    scale = factor[far].reshape(-1, *[1] * (moves.ndim - 1)).to(moves.device)
                    moves[at[far.to(at.device)]] = moves[at[far.to(at.device)]] * scale

    def at_end(self) -> None:
        """Bring all users of a resident bank within the bound: the shared factor has moved since the last visit of some."""
        if self.bound is not None and self.layers and self._working_set() is None:
            rows = list(range(len(self.layers[0].bank(self.adapter_name).weight)))
            self.after_step(rows, learning_rate=0.0)

    def _working_set(self) -> WorkingSet | None:
        bank = self.layers[0].bank(self.adapter_name) if self.layers else None
        return bank.working_set if isinstance(bank, SlotBank) else None

    def _parts(self, rows: list[int]) -> list[_Part]:
        parts = []
        for layer in self.layers:
            bank = layer.bank(self.adapter_name)
            if isinstance(bank, SlotBank):
                working_set = bank.working_set
                assert working_set is not None
                moves, places = working_set.module(bank.number, trainable=False), working_set.slots_of(rows)
            else:
                assert isinstance(bank, ResidentBank)
                moves, places = bank.weight.data, rows
            parts.append(_Part(layer, moves, torch.tensor(places, device=moves.device)))
        return parts

    def _gram(self, layer: ShareLoraLayer, factor: str) -> torch.Tensor:
        """`B'B` or `A A'` `(r, r)`, in float64."""
        weight = getattr(layer, f"sharelora_{factor}")[self.adapter_name].weight.double()
        return weight.mT @ weight if factor == "B" else weight @ weight.mT

    def _polynomial(self, parts: list[_Part]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Per user l, x, q of `||M(c D)||_F^2 = l c^2 + 2 x c^3 + q c^4`; x and q are zero unless both factors move."""
        device = parts[0].moves.device
        sums = torch.zeros(3, len(parts[0].at), dtype=torch.float64, device=device)
        for layer, moves, at in parts:
            share, scaling = layer.share[self.adapter_name], layer.scaling[self.adapter_name]
            own = moves[at].double()  # (users, *shape)
            found = [torch.zeros((), dtype=torch.float64)] * 3
            if share == "B":
                found[0] = ((self._gram(layer, "B") @ own) * own).flatten(1).sum(1)
            elif share == "A":
                found[0] = ((own @ self._gram(layer, "A")) * own).flatten(1).sum(1)
            elif share == "AB":
                found[0] = ((self._gram(layer, "B") @ own @ self._gram(layer, "A")) * own).flatten(1).sum(1)
            elif share == "diagonal":
                found[0] = ((own @ (self._gram(layer, "B") * self._gram(layer, "A"))) * own).sum(1)
            else:
                # M = (D_B A_0 + B_0 D_A) + D_B D_A, as [D_B, B_0][A_0; D_A] and D_B D_A
                A0 = layer.sharelora_common[self.adapter_name].weight.double().expand(len(own), -1, -1)
                B0 = layer.sharelora_B[self.adapter_name].weight.double().expand(len(own), -1, -1)
                down, up = own.split([layer.in_features, layer.out_features], dim=2)
                up = up.mT
                left, right = torch.cat([up, B0], 2), torch.cat([A0, down], 1)
                found[0] = _inner(left, right, left, right)
                found[1] = _inner(left, right, up, down)
                found[2] = _inner(up, down, up, down)
            sums += scaling**2 * torch.stack([part.to(device).expand(len(own)) for part in found])
        return sums[0], sums[1], sums[2]

    def _factor(self, linear: torch.Tensor, cross: torch.Tensor, quadratic: torch.Tensor) -> torch.Tensor:
        """What each user's move is multiplied with, `(users,)` in (0, 1], so that the norm is at most the bound."""
        assert self.bound is not None
        square = self.bound**2
        if not cross.any() and not quadratic.any():
            return (self.bound / linear.clamp(min=1e-300).sqrt()).clamp(max=1.0)
        low, high = torch.zeros_like(linear), torch.ones_like(linear)
        inside = linear + 2 * cross + quadratic <= square
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            fits = middle**2 * (linear + 2 * cross * middle + quadratic * middle**2) <= square
            low, high = torch.where(fits, middle, low), torch.where(fits, high, middle)
        return torch.where(inside, torch.ones_like(low), low)

    def _shrink(self, part: _Part, amount: float) -> None:
        layer, moves, at = part
        share, scaling = layer.share[self.adapter_name], layer.scaling[self.adapter_name]
        amount *= scaling**2
        own = moves[at].double()
        if share == "AB":
            # (I + amount B'B (x) A A') in the two Grams' own bases
            values_b, vectors_b = torch.linalg.eigh(self._gram(layer, "B"))
            values_a, vectors_a = torch.linalg.eigh(self._gram(layer, "A"))
            turned = vectors_b.mT @ own @ vectors_a / (1 + amount * values_b[:, None] * values_a)
            own = vectors_b @ turned @ vectors_a.mT
        else:
            gram = self._gram(layer, "A" if share == "A" else "B")
            if share == "diagonal":
                gram = gram * self._gram(layer, "A")
            system = torch.eye(len(gram), dtype=gram.dtype, device=gram.device) + amount * gram
            own = torch.linalg.solve(system, own) if share == "B" else torch.linalg.solve(system, own.mT).mT
        moves[at] = own.to(moves.dtype)


def _inner(
    left: torch.Tensor, right: torch.Tensor, other_left: torch.Tensor, other_right: torch.Tensor
) -> torch.Tensor:
    """`<left right, other_left other_right>_F` `(users,)`, through the small products."""
    return ((left.mT @ other_left) * (right @ other_right.mT)).flatten(1).sum(1)
