"""Experts that choose by themselves: the score is what the expert's own A makes of the token.

Autonomy of Experts (arXiv 2501.13074), MoRAM (arXiv 2506.21035), FlyLoRA (arXiv 2510.08396).
"""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ..registry import unknown_name_message
from ..routing import SiteInput
from .base import Router, register_router

if TYPE_CHECKING:
    from ..experts import Experts
    from ..gates import Gate

SCORES = ("norm", "signed")
NORMALIZATIONS = ("none", "token", "factor")


@register_router("activation")
class ActivationRouter(Router):
    """z_e = |A_e x|, or a_e x with its sign for experts of rank 1; no parameters of its own.

    Every activation is formed once here and once by the experts. The router sees the input without
    the experts' dropout.

    Args:
        score: "norm" |A_e x|, or "signed" a_e x, for experts of rank 1.
        normalize: "none"; "token" divides the scores of a token by their Euclidean norm; "factor"
            divides an expert's score by the Frobenius norm of A_e, so that a large factor alone
            doesn't win tokens.
        temperature: see `Router`.
        noise: see `Router`.
    """

    def __init__(
        self,
        in_features: int,
        num_experts: int,
        *,
        score: str = "norm",
        normalize: str = "none",
        temperature: float = 1.0,
        noise: float = 0.0,
    ) -> None:
        super().__init__(in_features, num_experts, temperature=temperature, noise=noise)
        if score not in SCORES:
            raise ValueError(unknown_name_message("router option score", score, SCORES))
        if normalize not in NORMALIZATIONS:
            raise ValueError(
                unknown_name_message("router option normalize", normalize, NORMALIZATIONS)
            )
        self.score = score
        self.normalize = normalize

    def reset_parameters(self) -> None:
        pass

    def check_fit(self, gate: "Gate", experts: "Experts") -> None:
        experts.down_factor()  # or the refusal of experts that have none
        if self.score == "signed" and set(experts.ranks) != {1}:
            raise ValueError(
                f"router option score='signed' needs experts of rank 1, not {list(experts.ranks)}; "
                "set rank_wise=True or r=1, or use score='norm'."
            )
        if gate.num_logits != gate.num_experts:
            raise ValueError(
                f"the router 'activation' gives {gate.num_experts} logits, one for each expert, "
                f"but the gate reads {gate.num_logits}; use a gate without logits of its own, or "
                "another router."
            )

    def compute_logits(self, inputs: SiteInput) -> Tensor:
        experts = inputs.experts
        assert experts is not None, "the layer passes its experts to the router"
        factor, ranks = experts.down_factor(), experts.ranks
        scores = ops.router_logits(inputs.hidden, factor)
        if self.score == "norm":
            scores = _norms(scores, ranks)
        if self.normalize == "token":
            return F.normalize(scores, dim=-1)
        if self.normalize == "factor":
            return scores / _norms(factor.to(scores.dtype).norm(dim=-1), ranks).clamp(min=1e-12)
        return scores


def _norms(values: Tensor, ranks: tuple[int, ...]) -> Tensor:
    """(..., sum of ranks) -> (..., E): the Euclidean norm of each expert's block."""
    if len(set(ranks)) == 1:
        return torch.linalg.vector_norm(values.unflatten(-1, (len(ranks), ranks[0])), dim=-1)
    blocks = values.split(ranks, dim=-1)
    return torch.stack([torch.linalg.vector_norm(block, dim=-1) for block in blocks], dim=-1)
