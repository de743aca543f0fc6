"""All experts in training, few at inference (DS-MoE, arXiv 2404.05567)."""

from torch import Tensor

from ..routing import Routing, SiteInput
from .base import Gate, register_gate, select_top_k


@register_gate("dense_training")
class DenseTraining(Gate):
    """w = softmax(z) in training; at inference w_e = softmax(z)_e for the K likeliest experts, not
    renormalised, and 0 elsewhere.

    What the cut leaves out is small only where p is peaked. The loss "mutual_information" peaks it,
    and keeps the experts' shares equal besides.
    """

    takes_top_k = True
    default_top_k = 2
    sparse = False  # in training, where losses are formed

    def forward(self, logits: Tensor, inputs: SiteInput) -> Routing:
        probs = logits.softmax(-1)
        assert self.top_k is not None
        weights = probs if self.training else probs * select_top_k(logits, self.top_k)
        return Routing(weights=weights, logits=logits, probs=probs)
