"""Generation on a CPU: a few tokens, where the checks and choices of a call outweigh its products.

    U = X A^T        Z = s g U        Y = out + Z B^T

in four calls of torch, for operands of one dtype without gradients. They are the calls of the
general path, so that both give the same bits: a reentrant checkpoint runs its first pass without
gradients and the second with them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from molora_kernels.layout import RankLayout
from molora_kernels.rankspace import column_weights

MOST_TOKENS = 32


def forward(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    gate: Tensor | None,
    scale: float | Tensor,
    out: Tensor | None,
    ranks: Sequence[int] | None,
    always_on: int,
    in_place: bool,
) -> Tensor | None:
    """The result (..., d_out), or None where the general path has to look at the operands.

    It looks at them whenever something is off, and says what.
    """
    if gate is None or out is None or not ranks:
        return None
    dtype, width, experts = A.dtype, x.shape[-1], len(ranks)
    alike = x.dtype == dtype == out.dtype and dtype in (torch.float32, torch.float64)
    if not alike or x.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return None
    layout = RankLayout(tuple(ranks), always_on)
    if layout.columns != A.shape[0] or gate.shape != (*x.shape[:-1], experts):
        return None
    if x.numel() > MOST_TOKENS * width or out.shape != (*x.shape[:-1], B.shape[0]):
        return None
    try:
        weights = column_weights(gate.reshape(-1, experts), scale, layout, dtype)
        assert weights is not None  # on a CPU, without tied factors
        z = (x.reshape(-1, width) @ A.mT) * weights
        rows = out.view(-1, out.shape[-1])
        if in_place:
            rows.addmm_(z, B.mT)
            return out
        return torch.addmm(rows, z, B.mT).view(out.shape)
    except RuntimeError:  # shapes that don't fit, or a view that can't be had
        return None
