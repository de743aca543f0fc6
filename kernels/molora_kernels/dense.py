"""The operator on torch's own GEMMs: all experts' columns at once, the gate applied in rank space.

    forward    U = X A^T        Z = s g U        Y = out + Z B^T
    backward   dZ = dY B        dU = s g dZ      dg = sum s dZ U
               dX = dU A        dA = dU^T X      dB = dY^T Z

Only U and the gate are kept for the backward besides the operands; Z is formed again from them. dX
comes last, when what the other gradients need beside it is free again. Where X or dY is not in the
dtype that the GEMMs run in, a CPU takes rows block by block and casts each once for all its
products: no cast copy of size T x d exists.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from molora_kernels.layout import RankLayout
from molora_kernels.rankspace import gate_columns, gate_gradient, ungate_columns

# Elements of the widest operand of a row block where rows are cast. Longer blocks wake a GEMM's
# threads less often: a training step of SmolLM2-135M in bf16 with fp32 adapters, 1024 tokens on 2
# threads, took 1.44, 1.24 and 1.21 times PEFT's with 2^18, 2^20 and 2^21. That is no more memory
# than PEFT needs, which casts all rows at once.
CAST_BLOCK_ELEMENTS = 1 << 21
# Where the factors are cast too, because the CPU doesn't multiply 16 bits, PEFT makes no copy, and
# four buffers of a block's size are memory beyond it: 72, 58, 50, 48 and 50 ms with 2^16 to 2^20,
# at T = 2048, d = 2048, R = 64 on one thread of an AVX2 machine.
EMULATED_BLOCK_ELEMENTS = 1 << 18


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


def row_blocks(x: Tensor, width: int, casts: bool, emulated: bool) -> Iterator[slice]:
    """Slices that cover x's rows: blocks on a CPU that casts them, else one."""
    limit = rows = x.shape[0]
    if casts and x.device.type == "cpu":
        limit = max(16, (EMULATED_BLOCK_ELEMENTS if emulated else CAST_BLOCK_ELEMENTS) // width)
    if rows == 0:
        return
    step = -(-rows // -(-rows // limit))  # equal blocks: a short last one would waste a GEMM
    for start in range(0, rows, step):
        yield slice(start, min(rows, start + step))


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
    u: Tensor | None,
    emulated: bool = False,
) -> Tensor:
    """Y (T, d_out); x, gate and out are two-dimensional, A and B in the product dtype.

    ``u`` (T, columns of A) is filled for the backward where it is given. ``emulated``: the product
    dtype isn't the factors' own.
    """
    product = A.dtype
    casts = not x.dtype == product == result_dtype
    if in_place and out is not None:
        y = out
    else:
        y = x.new_empty(x.shape[0], B.shape[0], dtype=result_dtype)
    for rows in row_blocks(x, max(A.shape[1], B.shape[0]), casts, emulated):
        u_rows = _shrink(x[rows].to(product), A, None if u is None else u[rows])
        gate_rows = None if gate is None else gate[rows]
        z = gate_columns(u_rows, gate_rows, scale, layout)
        _expand(z, B, None if out is None else out[rows], y[rows], in_place)
    return y


def _shrink(x: Tensor, A: Tensor, u: Tensor | None) -> Tensor:
    """X A^T, kept in u where it is given; what is returned isn't rounded to u's dtype."""
    if u is not None and u.dtype == A.dtype:
        return torch.mm(x, A.mT, out=u)
    product = x @ A.mT
    if u is not None:
        u.copy_(product)
    return product


def _expand(z: Tensor, B: Tensor, out: Tensor | None, y: Tensor, in_place: bool) -> None:
    """Y = out + Z B^T, accumulated by the GEMM where the dtypes allow."""
    if y.dtype == B.dtype:
        if out is None:
            torch.mm(z, B.mT, out=y)
        elif in_place:
            y.addmm_(z, B.mT)
        else:
            torch.addmm(out, z, B.mT, out=y)
    elif out is None:
        y.copy_(z @ B.mT)
    else:
        torch.add(out, z @ B.mT, out=y)


def backward(
    dy: Tensor,
    x: Tensor | None,
    A: Tensor,
    B: Tensor,
    gate: Tensor | None,
    u: Tensor | None,
    scale: float | Tensor,
    layout: RankLayout,
    needs: Needs,
    x_dtype: torch.dtype,
    emulated: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """(dX in x_dtype, dA and dB in the product dtype, dgate), None where not needed.

    A and B are in the product dtype; ``u`` is what forward left, x may be None without dA.
    """
    product = A.dtype
    casts = not x_dtype == product == dy.dtype
    dx = dgate = None
    dA, dB = _Sum(A.shape, A) if needs.A else None, _Sum(B.mT.shape, B) if needs.B else None
    if needs.gate and gate is not None:
        dgate = torch.empty_like(gate, memory_format=torch.contiguous_format)
    for rows in row_blocks(dy, max(A.shape[1], B.shape[0]), casts, emulated):
        dy_rows = dy[rows].to(product)
        gate_rows = None if gate is None else gate[rows]
        u_rows = None if u is None else u[rows].to(product)
        du = None
        if needs.rank_gradient or dgate is not None:
            dz = dy_rows @ B
            if dgate is not None and u_rows is not None:
                gate_gradient(dz, u_rows, scale, layout, into=dgate[rows])
            if needs.rank_gradient:
                du = ungate_columns(dz, gate_rows, scale, layout, into=dz)
        if dA is not None and du is not None and x is not None:
            dA.add(du, x[rows].to(product))
        if dB is not None and u_rows is not None:
            dB.add(gate_columns(u_rows, gate_rows, scale, layout), dy_rows)
        if needs.x and du is not None:
            if dx is None:
                dx = dy.new_empty(dy.shape[0], A.shape[1], dtype=x_dtype)
            _expand(du, A.mT, None, dx[rows], False)
    if needs.x and dx is None:  # there is no row
        dx = dy.new_empty(0, A.shape[1], dtype=x_dtype)
    return (
        dx,
        None if dA is None else dA.total,
        None if dB is None else dB.total.mT,
        dgate,
    )


class _Sum:
    """P^T V summed over row blocks. The wide operand stands right, where BLAS is fastest."""

    def __init__(self, shape: torch.Size, like: Tensor) -> None:
        self.total = like.new_zeros(shape)
        self.empty = True

    def add(self, p: Tensor, v: Tensor) -> None:
        if self.empty:
            torch.mm(p.mT, v, out=self.total)
        else:
            self.total.addmm_(p.mT, v)
        self.empty = False
