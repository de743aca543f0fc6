"""Top-1 against an expert that is always on (Awaker2.5-VL, arXiv 2411.10669)."""

from torch import Tensor

from ..routing import Routing, SiteInput
from .base import Gate, register_gate, select_top_k


@register_gate("convex")
class Convex(Gate):
    """p = softmax(z); the likeliest expert with weight p_max, the shared expert with 1 - p_max."""

    takes_top_k = True
    default_top_k = 1
    fixed_top_k = 1
    constant_for_one_expert = False
    weighs_shared_expert = True

    def forward(self, logits: Tensor, inputs: SiteInput) -> Routing:
        probs = logits.softmax(-1)
        weights = probs * select_top_k(logits, 1)
        return Routing(
            weights=weights,
            logits=logits,
            probs=probs,
            shared_weights=1 - weights.sum(-1, keepdim=True),
        )
