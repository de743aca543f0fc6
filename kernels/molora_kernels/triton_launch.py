"""Host side of the Triton kernels: allocation, tables, grids. Nothing here waits for the device.

``forward`` and ``backward`` have the signatures of their namesakes in :mod:`molora_kernels.dense`.
The gate is fused into the kernels; only where a factor is tied, whose columns several experts
share, is it applied between them, on (T, R) tensors.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from molora_kernels import triton_kernels as kernels
from molora_kernels.dense import Needs
from molora_kernels.layout import RankLayout
from molora_kernels.plan import STRIDE_MULTIPLE
from molora_kernels.rankspace import gate_columns, gate_gradient, ungate_columns, wide
from molora_kernels.tiles import tile

WIDE = {torch.float64: tl.float64}
# Planes of the weight gradient are made until the grid has this many programs: three waves of the
# largest device's 132 processors would not gain more than the planes cost to add.
ENOUGH_PROGRAMS = 256


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
    precision: str = "ieee",
) -> Tensor:
    """Y (T, d_out). ``u`` is filled where given; its rows must be aligned."""
    x, A, B = row_major(x), row_major(A), row_major(B)
    out = out if out is None else row_major(out)
    gate = gate if gate is None else row_major(gate)
    y = out if in_place else None
    if y is None:
        y = x.new_empty(x.shape[0], B.shape[0], dtype=result_dtype)
    if layout.tied is None:
        z = rank_buffer(x, A.shape[0], A.dtype)
        _shrink(x, A, gate, scale, u, z, layout, precision)
    else:
        u = rank_buffer(x, A.shape[0], A.dtype) if u is None else u
        _shrink(x, A, None, 1.0, u, None, layout, precision)
        z = gate_columns(u, gate, scale, layout)
    expand(z, B, out, y, precision)
    return y


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
    precision: str = "ieee",
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """(dX in x_dtype, dA and dB in A's dtype, dgate in the gate's), None where not needed."""
    dy, A, B = row_major(dy), row_major(A), row_major(B)
    x = x if x is None else row_major(x)
    gate = gate if gate is None else row_major(gate)
    if layout.tied is None:
        du, z, dgate = rank_backward(dy, B, u, gate, scale, layout, needs, precision)
    else:
        dz = rank_buffer(dy, B.shape[1], B.dtype)
        _shrink(dy, _padded(B).mT.contiguous(), None, 1.0, dz, None, layout, precision)
        du = ungate_columns(dz, gate, scale, layout)
        z = dgate = None
        if u is not None:
            z = gate_columns(u, gate, scale, layout)
            if needs.gate and gate is not None:
                dgate = gate_gradient(dz, u, scale, layout).to(gate.dtype)
    dx = dA = dB = None
    if needs.x and du is not None:
        dx = dy.new_empty(dy.shape[0], A.shape[1], dtype=x_dtype)
        expand(du, A.mT, None, dx, precision)
    if needs.A and du is not None and x is not None:
        dA = torch.empty_like(A)
        outer(du, x, dA, precision)
    if needs.B and z is not None:
        dB = torch.empty_like(B, memory_format=torch.contiguous_format)
        outer(z, dy, dB.mT, precision)
    return dx, dA, dB, dgate


def rank_buffer(like: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """(T, columns) whose rows are padded to whole 16-byte units, as asynchronous copies want."""
    width = triton.cdiv(columns, STRIDE_MULTIPLE) * STRIDE_MULTIPLE
    return like.new_empty(like.shape[0], width, dtype=dtype).narrow(1, 0, columns)


def row_major(tensor: Tensor) -> Tensor:
    """The tensor itself if its rows are contiguous, else a copy: an expanded dY has stride 0."""
    return tensor if tensor.stride(1) == 1 or tensor.shape[1] == 1 else tensor.contiguous()


def _padded(factor: Tensor) -> Tensor:
    """B (d_out, R) with rows that keep the alignment hints: a small copy where R is odd."""
    if factor.stride(0) % STRIDE_MULTIPLE == 0:
        return factor
    return rank_buffer(factor, factor.shape[1], factor.dtype).copy_(factor)


@lru_cache(maxsize=256)
def _column_table(layout: RankLayout, device: torch.device) -> Tensor:
    columns = [e for e, rank in enumerate(layout.ranks) for _ in range(rank)]
    return torch.tensor([*columns, *[-1] * layout.always_on], dtype=torch.int32, device=device)


@lru_cache(maxsize=256)
def _constant_scale(scale: float, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.full((columns,), scale, dtype=dtype, device=device)


def scale_table(scale: float | Tensor, columns: int, factor: Tensor) -> Tensor:
    if isinstance(scale, Tensor):
        return scale.contiguous()
    return _constant_scale(float(scale), columns, wide(factor.dtype), factor.device)


def device_name(tensor: Tensor) -> str:
    """What the tile configurations call the device."""
    on_gpu = tensor.device.type == "cuda" and torch.cuda.is_available()
    return torch.cuda.get_device_name(tensor.device) if on_gpu else "cpu"


def tile_of(kernel: str, rows: Tensor, element: Tensor) -> dict[str, int]:
    """Tiles for as many rows, and operands of the element's dtype."""
    hip = torch.version.hip is not None
    size, tokens = element.element_size(), rows.shape[0]
    return tile(kernel, size, tokens, device_name(rows), triton.__version__, hip)


