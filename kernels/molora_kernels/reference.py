"""The routed operator as plain torch operations: the readable twin of every fast path."""

from collections.abc import Sequence

import torch
from torch import Tensor

from molora_kernels.layout import check_operands, resolve_layout, spread_gate


def routed_lora_reference(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    gate: Tensor | None,
    scale: float | Tensor = 1.0,
    out: Tensor | None = None,
    *,
    ranks: Sequence[int] | None = None,
    tied: str | None = None,
    always_on: int = 0,
) -> Tensor:
    """``out + (scale * gate * (x A^T)) B^T`` with the gate repeated over an expert's columns.

    Arguments as in :func:`molora_kernels.routed_lora`; all operands share one dtype, and the
    gradients are those of torch's own operations. Use it in fp64 as the truth.
    """
    layout = resolve_layout(A, B, gate, ranks, always_on, tied)
    check_operands(x, A, B, gate, scale, out, layout)
    gate = spread_gate(gate, x, layout)
    u = x @ A.mT
    if tied == "A":
        routed, shared = u.split([layout.ranks[0], always_on], -1)
        u = torch.cat([*[routed] * layout.experts, shared], -1)
    z = u * scale
    if gate is not None:
        columns = [
            g.expand(*g.shape[:-1], r) for g, r in zip(gate.split(1, -1), layout.ranks, strict=True)
        ]
        ones = gate.new_ones(*gate.shape[:-1], always_on)
        z = z * torch.cat([*columns, ones], -1).to(z.dtype)
    if tied == "B":
        routed, shared = z.split([layout.routed, always_on], -1)
        z = torch.cat([routed.unflatten(-1, (layout.experts, -1)).sum(-2), shared], -1)
    delta = z @ B.mT
    return delta if out is None else out + delta
