"""Host side of the sorted kernels: tokens of one expert share a tile, on the device throughout.

The K chosen experts of each token come from a top-k over the gate, so nothing waits for the device;
a token that chose fewer meets weights of zero. ``forward`` and ``backward`` are those of
:mod:`molora_kernels.triton_launch` with K in addition, for layouts that :func:`fits` accepts.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from molora_kernels import triton_sorted_kernels as kernels
from molora_kernels.dense import Needs
from molora_kernels.layout import RankLayout
from molora_kernels.rankspace import wide
from molora_kernels.triton_launch import WIDE, row_major, scale_table, tile_of


@dataclass(frozen=True)
class Sorted:
    """Tables of one call; shapes as in :mod:`molora_kernels.triton_sorted_kernels`."""

    chosen: Tensor  # (T, SLOTS)
    weight: Tensor  # (T, SLOTS)
    order: Tensor
    offset: Tensor
    start: Tensor


def forward(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    gate: Tensor,
    active: int,
    scale: float | Tensor,
    out: Tensor | None,
    layout: RankLayout,
    result_dtype: torch.dtype,
    in_place: bool,
    u: Tensor | None,
    precision: str,
) -> Tensor:
    """Y (T, d_out). ``u`` (T, K times the padded rank) is filled where given."""
    x, A, B = row_major(x), row_major(A), row_major(B)
    out = out if out is None else row_major(out)
    (T, d_in), width = x.shape, padded_rank(layout)
    y = out if in_place and out is not None else None
    if y is None:
        y = x.new_empty(T, B.shape[0], dtype=result_dtype)
    if T == 0:
        return y
    tables = _sort(gate, active, layout)
    slots = tables.weight.shape[1]
    z = x.new_empty(T, slots * width, dtype=A.dtype)
    u = z.new_empty(z.shape) if u is None else u
    sizes = tile_of("sorted_shrink", x, A)
    expert, row = _tiles(tables, layout, sizes["BT"])
    kernels.sorted_shrink[(expert.shape[1], slots)](
        x, A, tables.weight, scale_table(scale, A.shape[0], A), tables.order, tables.offset,
        expert, row, tables.start, u, z, T, d_in, layout.experts, expert.shape[1],
        x.stride(0), A.stride(0), SLOTS=slots, BR=width, WIDE=WIDE.get(A.dtype, tl.float32),
        PRECISION=precision, **sizes,
    )  # fmt: skip
    _expand(z, B, tables, layout, out, y, precision)
    return y


def backward(
    dy: Tensor,
    x: Tensor | None,
    A: Tensor,
    B: Tensor,
    gate: Tensor,
    active: int,
    u: Tensor,
    scale: float | Tensor,
    layout: RankLayout,
    needs: Needs,
    x_dtype: torch.dtype,
    precision: str,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """(dX in x_dtype, dA and dB in A's dtype, dgate in the gate's), None where not needed."""
    dy, A, B = row_major(dy), row_major(A), row_major(B)
    (T, d_out), width = dy.shape, padded_rank(layout)
    dx = dy.new_empty(T, A.shape[1], dtype=x_dtype) if needs.x else None
    dA = torch.zeros_like(A) if needs.A else None
    dB = torch.zeros_like(B) if needs.B else None
    dgate = gate.new_zeros(gate.shape) if needs.gate else None
    if T == 0:
        return dx, dA, dB, dgate
    tables = _sort(gate, active, layout)
    slots = tables.weight.shape[1]
    du, z = (dy.new_empty(T, slots * width, dtype=B.dtype) for _ in range(2))
    dg = dy.new_empty(T, slots, dtype=wide(B.dtype))
    sizes = tile_of("sorted_rank_backward", dy, B)
    expert, row = _tiles(tables, layout, sizes["BT"])
    kernels.sorted_rank_backward[(expert.shape[1], slots)](
        dy, B, u, tables.weight, scale_table(scale, B.shape[1], B), tables.order, tables.offset,
        expert, row, tables.start, du, z, dg, T, d_out, layout.experts, expert.shape[1],
        dy.stride(0), B.stride(0), SLOTS=slots, BR=width, WIDE=WIDE.get(B.dtype, tl.float32),
        PRECISION=precision, **sizes,
    )  # fmt: skip
    if dgate is not None:
        dgate.scatter_(1, tables.chosen, dg.to(gate.dtype))
    if dx is not None:
        _expand(du, A.mT, tables, layout, None, dx, precision)
    if dA is not None and x is not None:
        _outer(du, row_major(x), tables, layout, dA, precision)
    if dB is not None:
        _outer(z, dy, tables, layout, dB.mT, precision)
    return dx, dA, dB, dgate


def padded_rank(layout: RankLayout) -> int:
    """Width of one slot: the largest rank as a power of two, at least what a product needs."""
    return max(16, 1 << (max(layout.ranks) - 1).bit_length())


@lru_cache(maxsize=256)
def _start(ranks: tuple[int, ...], device: torch.device) -> Tensor:
    starts = [0]
    for rank in ranks:
        starts.append(starts[-1] + rank)
    return torch.tensor(starts, dtype=torch.int32, device=device)


def _sort(gate: Tensor, active: int, layout: RankLayout) -> Sorted:
    slots = min(active, layout.experts)
    weight, chosen = gate.topk(slots, dim=-1, sorted=False)
    experts, order = chosen.mT.contiguous().sort(dim=1, stable=True)
    edges = torch.arange(layout.experts + 1, device=gate.device).expand(slots, -1).contiguous()
    offset = torch.searchsorted(experts, edges, out_int32=True)
    start = _start(layout.ranks, gate.device)
    return Sorted(chosen, weight.contiguous(), order.int(), offset, start)


def _tiles(tables: Sorted, layout: RankLayout, block: int) -> tuple[Tensor, Tensor]:
    """EXPERT and ROW: as many tiles as any distribution of the tokens could need."""
    slots, T = tables.order.shape
    count = triton.cdiv(T, block) + layout.experts
    needed = (tables.offset.diff(dim=1) + block - 1) // block
    ends = needed.cumsum(1).contiguous()
    tile = torch.arange(count, device=ends.device).expand(slots, -1).contiguous()
    expert = torch.searchsorted(ends, tile, right=True)
    known = expert.clamp_max(layout.experts - 1)
    before = ends.gather(1, known) - needed.gather(1, known)
    row = tables.offset.long().gather(1, known) + (tile - before) * block
    return expert.int(), row.int()


def _expand(
    z: Tensor,
    W: Tensor,
    tables: Sorted,
    layout: RankLayout,
    out: Tensor | None,
    y: Tensor,
    precision: str,
) -> None:
    sizes = tile_of("sorted_expand", z, W)
    expert, row = _tiles(tables, layout, sizes["BT"])
    grid = (expert.shape[1], triton.cdiv(W.shape[0], sizes["BN"]))
    for slot in range(tables.weight.shape[1]):
        addend = out if slot == 0 else y
        kernels.sorted_expand[grid](
            z, W, tables.order, tables.offset, expert, row, tables.start,
            y if addend is None else addend, y, slot, z.shape[0], W.shape[0], layout.experts,
            expert.shape[1], W.stride(0), W.stride(1),
            0 if addend is None else addend.stride(0), y.stride(0),
            SLOTS=tables.weight.shape[1], BR=padded_rank(layout), ADD=addend is not None,
            WIDE=WIDE.get(W.dtype, tl.float32), PRECISION=precision, **sizes,
        )  # fmt: skip


def _outer(
    p: Tensor, v: Tensor, tables: Sorted, layout: RankLayout, w: Tensor, precision: str
) -> None:
    sizes = tile_of("sorted_outer", v, p)
    grid = (triton.cdiv(v.shape[1], sizes["BN"]), layout.experts)
    kernels.sorted_outer[grid](
        p, v, tables.order, tables.offset, tables.start, w, v.shape[0], v.shape[1],
        layout.experts, v.stride(0), *w.stride(), SLOTS=tables.weight.shape[1],
        BR=padded_rank(layout), WIDE=WIDE.get(p.dtype, tl.float32), PRECISION=precision, **sizes,
    )  # fmt: skip
