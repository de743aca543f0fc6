"""The K selected experts with weight 1 each (FlyLoRA, arXiv 2510.08396)."""

from torch import Tensor

from ..routing import Routing, SiteInput
from .balance_bias import BalanceBias
from .base import Gate, register_gate, select_top_k


@register_gate("indicator")
class Indicator(Gate):
    """w_e = 1 for the K largest z + b, 0 elsewhere; b moves by `update_rate` (`BalanceBias`).

    The weight doesn't depend on the logits, so no gradient reaches what they are computed from:
    the experts' own activations, usually. The probabilities of the record are softmax(z).
    """

    takes_top_k = True
    default_top_k = 2
    task_trains_router = False

    def __init__(
        self,
        num_experts: int,
        top_k: int | None,
        in_features: int,
        *,
        update_rate: float = 0.0,
    ) -> None:
        super().__init__(num_experts, top_k, in_features)
        self.bias = BalanceBias(num_experts, update_rate)

    def forward(self, logits: Tensor, inputs: SiteInput) -> Routing:
        assert self.top_k is not None
        selected = select_top_k(self.bias(logits), self.top_k)
        self.bias.count(selected, inputs.mask)
        return Routing(weights=selected.to(logits), logits=logits, probs=logits.softmax(-1))

    def after_step(self, progress: float | None) -> None:
        self.bias.after_step()
