"""The static map of one site that comes nearest to its routed experts, by four methods.

The routed experts add y = B v to the base output (`moments`). Each method adds M x instead and
minimises the sum over the tokens of |y - M x|^2, over more and more maps M:

    mean            M = B diag(g) A, with the mean routing weights; nothing is minimised
    least_squares   the same with the best weights w: H w = c, H_ef = sum of z_e z_f,
                    c_e = sum of z_e y, z_e = B_e A_e x the output of expert e
    full            M = B C for the best C (R, d_in): C = (sum of v x^T)(sum of x x^T)^-1. Nothing
                    is lost against any (d_out, d_in): y lies in the span of B
    low_rank        the best M of rank q: full's, projected on the q largest directions of its
                    outputs on the data (reduced-rank regression)

A ridge pulls each solution to that of the line before it: with M0 from there, they minimise
|y - M x|^2 + penalty |M - M0|^2, with the penalty `ridge` times the mean eigenvalue. So on its data
least_squares does no worse than mean and full no worse than least_squares, whatever the ridge, and
directions that the data says nothing about keep what they had. low_rank minimises what full does,
among the maps of rank q.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .moments import SiteMoments

METHODS = ("mean", "least_squares", "full", "low_rank")


@dataclass(frozen=True)
class SiteFit:
    """What a method found for one site.

    Attributes:
        relative_error: root of (sum of |y - M x|^2 / sum of |y|^2) on the data.
        weights: (n,) fp64, for "mean" and "least_squares".
        factors: (A (q, d_in), B (d_out, q)) fp64, for "full" and "low_rank".
    """

    relative_error: float
    weights: Tensor | None = None
    factors: tuple[Tensor, Tensor] | None = None


@torch.no_grad()
def fit_site(moments: SiteMoments, method: str, ridge: float, rank: int | None = None) -> SiteFit:
    """Fit one site.

    Args:
        moments: its sums; with those of the input for "full" and "low_rank".
        method: one of METHODS.
        ridge: pull to the simpler method, relative to the mean eigenvalue of the data.
        rank: q, for "low_rank".
    """
    B = moments.factors.B.double().to(moments.device)
    Q, R_B = torch.linalg.qr(B)  # norms in the output are norms of R_B
    weights = _mean_weights(moments)
    if weights is not None and method != "mean":
        weights = _least_squares(moments, B, weights, ridge)
    gate = moments.factors.per_rank(weights).double().to(moments.device)
    if method in ("mean", "least_squares"):
        error = moments.vv - 2 * gate[:, None] * moments.uv + torch.outer(gate, gate) * moments.uu
        return SiteFit(_relative(moments, R_B, R_B @ error @ R_B.T), weights)
    C = _best_map(moments, gate, ridge)
    T = R_B @ C
    assert moments.source is not None, "collected with linear maps"
    S, _ = moments.source.regularized(ridge)
    if method == "full":
        factors = (C, B)
    else:
        assert rank is not None, "checked by calibrate"
        metric = S.to(T) + _penalty(S, ridge) * torch.eye(len(S)).to(T)
        largest = torch.linalg.eigh(T @ metric @ T.T).eigenvectors.flip(-1)[:, :rank]
        factors = (largest.T @ T, Q @ largest)
        T = largest @ factors[0]
    cross = T @ moments.vx.T @ R_B.T
    error = T @ S.to(T) @ T.T - cross - cross.T + R_B @ moments.vv @ R_B.T
    return SiteFit(_relative(moments, R_B, error), None, factors)


def _mean_weights(moments: SiteMoments) -> Tensor | None:
    return None if moments.weights is None else moments.weights / max(moments.tokens, 1)


def _least_squares(moments: SiteMoments, B: Tensor, mean: Tensor, ridge: float) -> Tensor:
    """(n,) the best weights; of several equally good ones the nearest to the mean."""
    factors = moments.factors
    blocks = torch.block_diag(*[torch.ones(1, rank) for rank in factors.ranks]).to(B)
    gram = B.T @ B
    H = blocks @ (gram * moments.uu) @ blocks.T
    # y includes what is always on, whose weight stays 1.
    c = (blocks @ (gram * moments.uv) @ blocks.T).sum(1)
    n = len(mean)
    always = H[:n, n:].sum(1)
    H, c = H[:n, :n], c[:n] - always
    penalized = H + _penalty(H, ridge) * torch.eye(n).to(H)
    tolerance = n * torch.finfo(factors.A.dtype).eps
    step = torch.linalg.pinv(penalized, hermitian=True, rtol=tolerance) @ (c - H @ mean)
    return mean + step


def _best_map(moments: SiteMoments, gate: Tensor, ridge: float) -> Tensor:
    """(R, d_in) C, pulled to diag(gate) A."""
    assert moments.source is not None, "collected with linear maps"
    S, inverse = moments.source.regularized(ridge)
    start = gate[:, None] * moments.factors.A.double().to(gate)
    return start + (moments.vx - start @ S.to(gate)) @ inverse.to(gate)


def _penalty(S: Tensor, ridge: float) -> Tensor:
    return ridge * S.diagonal().mean()


def _relative(moments: SiteMoments, R_B: Tensor, error: Tensor) -> float:
    """Root of the error's trace over that of y; rounding may bring either below zero."""
    whole = float((R_B @ moments.vv @ R_B.T).trace())
    return (max(float(error.trace()), 0.0) / whole) ** 0.5 if whole > 0 else 0.0
