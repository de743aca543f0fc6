"""The largest singular values of a matrix as two factors."""

import torch
from torch import Tensor


def truncate(D: Tensor, most: int | None, max_error: float | None) -> tuple[Tensor, Tensor]:
    """A (r, d_in) and B (d_out, r) of D (d_out, d_in), with equal norms at each rank.

    Args:
        D: in fp32 or fp64.
        most: the highest r; None for no limit.
        max_error: the lowest r whose relative error (Frobenius) is at most this, up to `most`.
    """
    U, S, Vh = torch.linalg.svd(D, full_matrices=False)
    rank = len(S) if most is None else min(most, len(S))
    if max_error is not None:
        # errors[r] is what is left after r singular values, from the smallest up.
        squares = S.double().flip(0).square().cumsum(0).flip(0)
        errors = torch.cat([squares, squares.new_zeros(1)]).sqrt() / squares[0].sqrt()
        rank = max(1, min(rank, int((errors > max_error).sum())))
    root = S[:rank].sqrt()
    return root[:, None] * Vh[:rank], U[:, :rank] * root


def relative_error(D: Tensor, A: Tensor, B: Tensor) -> float:
    """|D - B A| / |D| in the Frobenius norm."""
    return float((D - B.to(D) @ A.to(D)).norm() / D.norm())
