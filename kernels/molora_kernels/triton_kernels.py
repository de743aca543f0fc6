"""The operator's Triton kernels: rank space is (T, R), experts are columns of it.

    shrink        U = X A^T, Z = s g U         one read of X; the gate is applied in rank space
    shrink_route  U = X A^T and logits = X W^T     the same read of X for the router
    expand        Y = OUT + Z W^T              one read and one write of Y; also dX = dU A
    rank_backward dZ = dY B, dU = s g dZ, dg = sum s dZ U, Z = s g U      one read of dY
    outer         W = P^T V                    dA = dU^T X, dB^T = Z^T dY; fp32 planes over T
    add_planes    the sum of those planes, in order

For a few tokens of generation, which read little but the factors:

    decode_shrink Z = s g A_e x for each token and chosen expert e; fp32 planes over d_in
    decode_expand y = out + sum over the chosen experts of B_e Z

No atomics: every output element has one writer, so results don't depend on the schedule. Row
offsets are 64-bit. Tables over rank columns: COLUMN gives the gate column, -1 where no gate
applies; SCALE the column's factor.

Triton's interpreter multiplies bf16 operands as integers, so it gets them in fp32 (DOT_IN_FP32).
"""

# A jitted function's parameters are pointers, numbers or constants as the caller decides.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

import triton
import triton.language as tl

DOT_IN_FP32 = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr):
    if acc.dtype == tl.float64:
        return tl.dot(a, b, acc, out_dtype=tl.float64)
    elif DOT_IN_FP32:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _weights(G, COLUMN, SCALE, t64, j, mask_t, mask_j, sg, GATED: tl.constexpr, WIDE: tl.constexpr):
    """(BT or 1, BR) scale times gate of a tile of rank columns, in the accumulator's dtype."""
    scale = tl.load(SCALE + j, mask=mask_j, other=0.0).to(WIDE)[None, :]
    if GATED:
        column = tl.load(COLUMN + j, mask=mask_j, other=-1)[None, :]
        mask = mask_t[:, None] & mask_j[None, :] & (column >= 0)
        g = tl.load(G + t64[:, None] * sg + column, mask=mask, other=0.0).to(WIDE)
        return tl.where(column >= 0, g, 1.0) * scale
    else:
        return scale


