"""Sigmoid scores, top-k, normalised over the selected experts (DeepSeek-V3, arXiv 2412.19437)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..routing import Routing, SiteInput
from .balance_bias import BalanceBias
from .base import Gate, register_gate, select_top_k


@register_gate("sigmoid")
class Sigmoid(Gate):
    """s = sigmoid(z); w_e = c s_e / sum of the selected s for the selected experts, 0 elsewhere.

    Selected are the K largest s + b. The bias b is for the selection alone: it moves by
    `update_rate` after each optimizer step (`BalanceBias`), and with a rate of 0 there is none.
    c is `scale`. The probabilities of the record are s / sum over all experts, as that paper's
    balance loss reads them. Both are formed from log s, so that they sum to 1 also where every s
    underflows.
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
        update_rate: float = 0.0,
        scale: float = 1.0,
    ) -> None:
        super().__init__(num_experts, top_k, in_features)
        if not scale > 0:
            raise ValueError(f"gate option scale={scale!r} must be above 0")
        self.scale = scale
        self.constant_for_one_expert = scale == 1.0
        self.bias = None if update_rate == 0 else BalanceBias(num_experts, update_rate)

    def forward(self, logits: Tensor, inputs: SiteInput) -> Routing:
        log_scores = F.logsigmoid(logits)
        assert self.top_k is not None
        # Without a bias the logits select: they differ where their sigmoids round to 1.
        scores = logits if self.bias is None else self.bias(logits.sigmoid())
        selected = select_top_k(scores, self.top_k)
        if self.bias is not None:
            self.bias.count(selected, inputs.mask)
        weights = log_scores.masked_fill(~selected, -torch.inf).softmax(-1)
        if self.scale != 1.0:
            weights = self.scale * weights
        return Routing(weights=weights, logits=logits, probs=log_scores.softmax(-1))

    def after_step(self, progress: float | None) -> None:
        if self.bias is not None:
            self.bias.after_step()
