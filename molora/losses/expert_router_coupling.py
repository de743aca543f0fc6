"""A router row excites its own expert most (ERC, arXiv 2512.23447)."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..routing import Routing, SiteInput
from .base import Loss, register_loss

if TYPE_CHECKING:
    from ..experts import Experts
    from ..routers import Router


@register_loss("expert_router_coupling")
class ExpertRouterCoupling(Loss):
    """L = 1/E^2 * sum over i != j of (M_ij - alpha M_ii)+ + (M_ji - alpha M_ii)+, M_ij = |A_j v_i|.

    v_i is row i of the router, each feature of it times a draw from U(1 - e_i, 1 + e_i) with e_i
    half the distance to the nearest other row over its own length: a token that the router gives to
    expert i. It is 0 when row i excites expert i more than all others by the factor 1 / alpha, and
    expert i by no other row as much. It costs E^2 products of rank r and doesn't look at tokens, so
    padding can't count.

    Published for the gate projection of whole experts; here A_j is the expert's down factor.

    Args:
        alpha: how much a foreign pair may have of the own one; 1 for 64 experts and 0.5 for 256 are
            published.
        noise: draw the factors. Without them the loss is a function of the parameters alone.
        normalize: divide M_ij by |v_i| and by the Frobenius norm of A_j. As published the loss also
            falls when everything shrinks.
    """

    def __init__(self, *, alpha: float = 1.0, noise: bool = True, normalize: bool = False) -> None:
        if not alpha > 0:
            raise ValueError(f"loss option alpha={alpha!r} must be above 0")
        self.alpha = alpha
        self.noise = self.draws = noise
        self.normalize = normalize

    def check_fit(self, router: "Router", experts: "Experts") -> None:
        experts.down_factor()  # or the refusal of experts that have none
        if not router.has_rows(len(experts.ranks), experts.in_features):
            raise ValueError(
                "the loss 'expert_router_coupling' reads the router's row for each expert: use "
                "router='linear' or 'cosine', and a gate without logits of its own."
            )

    def __call__(self, routing: Routing, inputs: SiteInput) -> Tensor:
        rows, experts = self._rows(routing, inputs), inputs.experts
        assert experts is not None
        factor = experts.down_factor().to(rows.dtype)
        products = (rows @ factor.mT).split(experts.ranks, dim=-1)
        M = torch.stack([torch.linalg.vector_norm(part, dim=-1) for part in products], -1)  # (E, E)
        if self.normalize:
            sizes = torch.stack([torch.linalg.vector_norm(a) for a in factor.split(experts.ranks)])
            lengths = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
            M = M / (lengths * sizes).clamp(min=1e-12)
        own = self.alpha * M.diagonal()[:, None]
        others = ~torch.eye(len(M), dtype=torch.bool, device=M.device)
        excess = torch.relu(M - own) + torch.relu(M.mT - own)
        return (excess * others).sum() / len(M) ** 2

    def _rows(self, routing: Routing, inputs: SiteInput) -> Tensor:
        """(E, d_in) the rows v_i."""
        weight: Tensor = inputs.router.weight  # type: ignore[union-attr,assignment]
        rows = weight.to(routing.probs.dtype)
        if not self.noise or len(rows) < 2:
            return rows
        with torch.no_grad():
            distances = torch.linalg.vector_norm(rows[:, None] - rows, dim=-1)
            distances.fill_diagonal_(torch.inf)
            lengths = torch.linalg.vector_norm(rows, dim=-1).clamp(min=1e-12)
            bound = (distances.amin(-1) / (2 * lengths))[:, None]
            factors = 1 + bound * (2 * torch.rand_like(rows) - 1)
        return rows * factors
