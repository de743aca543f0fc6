"""Experts used alike, each by tokens that are sure of it (LoRA-Mixer, arXiv 2507.00029)."""

import math

import torch.nn.functional as F
from torch import Tensor

from ..routing import Routing, SiteInput
from .base import Loss, register_loss


@register_loss("specialization_balance")
class SpecializationBalance(Loss):
    """L = E * sum over e of f_e P_e + entropy_weight * mean over tokens of H(p) / log E.

    f_e is the share of the real tokens whose likeliest expert is e, and P_e their mean probability
    of e; the gradient flows through P and H. It is 1 for one-hot p at perfect balance,
    1 + entropy_weight for uniform p, and E when one expert takes everything.

    Published: alpha * sum of f P - lambda * mean H. As printed the second term makes every token's
    distribution *uniform*, since the derivative of -lambda H by p_e is lambda (log p_e + 1), while
    the text wants it peaked. Here a positive entropy_weight peaks it. With a coefficient c, alpha
    is c E, and the printed lambda is -c entropy_weight / log E.

    Unverified: whether f counts the first choice or all selected experts; its text has both.

    Args:
        entropy_weight: of the entropy; a negative one is the printed sign.
    """

    def __init__(self, *, entropy_weight: float = 0.1) -> None:
        self.entropy_weight = entropy_weight

    def __call__(self, routing: Routing, inputs: SiteInput) -> Tensor:
        probs, experts = routing.probs, routing.num_experts
        chosen = F.one_hot(probs.argmax(-1), experts).to(probs.dtype)
        balance = experts * (routing.token_mean(chosen) * routing.token_mean(probs)).sum()
        entropy = -(probs * probs.clamp(min=1e-30).log()).sum(-1) / math.log(max(experts, 2))
        return balance + self.entropy_weight * routing.token_mean(entropy)
