"""Router rows that are short and point in different directions (DynMoE, arXiv 2405.14297)."""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ..routing import Routing, SiteInput
from .base import Loss, register_loss

if TYPE_CHECKING:
    from ..experts import Experts
    from ..routers import Router


@register_loss("simplicity_diversity")
class SimplicityDiversity(Loss):
    """L = |V V^T - I|_F + mean over e of |w_e|, V the rows w_e of the router scaled to length 1.

    Over the active experts alone where the gate switches some off. It is the mean length when the
    rows are orthogonal, which the first term wants and at most d_in rows can be.
    """

    def check_fit(self, router: "Router", experts: "Experts") -> None:
        if not router.has_rows(len(experts.ranks)):
            raise ValueError(
                "the loss 'simplicity_diversity' reads the router's row for each expert: use "
                "router='cosine' or 'linear', and a gate without logits of its own."
            )

    def __call__(self, routing: Routing, inputs: SiteInput) -> Tensor:
        weight: Tensor = inputs.router.weight  # type: ignore[union-attr,assignment]
        weight = weight.to(routing.probs.dtype)
        active = torch.ones(len(weight), dtype=torch.bool, device=weight.device)
        if "active" in routing.extras:
            active = routing.extras["active"].any(0)
        rows = F.normalize(weight, dim=-1)
        excess = rows @ rows.mT - torch.eye(len(rows), dtype=rows.dtype, device=rows.device)
        diversity = torch.linalg.vector_norm(excess * (active[:, None] & active))
        lengths = torch.linalg.vector_norm(weight, dim=-1) * active
        return diversity + lengths.sum() / active.sum().clamp(min=1)
