"""Balance of the number of tokens of each expert, with a gradient (arXiv 1701.06538, eqs. 8-11)."""

import torch
from torch import Tensor

from ..routing import Routing, SiteInput
from .base import Loss, register_loss


@register_loss("load_cv")
class LoadCV(Loss):
    """L = var(F) / mean(F)^2 with F_e the mean over the real tokens of the probability that e is
    among the K chosen, were its noise drawn again: 0 when all F are equal.

    With z the logits, h those with noise and s its deviation, that probability is
    Phi((z_e - q_e) / s_e), q_e the K-th largest h of the other experts. It needs the gate
    "noisy_top_k". With K = E every expert is always chosen, and L is 0.
    """

    needs_sparse_gate = True
    reads = ("deviation", "noisy_threshold")

    def __call__(self, routing: Routing, inputs: SiteInput) -> Tensor:
        distance = routing.logits[:, : routing.num_experts] - routing.extras["noisy_threshold"]
        probability = torch.special.ndtr(distance / routing.extras["deviation"])
        load = routing.token_mean(probability)
        mean = load.mean()
        return load.var(correction=0) / (mean * mean + 1e-10)
