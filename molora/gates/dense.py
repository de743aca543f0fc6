"""Dense softmax: every expert takes part in every token (LoRAMoE, arXiv 2312.09979)."""

from torch import Tensor

from ..routing import Routing, SiteInput
from .base import Gate, register_gate


@register_gate("dense")
class Dense(Gate):
    """w = softmax(z)."""

    sparse = False

    def forward(self, logits: Tensor, inputs: SiteInput) -> Routing:
        probs = logits.softmax(-1)
        return Routing(weights=probs, logits=logits, probs=probs)
