"""What happens between the two GEMMs, on (T, R) tensors only.

    forward    Z  = scale . gate . U
    backward   dU = scale . gate . dZ        dgate = sum over an expert's columns of scale . dZ . U

Products are formed in fp32 (fp64 for fp64 factors) and rounded once, on the way out. With a tied A
every expert reads the same columns of U and dU sums over experts; with a tied B, Z sums over them.

On a CPU the gate is spread over its columns by a small GEMM with the experts' membership, and
summed back by another: a step at T = 2048, d = 576, R = 64 in fp32 took 12.5 ms so and 13.2 ms with
the gate broadcast along each expert's 8 columns. Rows are taken piece by piece, so that beside the
GEMMs' operands nothing of size T x R is made.
"""

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

from molora_kernels.layout import RankLayout

PIECE_ELEMENTS = 1 << 17  # half a megabyte in fp32, which stays in a core's cache


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which gates are multiplied: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def spread(gate: Tensor, scale: float | Tensor, layout: RankLayout, dtype: torch.dtype) -> Tensor:
    """(T, R) scale times gate (T, E) of every column in the wide dtype, on a CPU."""
    members, shared = _membership(layout, scale, wide(dtype))
    if gate.dtype != members.dtype:  # a call of `to` costs as much as a product of few tokens
        gate = gate.to(members.dtype)
    return gate @ members if shared is None else torch.addmm(shared, gate, members)


def gate_columns(
    u: Tensor,
    gate: Tensor | None,
    scale: float | Tensor,
    layout: RankLayout,
    into: Tensor | None = None,
) -> Tensor:
    """Z (T, columns of B) in u's dtype, from u (T, columns of A) and gate (T, E) or None.

    Where both have the same columns it is written ``into`` what is given, which may be u.
    """
    if gate is None:
        return _scaled(u, scale)
    if not _spreads(gate, layout):
        return _gated(u, gate, scale, layout, "A", "B")
    z = torch.empty_like(u) if into is None else into
    for rows in _pieces(u):
        torch.mul(u[rows], spread(gate[rows], scale, layout, u.dtype), out=z[rows])
    return z


def ungate_columns(
    dz: Tensor,
    gate: Tensor | None,
    scale: float | Tensor,
    layout: RankLayout,
    into: Tensor | None = None,
) -> Tensor:
    """dU (T, columns of A) in dz's dtype, from dz = dY B (T, columns of B); ``into`` as there."""
    if gate is None:
        return _scaled(dz, scale)
    if _spreads(gate, layout):  # then A and B have the same columns
        return gate_columns(dz, gate, scale, layout, into)
    return _gated(dz, gate, scale, layout, "B", "A")


def gate_gradient(
    dz: Tensor,
    u: Tensor,
    scale: float | Tensor,
    layout: RankLayout,
    into: Tensor | None = None,
) -> Tensor:
    """dgate (T, E) in the wide dtype, or in that of what it is to be written ``into``."""
    dtype = wide(dz.dtype)
    if _spreads(dz, layout):
        members, _ = _membership(layout, scale, dtype)
        if into is None:
            into = dz.new_empty(dz.shape[0], layout.experts, dtype=dtype)
        for rows in _pieces(dz):
            into[rows] = (dz[rows].to(dtype) * u[rows]) @ members.mT
        return into
    dz_routed, _ = _parts(dz, layout, "B")
    u_routed, _ = _parts(u, layout, "A")
    product = dz_routed.to(dtype) * u_routed
    if isinstance(scale, Tensor):
        product = product * _routed_scale(scale, layout).to(dtype)
    if layout.rank is not None:
        grad = product.sum(-1)
    else:
        grad = torch.stack([part.sum(-1) for part in product[:, 0].split(layout.ranks, -1)], -1)
    grad = grad if isinstance(scale, Tensor) else grad.mul_(scale)
    return grad if into is None else into.copy_(grad)


def _spreads(operand: Tensor, layout: RankLayout) -> bool:
    """Whether the gate is spread over the columns, which factors that aren't tied share."""
    return layout.tied is None and operand.device.type == "cpu"


def _pieces(tensor: Tensor) -> Iterator[slice]:
    step = max(16, PIECE_ELEMENTS // max(tensor.shape[1], 1))
    for start in range(0, tensor.shape[0], step):
        yield slice(start, start + step)


def _membership(
    layout: RankLayout, scale: float | Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """(E, R) the scale of the columns that an expert owns, (R,) that of the always-on columns."""
    if isinstance(scale, Tensor):
        members, shared = _constant_membership(layout, 1.0, dtype)
        return members * scale, None if shared is None else shared * scale
    return _constant_membership(layout, scale, dtype)


@lru_cache(maxsize=256)
def _constant_membership(
    layout: RankLayout, scale: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    owner = torch.repeat_interleave(torch.arange(layout.experts), torch.tensor(layout.ranks))
    members = torch.zeros(layout.experts, layout.columns, dtype=dtype)
    members[owner, torch.arange(layout.routed)] = scale
    if not layout.always_on:
        return members, None
    shared = torch.zeros(layout.columns, dtype=dtype)
    shared[layout.routed :] = scale
    return members, shared


def _gated(
    columns: Tensor,
    gate: Tensor,
    scale: float | Tensor,
    layout: RankLayout,
    source: str,
    target: str,
) -> Tensor:
    """Columns of the source factor weighted into columns of the target factor."""
    routed, shared = _parts(columns, layout, source)
    weighted = _products(routed, gate, scale, layout)
    if layout.tied == target:
        weighted = weighted.sum(1, keepdim=True)
    if not layout.always_on:
        return weighted.to(columns.dtype).flatten(1)
    result = columns.new_empty(columns.shape[0], layout.rows_of(target))
    result_routed, result_shared = _parts(result, layout, target)
    result_routed.copy_(weighted)
    result_shared.copy_(_scaled(shared, _shared_scale(scale, layout)))
    return result


def _parts(columns: Tensor, layout: RankLayout, factor: str) -> tuple[Tensor, Tensor]:
    """Views (T, E or 1, rank) of the routed columns and (T, always_on) of the others.

    The middle dimension is 1 for a tied factor and for experts of different ranks.
    """
    routed = columns[:, : columns.shape[1] - layout.always_on]
    shared = columns[:, columns.shape[1] - layout.always_on :]
    groups = 1 if layout.rank is None or factor == layout.tied else layout.experts
    return routed.unflatten(1, (groups, -1)), shared


def _products(routed: Tensor, gate: Tensor, scale: float | Tensor, layout: RankLayout) -> Tensor:
    dtype = wide(routed.dtype)
    weights = gate.to(dtype)
    if layout.rank is not None:
        weights = weights[:, :, None]
    else:
        parts = [g.expand(-1, r) for g, r in zip(weights.split(1, 1), layout.ranks, strict=True)]
        weights = torch.cat(parts, 1)[:, None, :]
    weights = weights * (
        _routed_scale(scale, layout).to(dtype) if isinstance(scale, Tensor) else scale
    )
    return routed * weights


def _routed_scale(scale: Tensor, layout: RankLayout) -> Tensor:
    groups = 1 if layout.rank is None else layout.experts
    return scale[: layout.routed].view(groups, -1)


def _shared_scale(scale: float | Tensor, layout: RankLayout) -> float | Tensor:
    return scale[layout.routed :] if isinstance(scale, Tensor) else scale


def _scaled(columns: Tensor, scale: float | Tensor) -> Tensor:
    if isinstance(scale, Tensor):
        return (columns * scale.to(wide(columns.dtype))).to(columns.dtype)
    return columns if scale == 1.0 else columns * scale
