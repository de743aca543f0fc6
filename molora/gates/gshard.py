"""Top-2 with a second expert that is drawn (GShard, arXiv 2006.16668)."""

import torch
from torch import Tensor

from ..routing import Routing, SiteInput
from .base import Gate, normalize, register_gate, select_top_k, softmax_of_token


@register_gate("gshard")
class GShard(Gate):
    """g = p / sum of the 2 largest p for those 2 experts, with p = softmax(z).

    In training the second expert is used with probability min(1, 2 g_2) only. The first keeps its
    weight then, so the weights sum to less than 1.
    """

    takes_top_k = True
    at_most_top_k = True
    default_top_k = 2
    fixed_top_k = 2
    draws = True

    def forward(self, logits: Tensor, inputs: SiteInput) -> Routing:
        probs = logits.softmax(-1)
        weights = normalize(probs * select_top_k(logits, 2))
        if self.training:
            second = ~select_top_k(logits, 1)
            drawn = torch.rand_like(weights[:, :1])
            weights = weights.masked_fill(second & (drawn >= 2 * weights), 0.0)
        return Routing(weights=weights, logits=logits, probs=probs)

    def weights_of_token(self, logits: list[float]) -> list[tuple[int, float]] | None:
        return softmax_of_token(logits, 2)