def _tile(kernel: str, rows: Tensor, element: Tensor, columns: int) -> dict[str, int]:
    sizes = tile_of(kernel, rows, element)
    if "BR" in sizes:
        sizes["BR"] = min(sizes["BR"], max(16, triton.next_power_of_2(columns)))
    return sizes


def _shrink(
    x: Tensor,
    A: Tensor,
    gate: Tensor | None,
    scale: float | Tensor,
    u: Tensor | None,
    z: Tensor | None,
    layout: RankLayout,
    precision: str,
) -> None:
    (T, K), R = x.shape, A.shape[0]
    if T == 0:
        return
    written = u if u is not None else z
    assert written is not None
    sizes = _tile("shrink", x, A, R)
    grid = (triton.cdiv(T, sizes["BT"]), triton.cdiv(R, sizes["BR"]))
    kernels.shrink[grid](
        x, A, x if gate is None else gate, _column_table(layout, x.device),
        scale_table(scale, R, A), written if u is None else u, written if z is None else z,
        T, K, R, x.stride(0), A.stride(0), 0 if gate is None else gate.stride(0),
        written.stride(0), GATED=gate is not None, WRITE_U=u is not None, WRITE_Z=z is not None,
        WIDE=WIDE.get(A.dtype, tl.float32), PRECISION=precision, **sizes,
    )  # fmt: skip


def router_precision(x: Tensor, precision: str) -> str:
    """Products of the router: 16-bit x is exact in tf32, three tf32 products have fp32's digits."""
    on_nvidia = torch.version.hip is None  # AMD has no tf32x3
    return "tf32x3" if x.element_size() == 2 and on_nvidia else precision


def shrink_route(
    x: Tensor, A: Tensor, router: Tensor, bias: Tensor | None, precision: str
) -> tuple[Tensor, Tensor]:
    """U (T, R) in A's dtype and the router's logits (T, E) in fp32 (fp64 for fp64)."""
    x, A, router = row_major(x), row_major(A), row_major(router)
    (T, K), R, E = x.shape, A.shape[0], router.shape[0]
    u, logits = rank_buffer(x, R, A.dtype), x.new_empty(T, E, dtype=wide(A.dtype))
    if T > 0:
        sizes = _tile("shrink_route", x, A, R)
        grid = (triton.cdiv(T, sizes["BT"]), triton.cdiv(R, sizes["BR"]))
        kernels.shrink_route[grid](
            x, A, router, router if bias is None else bias, u, logits,
            T, K, R, E, x.stride(0), A.stride(0), router.stride(0), u.stride(0), E,
            BE=max(16, triton.next_power_of_2(E)), BIASED=bias is not None,
            WIDE=WIDE.get(A.dtype, tl.float32), PRECISION=precision,
            ROUTER_PRECISION=router_precision(x, precision),
            **sizes,
        )  # fmt: skip
    return u, logits


