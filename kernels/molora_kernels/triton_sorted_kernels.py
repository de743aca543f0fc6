"""Kernels over tokens sorted by expert: each tile of rows belongs to one expert.

Slot s holds every token's s-th chosen expert, so within a slot a token occurs once. Rows are read
and written through the sorted order, never copied. Tables, made on the device:

    ORDER   (SLOTS, T)      tokens sorted by the slot's expert
    OFFSET  (SLOTS, E + 1)  where an expert's tokens begin in ORDER
    EXPERT  (SLOTS, tiles)  expert of a tile; E for a tile that is not needed
    ROW     (SLOTS, tiles)  where the tile begins in ORDER
    START   (E + 1)         where an expert's rank columns begin

U, Z and dU are (T, SLOTS BR): the columns of the chosen experts only, each padded to BR.
"""

import triton
import triton.language as tl

from molora_kernels.triton_kernels import _dot

# A jitted function's parameters are pointers, numbers or constants as the caller decides.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False


@triton.jit
def _rows(ORDER, OFFSET, ROW, slot, tile, expert, T, E, TILES, BT: tl.constexpr):
    """64-bit tokens of a tile and which of them exist."""
    row = tl.load(ROW + slot * TILES + tile) + tl.arange(0, BT)
    mask = row < tl.load(OFFSET + slot * (E + 1) + expert + 1)
    return tl.load(ORDER + slot.to(tl.int64) * T + row, mask=mask, other=0).to(tl.int64), mask


