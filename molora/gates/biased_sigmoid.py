"""Sigmoid plus balance bias, top-k of the sum (SMoRA, arXiv 2501.15103)."""

from torch import Tensor

from ..routing import Routing, SiteInput
from .balance_bias import BalanceBias
from .base import Gate, normalize, register_gate, select_top_k


@register_gate("biased_sigmoid")
class BiasedSigmoid(Gate):
    """s = sigmoid(z) + b; w_e = s_e / sum of the K largest s for those K experts, 0 elsewhere.

    Unlike DeepSeek-V3's, the bias b enters the weight and not the selection alone. It moves by
    `update_rate` after each optimizer step (`BalanceBias`). A score that the bias has driven below
    zero counts as zero in the weight.
    """

    takes_top_k = True
    at_most_top_k = True
    default_top_k = 2
    needs_two_active = True

    def __init__(
        self,
        num_experts: int,
        top_k: int | None,
        in_features: int,
        *,
        update_rate: float = 1e-5,
    ) -> None:
        super().__init__(num_experts, top_k, in_features)
        self.bias = BalanceBias(num_experts, update_rate)

    def forward(self, logits: Tensor, inputs: SiteInput) -> Routing:
        scores = self.bias(logits.sigmoid())
        assert self.top_k is not None
        selected = select_top_k(scores, self.top_k)
        self.bias.count(selected, inputs.mask)
        scores = scores.clamp(min=0)
        return Routing(weights=normalize(scores * selected), logits=logits, probs=normalize(scores))

    def after_step(self, progress: float | None) -> None:
        self.bias.after_step()