def expand(z: Tensor, W: Tensor, out: Tensor | None, y: Tensor, precision: str) -> None:
    """y (T, N) = out + z W^T; out may be y or None."""
    (T, R), N = z.shape, W.shape[0]
    if T == 0:
        return
    W = _padded(W) if W.stride(1) == 1 else W
    sizes = _tile("expand", z, W, R)
    grid = (triton.cdiv(T, sizes["BT"]), triton.cdiv(N, sizes["BN"]))
    kernels.expand[grid](
        z, W, y if out is None else out, y,
        T, N, R, z.stride(0), W.stride(0), W.stride(1),
        0 if out is None else out.stride(0), y.stride(0),
        ADD=out is not None, WIDE=WIDE.get(W.dtype, tl.float32), PRECISION=precision, **sizes,
    )  # fmt: skip


def rank_backward(
    dy: Tensor,
    B: Tensor,
    u: Tensor | None,
    gate: Tensor | None,
    scale: float | Tensor,
    layout: RankLayout,
    needs: Needs,
    precision: str,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dU, Z, dgate)."""
    (T, N), R = dy.shape, B.shape[1]
    B = _padded(B)
    sizes = _tile("rank_backward", dy, B, R)
    du = rank_buffer(dy, R, B.dtype) if needs.rank_gradient else None
    z = rank_buffer(dy, R, B.dtype) if needs.B else None
    planes = None
    if needs.gate and gate is not None:
        tiles = triton.cdiv(R, sizes["BR"]) if _straddles(layout, sizes["BR"]) else 1
        planes = dy.new_zeros(tiles, *gate.shape, dtype=wide(B.dtype))
    if T > 0:
        grid = (triton.cdiv(T, sizes["BT"]), triton.cdiv(R, sizes["BR"]))
        like = next(t for t in (du, z, u, dy) if t is not None)
        kernels.rank_backward[grid](
            dy, B, dy if u is None else u, dy if gate is None else gate,
            _column_table(layout, dy.device), scale_table(scale, R, B),
            like if du is None else du, like if z is None else z, dy if planes is None else planes,
            T, N, R, dy.stride(0), B.stride(0), like.stride(0),
            0 if gate is None else gate.stride(0),
            0 if planes is None else planes.stride(1),
            0 if planes is None or planes.shape[0] == 1 else planes.stride(0),
            GATED=gate is not None, WRITE_DU=du is not None, WRITE_Z=z is not None,
            WRITE_DG=planes is not None, WIDE=WIDE.get(B.dtype, tl.float32), PRECISION=precision,
            **sizes,
        )  # fmt: skip
    if planes is None or gate is None:
        return du, z, None
    return du, z, planes.sum(0).to(gate.dtype)


@lru_cache(maxsize=256)
def _straddles(layout: RankLayout, width: int) -> bool:
    """Whether some routed expert's columns lie in two tiles of that width."""
    start = 0
    for rank in layout.ranks:
        if start // width != (start + rank - 1) // width:
            return True
        start += rank
    return False


def outer(p: Tensor, v: Tensor, w: Tensor, precision: str) -> None:
    """w (R, N), of any strides, = p (T, R)^T v (T, N)."""
    (T, R), N = p.shape, v.shape[1]
    if T == 0:
        w.zero_()
        return
    sizes = _tile("outer", v, p, R)
    tiles = triton.cdiv(N, sizes["BN"]) * triton.cdiv(R, sizes["BR"])
    steps = triton.cdiv(T, sizes["BT"])
    count = max(1, min(triton.cdiv(ENOUGH_PROGRAMS, tiles), triton.cdiv(steps, 4)))
    rows = triton.cdiv(steps, count) * sizes["BT"]
    count = triton.cdiv(T, rows)
    accumulator = WIDE.get(p.dtype, tl.float32)
    planes = w.unsqueeze(0) if count == 1 else w.new_empty(count, R, N, dtype=wide(p.dtype))
    grid = (triton.cdiv(N, sizes["BN"]), triton.cdiv(R, sizes["BR"]), count)
    kernels.outer[grid](
        p, v, planes, T, R, N, p.stride(0), v.stride(0), *planes.stride(), rows,
        WIDE=accumulator, PRECISION=precision, **sizes,
    )  # fmt: skip
    if count > 1:
        sizes = _tile("add_planes", v, p, R)
        kernels.add_planes[(triton.cdiv(N, sizes["BN"]), triton.cdiv(R, sizes["BR"]))](
            planes, w, count, R, N, planes.stride(0), *w.stride(), WIDE=accumulator, **sizes,
        )  # fmt: skip
