"""Generation on a CPU: a few tokens, where the checks and choices of a call outweigh its products.

    U = X A^T        Z = g U        Y = out + s Z B^T

in three calls of torch, for operands of one dtype, experts of one rank and no gradients.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

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
    if gate is None or out is None or not ranks or isinstance(scale, Tensor):
        return None
    dtype, width, experts = A.dtype, x.shape[-1], len(ranks)
    alike = x.dtype == dtype == out.dtype and dtype in (torch.float32, torch.float64)
    if not alike or x.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return None
    rank = ranks[0]
    if experts * rank + always_on != A.shape[0] or any(r != rank for r in ranks):
        return None
    if x.numel() > MOST_TOKENS * width or gate.shape != (*x.shape[:-1], experts):
        return None
    try:
        u = x.reshape(-1, width) @ A.mT
        routed = u[:, : experts * rank].view(-1, experts, rank)
        routed *= gate.reshape(-1, experts, 1)
        rows = out.view(-1, out.shape[-1])
        if in_place:
            rows.addmm_(u, B.mT, alpha=scale)
            return out
        return torch.addmm(rows, u, B.mT, alpha=scale).view(out.shape)
    except RuntimeError:  # shapes that don't fit, or views that can't be had
        return None
