"""All experts in training, few at inference (DS-MoE, arXiv 2404.05567; LoRA-Mixer, arXiv
2507.00029)."""

from torch import Tensor

from ..routing import Routing, SiteInput
from .base import Gate, normalize, register_gate, select_top_k


@register_gate("dense_training")
class DenseTraining(Gate):
    """w = softmax(z) in training; at inference w_e = softmax(z)_e for the K likeliest experts, 0
    elsewhere.

    What the cut leaves out is small only where p is peaked. The loss "mutual_information" peaks it,
    and keeps the experts' shares equal besides. With `renormalize` the weights at inference sum to
    1 as they do in training, which LoRA-Mixer leaves open.
    """

    takes_top_k = True
    default_top_k = 2
    sparse = False  # in training, where losses are formed

    def __init__(
        self,
        num_experts: int,
        top_k: int | None,
        in_features: int,
        *,
        renormalize: bool = False,
    ) -> None:
        super().__init__(num_experts, top_k, in_features)
        self.renormalize = renormalize

    def forward(self, logits: Tensor, inputs: SiteInput) -> Routing:
        probs = weights = logits.softmax(-1)
        assert self.top_k is not None
        if not self.training:
            weights = probs * select_top_k(logits, self.top_k)
            weights = normalize(weights) if self.renormalize else weights
        return Routing(weights=weights, logits=logits, probs=probs)
