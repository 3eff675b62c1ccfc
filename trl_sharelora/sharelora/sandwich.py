"""The layer's arithmetic around an untouched base module: `x, h = Shrink(x)`, `y = base(x)`, `y = Expand(y, h)`.

An adapter's cost is passes over memory, not products. Two custom Functions save most of them:

- `Expand` adds `B h` into the base's fresh output instead of making a second one and adding the two.
- `Shrink` hands x to the base itself, so its node runs *after* the base's in the backward and adds `A_u' dh` into the base's
  fresh dx in place.
- x is kept once. The users' factors are put together once per user and module, not per row of the batch.
- The gradients of the users' rows are summed in float32 straight into the working set, where there is one.

The base is opaque: float, 8-bit, 4-bit or anything else. What is in place only saves passes; wherever it would not be sound
(another type, a view, an unknown kind of module) the same is computed out of place. `reference` in layer.py is the plain form
(gather, bmm, add) with the same results: for torch.compile, which fuses by itself, and for the tests.
"""

from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable


# with more users in a batch, one product with everybody's factors computes more than it saves
FEW_USERS = 16


class Rows(NamedTuple):
    """The users' own factors of one module and whose are the rows of the batch."""

    moves: torch.Tensor  # (slots, *shape), float32: D_u of each slot; a Parameter (resident) or the working set's
    common: torch.Tensor  # (*shape): what the moves start from, A_0
    # (users,) int64: the slots of the users of the batch; or a slice, if they are neighbours: then nothing is copied
    each: torch.Tensor | slice
    inverse: torch.Tensor | None  # (batch,) int64: place in `each` of each row; None if `each` has one entry per row
    # (users, 1, ...): 0. where the user is unseen and has no slot, else 1.; None if there is no such user
    seen: torch.Tensor | None = None
    # of a working set: gradients are added into `moves.grad` here, and the slots must still be those of the forward
    lease: Any | None = None
    number: int = -1  # of the module in the working set


def factors(rows: Rows, dtype: torch.dtype) -> torch.Tensor:
    """`A_0 + D_u` of each user, `(users, *shape)`, in `dtype`; summed in float32."""
    if isinstance(rows.each, slice):
        return (rows.moves[rows.each] + rows.common).to(dtype)
    own = rows.moves.index_select(0, rows.each)
    if rows.seen is not None:
        own = own * rows.seen
    return (own + rows.common if own.requires_grad or rows.common.requires_grad else own.add_(rows.common)).to(dtype)


def per_row(own: torch.Tensor, inverse: torch.Tensor | None) -> torch.Tensor:
    """Factors of each user `(users, ...)` -> of each row of the batch `(batch, ...)`."""
    return own if inverse is None else own.index_select(0, inverse)


def _groups(own: torch.Tensor, inverse: torch.Tensor | None) -> torch.Tensor:
    """Factors of each row, or those of the only user `(1, ...)`: then all rows go through one product, as in plain LoRA."""
    return own if len(own) == 1 else per_row(own, inverse)


