"""Generation: a few tokens, each of which reads its own experts' factors and nothing else.

Two launches, no products on tensor cores, no host synchronisation: the chosen experts come from a
top-k over the gate on the device, and a token with fewer experts meets gates of zero.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from molora_kernels import triton_kernels as kernels
from molora_kernels.layout import RankLayout
from molora_kernels.rankspace import wide
from molora_kernels.triton_launch import row_major, scale_table, tile_of


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
) -> Tensor:
    """Y (T, d_out) for experts of one rank; ``active`` bounds how many gates of a row are set."""
    x, A, B = row_major(x), row_major(A), row_major(B)
    out = out if out is None else row_major(out)
    (T, d_in), d_out, rank = x.shape, B.shape[0], layout.rank
    assert rank is not None
    slots = min(active, layout.experts)
    weights, chosen = gate.topk(slots, dim=-1, sorted=False)
    chosen = chosen.int()
    y = out if in_place and out is not None else x.new_empty(T, d_out, dtype=result_dtype)
    sizes = tile_of("decode_shrink", x, A)
    split = sizes["SPLIT"]
    z = x.new_empty(split, T, slots, rank, dtype=wide(A.dtype))
    accumulator = tl.float64 if A.dtype == torch.float64 else tl.float32
    shared = {"SLOTS": slots, "R": rank, "BR": triton.next_power_of_2(rank), "WIDE": accumulator}
    kernels.decode_shrink[(T * slots, split)](
        x, A, chosen, weights, scale_table(scale, A.shape[0], A), z,
        d_in, x.stride(0), A.stride(0), chosen.stride(0), z.stride(0), **shared, **sizes,
    )  # fmt: skip
    sizes = tile_of("decode_expand", x, B)
    kernels.decode_expand[(T, triton.cdiv(d_out, sizes["BN"]))](
        z, B, chosen, y if out is None else out, y,
        d_out, B.stride(0), chosen.stride(0), z.stride(0),
        0 if out is None else out.stride(0), y.stride(0),
        SPLIT=split, ADD=out is not None, **shared, **sizes,
    )  # fmt: skip
    return y
