"""Sigmoid scores, top-k, normalised over the selected experts (DeepSeek-V3, arXiv 2412.19437)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..routing import Routing, SiteInput
from .base import Gate, register_gate, select_top_k


@register_gate("sigmoid")
class Sigmoid(Gate):
    """s = sigmoid(z); w_e = s_e / sum of the K largest s for those K experts, 0 elsewhere.

    The probabilities of the record are s / sum over all experts, as that paper's balance loss
    reads them. Both are formed from log s, so that they sum to 1 also where every s underflows.
    """

    takes_top_k = True
    default_top_k = 2
    needs_two_active = True

    def forward(self, logits: Tensor, inputs: SiteInput) -> Routing:
        log_scores = F.logsigmoid(logits)
        assert self.top_k is not None
        selected = select_top_k(logits, self.top_k)
        weights = log_scores.masked_fill(~selected, -torch.inf).softmax(-1)
        return Routing(weights=weights, logits=logits, probs=log_scores.softmax(-1))