def _grouped(x: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    return x.reshape(len(own), -1, x.shape[-1])


def gather(rows: Rows, dtype: torch.dtype) -> torch.Tensor:
    """`A_0 + D_u` for each row of the batch, `(batch, *shape)`."""
    return per_row(factors(rows, dtype), rows.inverse)


def _spread(rows: Rows, gradient: torch.Tensor, needs_moves: bool, needs_common: bool):
    """Gradients of `moves` and `common` from that of the factors of each row `(batch, *shape)`."""
    gradient = gradient.to(rows.moves.dtype)
    each = rows.each
    users = each.stop - each.start if isinstance(each, slice) else len(each)
    if rows.inverse is not None and not len(gradient) == users == 1:
        # First the rows of a user among themselves, then to what has accumulated, wherever that is: the same sums bit by bit.
        sums = gradient.new_zeros(users, *gradient.shape[1:])
        gradient = sums.index_add_(0, rows.inverse, gradient)
    common = gradient.sum(0).to(rows.common.dtype) if needs_common else None
    if not needs_moves:
        return None, common
    if rows.seen is not None:
        gradient = gradient * rows.seen
    if rows.lease is not None:
        assert rows.moves.grad is not None
        _add_to(rows.moves.grad, rows.each, gradient)
        return None, common
    if len(gradient) == len(rows.moves) and isinstance(rows.each, slice):
        return gradient, common  # all users, in order
    return _add_to(torch.zeros_like(rows.moves), rows.each, gradient), common


def _add_to(target: torch.Tensor, each: torch.Tensor | slice, gradient: torch.Tensor) -> torch.Tensor:
    if isinstance(each, slice):
        target[each].add_(gradient)
        return target
    return target.index_add_(0, each, gradient)


def project(
    x: torch.Tensor, own: torch.Tensor, inverse: torch.Tensor | None, scaling: float, dtype: torch.dtype
) -> torch.Tensor:
    """`h = s A_u x` `(batch, seq, r)` for x `(batch, ..., in)` with each row's own `A_u`, of the users' `(users, r, in)`."""
    users, r, _ = own.shape
    if x.numel() == x.shape[0] * x.shape[-1] and inverse is not None and 1 < users <= FEW_USERS:
        # A token per row, as while generating: the factors of all users in one product, of which each row keeps its own, reads
        # each factor once and not once per row.
        everyone = torch.mm(_two(x).to(dtype), own.reshape(users * r, -1).mT).view(-1, users, r)
        return everyone[torch.arange(len(everyone), device=x.device), inverse].mul_(scaling).unsqueeze(1)
    own = _groups(own, inverse)
    h = torch.bmm(_grouped(x, own).to(dtype), own.mT).mul_(scaling)
    return h.reshape(x.shape[0], -1, h.shape[-1])


def add_shared(y: torch.Tensor, h: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`y += h B'` in place, for y `(..., out)`, h `(batch, seq, r)` and one B `(out, r)` for all rows."""
    _two(y).addmm_(_two(h), weight.to(h.dtype).mT)
    return y


class _Function(torch.autograd.Function):
    """Keeps the users' factors in the type they are computed in, and where their gradients go.

    Per user and not per row: what is kept is r / tokens-of-a-user of x, and the backward need not look at the bank again.
    """

    @staticmethod
    def keep(ctx, rows: Rows, own: torch.Tensor, *others: torch.Tensor) -> None:
        ctx.save_for_backward(own, *others)
        ctx.rest = rows[2:]
        # the working set may grow until then: its tensors are looked up again
        ctx.versions = None if rows.lease is None else rows.lease.versions
        ctx.moves_and_common = rows[:2] if rows.lease is None else (None, rows.common)

    @staticmethod
    def kept(ctx) -> tuple[Any, ...]:
        """`(rows, factors of each row, others...)`."""
        moves, common = ctx.moves_and_common
        *_, lease, number = ctx.rest
        if lease is not None:
            lease.check(ctx.versions)
            moves = lease.working_set.module(number)
        rows = Rows(moves, common, *ctx.rest)
        own, *others = ctx.saved_tensors
        return rows, own, *others


class Gather(_Function):
    """The users' own factors per row of the batch, `(batch, *shape)`; for the small ones (r x r core, diagonal)."""

    @staticmethod
    def forward(ctx, moves, common, each, inverse, seen, lease, number, dtype):
        rows = Rows(moves, common, each, inverse, seen, lease, number)
        own = factors(rows, dtype)
        _Function.keep(ctx, rows, own)
        return per_row(own, inverse)

    @staticmethod
    @once_differentiable
    def backward(ctx, own_gradient):
        rows, _ = _Function.kept(ctx)
        return *_spread(rows, own_gradient, *ctx.needs_input_grad[:2]), *[None] * 6


class ShrinkOwn(_Function):
    """`(x, h)`: x for the base to use, and `h = s A_u x` `(batch, seq, r)` with each row's own `A_u` `(r, in)`."""

    @staticmethod
    def forward(ctx, x, moves, common, each, inverse, seen, lease, number, scaling, dtype, in_place):
        rows = Rows(moves, common, each, inverse, seen, lease, number)
        own = factors(rows, dtype)
        _Function.keep(ctx, rows, own, x)
        ctx.scaling, ctx.dtype, ctx.in_place = scaling, dtype, in_place
        return _pass_on(ctx, x), project(x, own, inverse, scaling, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dx, dh):
        if dh is None:
            return dx, *[None] * 10
        rows, own, x = _Function.kept(ctx)
        own = _groups(own, rows.inverse)
        needs_x, needs_moves, needs_common = ctx.needs_input_grad[:3]
        dh = _grouped(dh * ctx.scaling, own)
        if needs_x:
            dx = _add_product(dx, dh, own, x, ctx.in_place)
        moves = common = None
        if needs_moves or needs_common:
            moves, common = _spread(rows, torch.bmm(dh.mT, _grouped(x, own).to(ctx.dtype)), needs_moves, needs_common)
        return dx if needs_x else None, moves, common, *[None] * 8


class ShrinkShared(torch.autograd.Function):
    """`(x, h)`: x for the base to use, and `h = s A x` `(batch, seq, r)` with one `A` `(r, in)` for all rows."""

    @staticmethod
    def forward(ctx, x, weight, scaling, dtype, in_place):
        ctx.save_for_backward(x, weight)
        ctx.scaling, ctx.dtype, ctx.in_place = scaling, dtype, in_place
        through = _pass_on(ctx, x)
        return through, torch.matmul(_three(x).to(dtype), weight.to(dtype).mT).mul_(scaling)

    @staticmethod
    @once_differentiable
    def backward(ctx, dx, dh):
        if dh is None:
            return dx, None, None, None, None
        x, weight = ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        dh = dh * ctx.scaling
        if needs_x:
            dx = _add_product(dx, dh, weight.to(ctx.dtype), x, ctx.in_place)
        gradient = None
        if needs_weight:
            gradient = (_two(dh).mT @ _two(x).to(ctx.dtype)).to(weight.dtype)
        return dx if needs_x else None, gradient, None, None, None


class ExpandShared(torch.autograd.Function):
    """`y += h B'` in place, for y `(..., out)`, h `(batch, seq, r)` and one B `(out, r)` for all rows."""

    @staticmethod
    def forward(ctx, y, h, weight):
        ctx.save_for_backward(h, weight)
        ctx.mark_dirty(y)
        return add_shared(y, h, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        h, weight = ctx.saved_tensors
        dh = (_two(dy) @ weight.to(h.dtype)).reshape(h.shape) if ctx.needs_input_grad[1] else None
        gradient = (_two(dy).mT @ _two(h)).to(weight.dtype) if ctx.needs_input_grad[2] else None
        return dy, dh, gradient


class ExpandOwn(_Function):
    """`y += B_u h` in place, for y `(batch, ..., out)`, h `(batch, seq, r)` and each row's own `B_u` `(out, r)`."""

    @staticmethod
    def forward(ctx, y, h, moves, common, each, inverse, seen, lease, number):
        rows = Rows(moves, common, each, inverse, seen, lease, number)
        own = factors(rows, h.dtype)
        _Function.keep(ctx, rows, own, h)
        ctx.mark_dirty(y)
        own = _groups(own, inverse)
        y.view(len(own), -1, y.shape[-1]).baddbmm_(_grouped(h, own), own.mT)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        rows, own, h = _Function.kept(ctx)
        own = _groups(own, rows.inverse)
        _, needs_h, needs_moves, needs_common = ctx.needs_input_grad[:4]
        dy_rows = _grouped(dy, own)
        dh = torch.bmm(dy_rows, own).reshape(h.shape) if needs_h else None
        moves = common = None
        if needs_moves or needs_common:
            moves, common = _spread(rows, torch.bmm(dy_rows.mT, _grouped(h, own)), needs_moves, needs_common)
        return dy, dh, moves, common, *[None] * 5


def _pass_on(ctx, x: torch.Tensor) -> torch.Tensor:
    ctx.set_materialize_grads(False)  # a base that gives x no gradient must not be answered with a tensor of zeros
    through = x.detach()
    if not ctx.needs_input_grad[0]:
        ctx.mark_non_differentiable(through)  # else the base would compute a gradient that nobody needs
    return through


def _add_product(
    dx: torch.Tensor | None, dh: torch.Tensor, own: torch.Tensor, x: torch.Tensor, in_place: bool
) -> torch.Tensor:
    """`dx + dh A`; in place if dx is the base's own, made by its backward and held by nobody else.

    `own` is `(batch, r, in)` or `(r, in)`.
    """
    if dx is None:  # the base did not use x (dropout gives the adapter an input of its own)
        return torch.matmul(dh, own).reshape(x.shape).to(x.dtype)
    if in_place and dx.dtype == dh.dtype and dx.is_contiguous():
        if own.ndim == 3:
            _grouped(dx, own).baddbmm_(dh, own)
        else:
            _two(dx).addmm_(_two(dh), own)
        return dx
    # autocast with float32 activations: dx is float32, the product is not
    return dx + torch.matmul(dh, own).reshape(dx.shape)


def _three(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(x.shape[0], -1, x.shape[-1])


def _two(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, x.shape[-1])
