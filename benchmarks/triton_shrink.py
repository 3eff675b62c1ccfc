"""A Triton kernel for the shrink, for the GPU benchmark only: `h = s (A_0 + D_u) x`, each row of the batch with its own user's D_u.

The rows' factors are read by slot and added to the common one inside the kernel, so nothing is gathered: torch needs a copy
`(batch, r, in)` for its bmm. x is read once. What the package uses is gather + bmm; this says what a kernel of our own would gain.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def _shrink(
    x, moves, common, slot, h, tokens, width, scaling, R: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr
):
    row = tl.program_id(1)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    rank = tl.arange(0, R)
    inside = token < tokens
    user = tl.load(slot + row)
    total = tl.zeros((TOKENS, R), dtype=tl.float32)
    for start in range(0, width, WIDTH):
        column = start + tl.arange(0, WIDTH)
        within = column < width
        part = tl.load(
            x + (row * tokens + token[:, None]).to(tl.int64) * width + column[None, :],
            mask=inside[:, None] & within[None, :],
            other=0.0,
        )
        place = rank[:, None] * width + column[None, :]
        mask = within[None, :] & (rank[:, None] < R)
        own = tl.load(moves + user * R * width + place, mask=mask, other=0.0)
        own += tl.load(common + place, mask=mask, other=0.0)
        total += tl.dot(part, tl.trans(own.to(part.dtype)))
    out = h + (row * tokens + token[:, None]).to(tl.int64) * R + rank[None, :]
    tl.store(out, (total * scaling).to(h.dtype.element_ty), mask=inside[:, None])


def shrink(x: torch.Tensor, moves: torch.Tensor, common: torch.Tensor, slot: torch.Tensor, scaling: float):
    """`(batch, seq, in)` -> `(batch, seq, r)`; `moves` is `(slots, r, in)`, `common` `(r, in)`, both float32; r 16, 32, 64, ..."""
    batch, tokens, width = x.shape
    r = moves.shape[1]
    h = x.new_empty(batch, tokens, r)
    grid = (triton.cdiv(tokens, 64), batch)
    _shrink[grid](x, moves, common, slot, h, tokens, width, scaling, R=r, TOKENS=64, WIDTH=128)
    return h
