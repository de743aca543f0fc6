"""The operator over the tokens of one expert at a time: the same sums, only where the gate is set.

    for each expert e, with t the tokens whose gate g_e isn't zero
        Y[t] += (s g_e[t] . (X[t] A_e^T)) B_e^T

Always-on columns are one more expert that takes every token with weight one. Rows are gathered,
multiplied and scattered expert by expert, so that they stay in cache; an expert's rows are
distinct, so each output row has one writer at a time and the result is deterministic. U is not
kept: it is cheaper to form again, since X[t] is gathered for dA anyway.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from molora_kernels.dense import Needs
from molora_kernels.layout import RankLayout
from molora_kernels.rankspace import wide


def forward(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    gate: Tensor,
    scale: float | Tensor,
    out: Tensor | None,
    layout: RankLayout,
    result_dtype: torch.dtype,
    in_place: bool,
) -> Tensor:
    """Y (T, d_out); arguments as in :func:`molora_kernels.dense.forward`, no factor tied."""
    product = A.dtype
    # sums over experts in the product dtype: rounding to 16 bits after each expert would add up
    if out is None:
        y = x.new_zeros(x.shape[0], B.shape[0], dtype=product)
    elif in_place and out.dtype == product:
        y = out
    else:
        y = out.to(product, copy=True)
    for tokens, columns, weight in _groups(gate, scale, layout, product):
        u = _take(x, tokens).to(product) @ A[columns].mT
        _put(y, tokens, (u * weight).to(product) @ B[:, columns].mT)
    if in_place and out is not None and y is not out:
        return out.copy_(y)
    return y.to(result_dtype)


def backward(
    dy: Tensor,
    x: Tensor | None,
    A: Tensor,
    B: Tensor,
    gate: Tensor,
    scale: float | Tensor,
    layout: RankLayout,
    needs: Needs,
    x_dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """(dX, dA, dB, dgate) as :func:`molora_kernels.dense.backward` gives them.

    x may be None where none of dA, dB and dgate is needed.
    """
    product = A.dtype
    dx = dy.new_zeros(dy.shape[0], A.shape[1], dtype=product) if needs.x else None
    dA = torch.zeros_like(A) if needs.A else None
    dB = torch.zeros_like(B.mT) if needs.B else None
    dgate = None
    if needs.gate:
        dgate = torch.zeros(gate.shape, dtype=gate.dtype, device=gate.device)
    for expert, (tokens, columns, weight) in enumerate(_groups(gate, scale, layout, product)):
        dy_rows = _take(dy, tokens).to(product)
        dz = dy_rows @ B[:, columns]
        if needs.rank_gradient:
            du = (dz * weight).to(product)
            if dx is not None:
                _put(dx, tokens, du @ A[columns])
        if x is None:
            continue
        x_rows = _take(x, tokens).to(product)
        if dA is not None:
            torch.mm(du.mT, x_rows, out=dA[columns])
        if needs.saved_u:
            u = x_rows @ A[columns].mT
            if dgate is not None and tokens is not None:
                along_rank = _scaled(dz.to(wide(product)) * u, scale, columns).sum(-1)
                dgate[tokens, expert] = along_rank.to(dgate.dtype)
            if dB is not None:
                torch.mm((u * weight).to(product).mT, dy_rows, out=dB[columns])
    dx = None if dx is None else dx.to(x_dtype)
    return dx, dA, None if dB is None else dB.mT, dgate


def _groups(
    gate: Tensor, scale: float | Tensor, layout: RankLayout, product: torch.dtype
) -> Iterator[tuple[Tensor | None, slice, Tensor]]:
    """(tokens or None for all, columns of rank space, weight (tokens, 1 or rank)) of each expert.

    Every routed expert is given, in order, also one without tokens.
    """
    dtype = wide(product)
    chosen = gate != 0
    tokens_by_expert = chosen.mT.nonzero()[:, 1].split(chosen.sum(0).tolist())
    start = 0
    for expert, (rank, tokens) in enumerate(zip(layout.ranks, tokens_by_expert, strict=True)):
        columns = slice(start, start + rank)
        weight = gate[tokens, expert, None].to(dtype)
        yield tokens, columns, _scaled(weight, scale, columns)
        start += rank
    if layout.always_on:
        columns = slice(start, layout.columns)
        yield (
            None,
            columns,
            _scaled(torch.ones(1, 1, dtype=dtype, device=gate.device), scale, columns),
        )


def _scaled(values: Tensor, scale: float | Tensor, columns: slice) -> Tensor:
    return values * (scale[columns].to(values.dtype) if isinstance(scale, Tensor) else scale)


def _take(rows: Tensor, tokens: Tensor | None) -> Tensor:
    return rows if tokens is None else rows.index_select(0, tokens)


def _put(rows: Tensor, tokens: Tensor | None, values: Tensor) -> None:
    if tokens is None:
        rows.add_(values)
    else:
        rows.index_add_(0, tokens, values)
