"""The operator on torch's own GEMMs: all experts' columns at once, the gate applied in rank space.

    forward    U = X A^T        Z = s g U        Y = out + Z B^T
    backward   dZ = dY B        dU = s g dZ      dg = sum s dZ U
               dX = dU A        dA = dU^T X      dB = dY^T Z

Only U and the gate are kept for the backward besides the operands, and Z is formed again from them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from molora_kernels.layout import RankLayout
from molora_kernels.rankspace import gate_columns, gate_gradient, ungate_columns


@dataclass(frozen=True)
class Needs:
    """Which gradients are asked for."""

    x: bool
    A: bool
    B: bool
    gate: bool

    @property
    def rank_gradient(self) -> bool:
        """Whether dU is needed."""
        return self.x or self.A

    @property
    def saved_u(self) -> bool:
        """Whether the backward reads U."""
        return self.B or self.gate


def shrink(x: Tensor, A: Tensor) -> Tensor:
    """U = X A^T (T, columns of A) in A's dtype, from x (T, d_in) of any floating dtype."""
    return x.to(A.dtype) @ A.mT


def expand(
    z: Tensor, B: Tensor, out: Tensor | None, result_dtype: torch.dtype, in_place: bool
) -> Tensor:
    """``out + Z B^T`` (T, d_out) in result_dtype, accumulated in the GEMM if dtypes allow."""
    if out is None:
        return (z @ B.mT).to(result_dtype)
    if out.dtype == B.dtype:
        return out.addmm_(z, B.mT) if in_place else torch.addmm(out, z, B.mT)
    delta = z @ B.mT
    return out.add_(delta) if in_place else torch.add(out, delta, out=torch.empty_like(out))


def forward(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    gate: Tensor | None,
    scale: float | Tensor,
    out: Tensor | None,
    layout: RankLayout,
    result_dtype: torch.dtype,
    in_place: bool,
) -> tuple[Tensor, Tensor]:
    """Y (T, d_out) and U; x, gate and out are two-dimensional, A and B in the compute dtype."""
    u = shrink(x, A)
    return expand(gate_columns(u, gate, scale, layout), B, out, result_dtype, in_place), u


def backward(
    dy: Tensor,
    x: Tensor | None,
    A: Tensor | None,
    B: Tensor | None,
    gate: Tensor | None,
    u: Tensor | None,
    scale: float | Tensor,
    layout: RankLayout,
    needs: Needs,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """(dX, dA, dB, dgate) in the compute dtype (dgate wide), None where not needed."""
    dx = dA = dB = dgate = None
    if needs.rank_gradient or needs.gate:
        assert B is not None
        dz = dy @ B
        if needs.gate:
            assert u is not None
            dgate = gate_gradient(dz, u, scale, layout)
        if needs.rank_gradient:
            du = ungate_columns(dz, gate, scale, layout)
            if needs.x:
                assert A is not None
                dx = du @ A
            if needs.A:
                assert x is not None
                dA = du.mT @ x.to(du.dtype)
    if needs.B:
        assert u is not None
        dB = dy.mT @ gate_columns(u, gate, scale, layout)
    return dx, dA, dB, dgate