@triton.jit
def sorted_shrink(
    X, A, WEIGHT, SCALE, ORDER, OFFSET, EXPERT, ROW, START, U, Z,
    T, K, E, TILES, sx, sa,
    SLOTS: tl.constexpr, BT: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """U = X[t] A_e^T and Z = s g U of one tile and slot."""
    tile, slot = tl.program_id(0), tl.program_id(1)
    expert = tl.load(EXPERT + slot * TILES + tile)
    if expert < E:
        t64, mask_t = _rows(ORDER, OFFSET, ROW, slot, tile, expert, T, E, TILES, BT)
        start = tl.load(START + expert)
        j = tl.arange(0, BR)
        mask_j = j < tl.load(START + expert + 1) - start
        acc = tl.zeros((BT, BR), dtype=WIDE)
        for k0 in range(0, K, BK):
            k = k0 + tl.arange(0, BK)
            mask_k = k < K
            x = tl.load(
                X + t64[:, None] * sx + k[None, :],
                mask=mask_t[:, None] & mask_k[None, :],
                other=0.0,
            )
            a = tl.load(
                A + (start + j)[None, :] * sa + k[:, None],
                mask=mask_j[None, :] & mask_k[:, None],
                other=0.0,
            )
            acc = _dot(x.to(A.dtype.element_ty), a, acc, PRECISION)
        weight = tl.load(WEIGHT + t64 * SLOTS + slot, mask=mask_t, other=0.0).to(WIDE)
        scale = tl.load(SCALE + start + j, mask=mask_j, other=0.0).to(WIDE)
        offset = t64[:, None] * (SLOTS * BR) + (slot * BR + j)[None, :]
        tl.store(U + offset, acc.to(U.dtype.element_ty), mask=mask_t[:, None])
        z = acc * weight[:, None] * scale[None, :]
        tl.store(Z + offset, z.to(Z.dtype.element_ty), mask=mask_t[:, None])


@triton.jit
def sorted_expand(
    Z, W, ORDER, OFFSET, EXPERT, ROW, START, OUT, Y,
    slot, T, N, E, TILES, swn, swr, so, sy,
    SLOTS: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
    ADD: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Y[t] = OUT[t] + Z[t, slot] W_e^T; one launch per slot, so that each row has one writer."""
    tile = tl.program_id(0)
    slot = slot + tl.zeros((), dtype=tl.int32)
    expert = tl.load(EXPERT + slot * TILES + tile)
    if expert < E:
        t64, mask_t = _rows(ORDER, OFFSET, ROW, slot, tile, expert, T, E, TILES, BT)
        start = tl.load(START + expert)
        j = tl.arange(0, BR)
        mask_j = j < tl.load(START + expert + 1) - start
        n = tl.program_id(1) * BN + tl.arange(0, BN)
        mask_n = n < N
        z = tl.load(
            Z + t64[:, None] * (SLOTS * BR) + (slot * BR + j)[None, :],
            mask=mask_t[:, None],
            other=0.0,
        )
        w = tl.load(
            W + n[None, :] * swn + (start + j)[:, None] * swr,
            mask=mask_n[None, :] & mask_j[:, None],
            other=0.0,
        )
        acc = _dot(z, w, tl.zeros((BT, BN), dtype=WIDE), PRECISION)
        mask = mask_t[:, None] & mask_n[None, :]
        if ADD:
            acc += tl.load(OUT + t64[:, None] * so + n[None, :], mask=mask, other=0.0).to(WIDE)
        tl.store(Y + t64[:, None] * sy + n[None, :], acc.to(Y.dtype.element_ty), mask=mask)


@triton.jit
def sorted_rank_backward(
    DY, B, U, WEIGHT, SCALE, ORDER, OFFSET, EXPERT, ROW, START, DU, Z, DG,
    T, N, E, TILES, sdy, sb,
    SLOTS: tl.constexpr, BT: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dU, Z and dg (T, SLOTS) of one tile and slot, from dY[t] B_e."""
    tile, slot = tl.program_id(0), tl.program_id(1)
    expert = tl.load(EXPERT + slot * TILES + tile)
    if expert < E:
        t64, mask_t = _rows(ORDER, OFFSET, ROW, slot, tile, expert, T, E, TILES, BT)
        start = tl.load(START + expert)
        j = tl.arange(0, BR)
        mask_j = j < tl.load(START + expert + 1) - start
        acc = tl.zeros((BT, BR), dtype=WIDE)
        for n0 in range(0, N, BN):
            n = n0 + tl.arange(0, BN)
            mask_n = n < N
            dy = tl.load(
                DY + t64[:, None] * sdy + n[None, :],
                mask=mask_t[:, None] & mask_n[None, :],
                other=0.0,
            )
            b = tl.load(
                B + n[:, None] * sb + (start + j)[None, :],
                mask=mask_n[:, None] & mask_j[None, :],
                other=0.0,
            )
            acc = _dot(dy.to(B.dtype.element_ty), b, acc, PRECISION)
        scale = tl.load(SCALE + start + j, mask=mask_j, other=0.0).to(WIDE)
        acc = acc * scale[None, :]
        weight = tl.load(WEIGHT + t64 * SLOTS + slot, mask=mask_t, other=0.0).to(WIDE)[:, None]
        offset = t64[:, None] * (SLOTS * BR) + (slot * BR + j)[None, :]
        u = tl.load(U + offset, mask=mask_t[:, None], other=0.0).to(WIDE)
        tl.store(DG + t64 * SLOTS + slot, tl.sum(acc * u, 1).to(DG.dtype.element_ty), mask=mask_t)
        tl.store(DU + offset, (acc * weight).to(DU.dtype.element_ty), mask=mask_t[:, None])
        z = u * weight * scale[None, :]
        tl.store(Z + offset, z.to(Z.dtype.element_ty), mask=mask_t[:, None])


@triton.jit
def sorted_outer(
    P, V, ORDER, OFFSET, START, W,
    T, N, E, sv, swr, swn,
    SLOTS: tl.constexpr, BT: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """W (an expert's columns, N) = its tokens' P^T V, summed over slots by one program."""
    expert = tl.program_id(1)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    start = tl.load(START + expert)
    j = tl.arange(0, BR)
    mask_j, mask_n = j < tl.load(START + expert + 1) - start, n < N
    acc = tl.zeros((BR, BN), dtype=WIDE)
    for slot in range(SLOTS):
        first = tl.load(OFFSET + slot * (E + 1) + expert)
        last = tl.load(OFFSET + slot * (E + 1) + expert + 1)
        for row0 in range(first, last, BT):
            row = row0 + tl.arange(0, BT)
            mask_t = row < last
            t64 = tl.load(ORDER + slot * T + row, mask=mask_t, other=0).to(tl.int64)
            p = tl.load(
                P + t64[:, None] * (SLOTS * BR) + (slot * BR + j)[None, :],
                mask=mask_t[:, None],
                other=0.0,
            )
            v = tl.load(
                V + t64[:, None] * sv + n[None, :],
                mask=mask_t[:, None] & mask_n[None, :],
                other=0.0,
            )
            acc = _dot(tl.trans(p), v.to(P.dtype.element_ty), acc, PRECISION)
    offset = (start + j).to(tl.int64)[:, None] * swr + n[None, :] * swn
    tl.store(W + offset, acc.to(W.dtype.element_ty), mask=mask_j[:, None] & mask_n[None, :])
