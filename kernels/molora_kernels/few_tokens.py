"""Generation on a CPU: a few tokens, where the checks and choices of a call outweigh its products.

    U = X A^T        Z = s g U        Y = out + Z B^T

in four calls of torch, for factors in fp32 or fp64 without gradients. They are the calls of the
general path, so that both give the same bits: a reentrant checkpoint runs its first pass without
gradients and the second with them.
"""

from collections.abc import Iterable, Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from molora_kernels.layout import RankLayout
from molora_kernels.rankspace import spread

MOST_TOKENS = 32
WIDE = (torch.float32, torch.float64)


def forward(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    gate: Tensor | None,
    scale: float | Tensor,
    out: Tensor | None,
    ranks: Sequence[int] | None,
    always_on: int,
) -> Tensor | None:
    """The result (..., d_out), or None where the general path has to look at the operands.

    It looks at them whenever something is off, and says what.
    """
    dtype, shape, d_in = A.dtype, x.shape, A.shape[-1]
    if gate is None or out is None or not ranks or not d_in:
        return None
    tokens = x.numel() // d_in
    if dtype not in WIDE or gate.dtype != dtype or tokens > MOST_TOKENS or not x.is_cpu:
        return None
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return None
    layout, columns = _layout(tuple(ranks), always_on)
    if columns != A.shape[0] or shape[-1] != d_in or out.shape[:-1] != shape[:-1]:
        return None
    if gate.shape != (tokens, len(ranks)):
        if gate.shape != (*shape[:-1], len(ranks)):
            return None
        gate = gate.reshape(tokens, -1)
    try:
        rows = x.view(tokens, d_in)
        u = F.linear(rows if rows.dtype == dtype else rows.to(dtype), A)
        z = u.mul_(spread(gate, scale, layout, dtype))
        base = out.view(tokens, -1)
        if base.dtype == dtype:
            return torch.addmm(base, z, B.mT).view_as(out)
        return torch.add(base, F.linear(z, B), out=torch.empty_like(base)).view_as(out)
    except RuntimeError:  # shapes that don't fit, or a view that can't be had
        return None


def widened(x: Tensor) -> Tensor:
    """A few 16-bit tokens in fp32, for a caller that hands them to the router and to the experts:
    both multiply in fp32, and each would cast them. Anything else is returned as it is.
    """
    if x.element_size() > 2 or not x.is_cpu or x.numel() > MOST_TOKENS * x.shape[-1]:
        return x
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return x
    return x if torch.is_autocast_enabled("cpu") else x.float()


def add_blocks(
    x: Tensor, A: Tensor, B: Tensor, blocks: Iterable[tuple[int, int, int, float]], out: Tensor
) -> Tensor:
    """Of one token the part of those experts that it chose: out + sum of c B_e (A_e x).

    It reads no other expert's factors and has no gate as a tensor, which would have to be made,
    spread over the rank columns and multiplied. Without gradients.

    Args:
        x: (d_in,) in the factors' dtype.
        A: (R, d_in) in fp32 or fp64; B: (d_out, R).
        blocks: of each expert its first row in A, its first column in B, its rank, and c.
        out: (..., d_out), d_out elements in any floating dtype.

    Returns:
        A new tensor of out's shape and dtype, rounded to that once.
    """
    total = out.reshape(-1).to(A.dtype, copy=True)
    for row, column, rank, factor in blocks:
        inner = torch.mv(A.narrow(0, row, rank), x)
        total.addmv_(B.narrow(1, column, rank), inner, alpha=factor)
    return total.to(out.dtype).view_as(out)


@lru_cache(maxsize=256)
def _layout(ranks: tuple[int, ...], always_on: int) -> tuple[RankLayout, int]:
    layout = RankLayout(ranks, always_on)
    return layout, layout.columns