@triton.jit
def shrink(
    X, A, G, COLUMN, SCALE, U, Z,
    T, K, R, sx, sa, sg, su,
    BT: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
    GATED: tl.constexpr, WRITE_U: tl.constexpr, WRITE_Z: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """U (T, R) = X (T, K) A (R, K)^T; Z = U times gate and scale. U and Z share their strides."""
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    j = tl.program_id(1) * BR + tl.arange(0, BR)
    mask_t, mask_j, t64 = t < T, j < R, t.to(tl.int64)
    acc = tl.zeros((BT, BR), dtype=WIDE)
    for k0 in range(0, K, BK):
        k = k0 + tl.arange(0, BK)
        mask_k = k < K
        x = tl.load(
            X + t64[:, None] * sx + k[None, :], mask=mask_t[:, None] & mask_k[None, :], other=0.0
        )
        a = tl.load(
            A + j[None, :] * sa + k[:, None], mask=mask_j[None, :] & mask_k[:, None], other=0.0
        )
        acc = _dot(x.to(A.dtype.element_ty), a, acc, PRECISION)
    mask = mask_t[:, None] & mask_j[None, :]
    offset = t64[:, None] * su + j[None, :]
    if WRITE_U:
        tl.store(U + offset, acc.to(U.dtype.element_ty), mask=mask)
    if WRITE_Z:
        weights = _weights(G, COLUMN, SCALE, t64, j, mask_t, mask_j, sg, GATED, WIDE)
        tl.store(Z + offset, (acc * weights).to(Z.dtype.element_ty), mask=mask)


@triton.jit
def shrink_route(
    X, A, ROUTER, BIAS, U, LOGITS,
    T, K, R, E, sx, sa, s_router, su, s_logits,
    BT: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, BE: tl.constexpr,
    BIASED: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    ROUTER_PRECISION: tl.constexpr,
):  # fmt: skip
    """U (T, R) = X A^T and LOGITS (T, E) = X ROUTER^T + BIAS, the latter in ROUTER's wider dtype.

    All experts' logits fit one tile; the first tile of rank columns stores them.
    """
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    j = tl.program_id(1) * BR + tl.arange(0, BR)
    e = tl.arange(0, BE)
    mask_t, mask_j, mask_e, t64 = t < T, j < R, e < E, t.to(tl.int64)
    acc = tl.zeros((BT, BR), dtype=WIDE)
    logits = tl.zeros((BT, BE), dtype=WIDE)
    for k0 in range(0, K, BK):
        k = k0 + tl.arange(0, BK)
        mask_k = k < K
        x = tl.load(
            X + t64[:, None] * sx + k[None, :], mask=mask_t[:, None] & mask_k[None, :], other=0.0
        )
        a = tl.load(
            A + j[None, :] * sa + k[:, None], mask=mask_j[None, :] & mask_k[:, None], other=0.0
        )
        w = tl.load(
            ROUTER + e[None, :] * s_router + k[:, None],
            mask=mask_e[None, :] & mask_k[:, None],
            other=0.0,
        )
        acc = _dot(x.to(A.dtype.element_ty), a, acc, PRECISION)
        logits = _dot(x.to(WIDE), w.to(WIDE), logits, ROUTER_PRECISION)
    mask = mask_t[:, None] & mask_j[None, :]
    tl.store(U + t64[:, None] * su + j[None, :], acc.to(U.dtype.element_ty), mask=mask)
    if BIASED:
        logits += tl.load(BIAS + e, mask=mask_e, other=0.0).to(WIDE)[None, :]
    if tl.program_id(1) == 0:
        mask_logits = mask_t[:, None] & mask_e[None, :]
        tl.store(LOGITS + t64[:, None] * s_logits + e[None, :], logits, mask=mask_logits)


@triton.jit
def expand(
    Z, W, OUT, Y,
    T, N, R, sz, swn, swr, so, sy,
    BT: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
    ADD: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Y (T, N) = OUT + Z (T, R) W^T, with W (N, R) of any strides. OUT may be Y itself."""
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    mask_t, mask_n, t64 = t < T, n < N, t.to(tl.int64)
    acc = tl.zeros((BT, BN), dtype=WIDE)
    for r0 in range(0, R, BR):
        j = r0 + tl.arange(0, BR)
        mask_j = j < R
        z = tl.load(
            Z + t64[:, None] * sz + j[None, :], mask=mask_t[:, None] & mask_j[None, :], other=0.0
        )
        w = tl.load(
            W + n[None, :] * swn + j[:, None] * swr,
            mask=mask_n[None, :] & mask_j[:, None],
            other=0.0,
        )
        acc = _dot(z, w, acc, PRECISION)
    mask = mask_t[:, None] & mask_n[None, :]
    if ADD:
        acc += tl.load(OUT + t64[:, None] * so + n[None, :], mask=mask, other=0.0).to(WIDE)
    tl.store(Y + t64[:, None] * sy + n[None, :], acc.to(Y.dtype.element_ty), mask=mask)


@triton.jit
def rank_backward(
    DY, B, U, G, COLUMN, SCALE, DU, Z, DG,
    T, N, R, sdy, sb, su, sg, sdg, sdg_plane,
    BT: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr,
    GATED: tl.constexpr, WRITE_DU: tl.constexpr, WRITE_Z: tl.constexpr, WRITE_DG: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dU, Z (T, R) and dg (T, E) from one pass over dY (T, N). U, DU and Z share their strides.

    An expert whose columns lie in one tile writes its dg there; sdg_plane is then zero. Otherwise
    each tile writes its own plane.
    """
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    tile = tl.program_id(1)
    j = tile * BR + tl.arange(0, BR)
    mask_t, mask_j, t64 = t < T, j < R, t.to(tl.int64)
    acc = tl.zeros((BT, BR), dtype=WIDE)
    for n0 in range(0, N, BN):
        n = n0 + tl.arange(0, BN)
        mask_n = n < N
        dy = tl.load(
            DY + t64[:, None] * sdy + n[None, :], mask=mask_t[:, None] & mask_n[None, :], other=0.0
        )
        b = tl.load(
            B + n[:, None] * sb + j[None, :], mask=mask_n[:, None] & mask_j[None, :], other=0.0
        )
        acc = _dot(dy.to(B.dtype.element_ty), b, acc, PRECISION)
    mask = mask_t[:, None] & mask_j[None, :]
    offset = t64[:, None] * su + j[None, :]
    weights = _weights(G, COLUMN, SCALE, t64, j, mask_t, mask_j, sg, GATED, WIDE)
    if WRITE_DU:
        tl.store(DU + offset, (acc * weights).to(DU.dtype.element_ty), mask=mask)
    if WRITE_Z or WRITE_DG:
        u = tl.load(U + offset, mask=mask, other=0.0).to(WIDE)
        if WRITE_Z:
            tl.store(Z + offset, (u * weights).to(Z.dtype.element_ty), mask=mask)
        if WRITE_DG:
            scale = tl.load(SCALE + j, mask=mask_j, other=0.0).to(WIDE)
            product = acc * u * scale[None, :]
            column = tl.load(COLUMN + j, mask=mask_j, other=-1)
            first = tl.min(tl.where(column >= 0, column, 2147483647), 0)
            last = tl.max(column, 0)
            row = DG + tile.to(tl.int64) * sdg_plane + t64 * sdg
            for e in range(first, last + 1):
                total = tl.sum(tl.where((column == e)[None, :], product, 0.0), 1)
                tl.store(row + e, total.to(DG.dtype.element_ty), mask=mask_t)


@triton.jit
def outer(
    P, V, W,
    T, R, N, sp, sv, sw_plane, swr, swn, rows_per_plane,
    BT: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One plane of W (R, N) = P (T, R)^T V (T, N): the rows that belong to program_id(2)."""
    j = tl.program_id(1) * BR + tl.arange(0, BR)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    plane = tl.program_id(2)
    mask_j, mask_n = j < R, n < N
    acc = tl.zeros((BR, BN), dtype=WIDE)
    start = plane * rows_per_plane
    for t0 in range(start, min(T, start + rows_per_plane), BT):
        t = t0 + tl.arange(0, BT)
        mask_t, t64 = t < T, t.to(tl.int64)
        p = tl.load(
            P + t64[:, None] * sp + j[None, :], mask=mask_t[:, None] & mask_j[None, :], other=0.0
        )
        v = tl.load(
            V + t64[:, None] * sv + n[None, :], mask=mask_t[:, None] & mask_n[None, :], other=0.0
        )
        acc = _dot(tl.trans(p), v.to(P.dtype.element_ty), acc, PRECISION)
    offset = plane.to(tl.int64) * sw_plane + j.to(tl.int64)[:, None] * swr + n[None, :] * swn
    tl.store(W + offset, acc.to(W.dtype.element_ty), mask=mask_j[:, None] & mask_n[None, :])


@triton.jit
def add_planes(
    PLANES, W,
    PLANE_COUNT, R, N, s_plane, swr, swn,
    BR: tl.constexpr, BN: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """W (R, N) = the sum of PLANES (count, R, N contiguous), in order."""
    j = tl.program_id(1) * BR + tl.arange(0, BR)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    mask = (j < R)[:, None] & (n < N)[None, :]
    j64 = j.to(tl.int64)
    acc = tl.zeros((BR, BN), dtype=WIDE)
    offset = j64[:, None] * N + n[None, :]
    for _ in range(PLANE_COUNT):
        acc += tl.load(PLANES + offset, mask=mask, other=0.0).to(WIDE)
        offset += s_plane
    tl.store(W + j64[:, None] * swr + n[None, :] * swn, acc.to(W.dtype.element_ty), mask=mask)


@triton.jit
def decode_shrink(
    X, A, CHOSEN, WEIGHT, SCALE, Z,
    K, sx, sa, s_chosen, s_plane,
    SLOTS: tl.constexpr, R: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
    SPLIT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Plane program_id(1) of Z (SPLIT, T, SLOTS, R): every SPLIT-th block of d_in.

    CHOSEN and WEIGHT are (T, SLOTS): the experts of each token, of R columns each, and their gates.
    """
    pair, plane = tl.program_id(0), tl.program_id(1)
    t, slot = (pair // SLOTS).to(tl.int64), pair % SLOTS
    expert = tl.load(CHOSEN + t * s_chosen + slot)
    weight = tl.load(WEIGHT + t * s_chosen + slot).to(WIDE)
    j = tl.arange(0, BR)
    mask_j = j < R
    column = expert * R + j
    acc = tl.zeros((BR,), dtype=WIDE)
    for k0 in range(plane * BK, K, BK * SPLIT):
        k = k0 + tl.arange(0, BK)
        mask_k = k < K
        x = tl.load(X + t * sx + k, mask=mask_k, other=0.0)
        mask = mask_j[:, None] & mask_k[None, :]
        a = tl.load(A + column[:, None] * sa + k[None, :], mask=mask, other=0.0)
        acc += tl.sum(a.to(WIDE) * x.to(A.dtype.element_ty).to(WIDE)[None, :], 1)
    scale = tl.load(SCALE + column, mask=mask_j, other=0.0).to(WIDE)
    z = Z + plane.to(tl.int64) * s_plane + pair.to(tl.int64) * R
    tl.store(z + j, acc * weight * scale, mask=mask_j)


@triton.jit
def decode_expand(
    Z, B, CHOSEN, OUT, Y,
    N, sb, s_chosen, s_plane, so, sy,
    SLOTS: tl.constexpr, R: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr,
    SPLIT: tl.constexpr, ADD: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Y (T, N) = OUT + the chosen experts' B (N, columns) times the sum of Z's planes."""
    t = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    mask_n = n < N
    j = tl.arange(0, BR)
    mask_j = j < R
    acc = tl.zeros((BN,), dtype=WIDE)
    if ADD:
        acc += tl.load(OUT + t * so + n, mask=mask_n, other=0.0).to(WIDE)
    for slot in tl.static_range(SLOTS):
        expert = tl.load(CHOSEN + t * s_chosen + slot)
        z = tl.zeros((BR,), dtype=WIDE)
        for plane in tl.static_range(SPLIT):
            z += tl.load(Z + plane * s_plane + (t * SLOTS + slot) * R + j, mask=mask_j, other=0.0)
        mask = mask_n[:, None] & mask_j[None, :]
        b = tl.load(B + n[:, None] * sb + (expert * R + j)[None, :], mask=mask, other=0.0)
        acc += tl.sum(b.to(WIDE) * z[None, :], 1)
    tl.store(Y + t * sy + n, acc.to(Y.dtype.element_ty), mask=mask_n)
