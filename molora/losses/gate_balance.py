"""Every expert has its share of the gate (MoLE, arXiv 2404.13628)."""

import math

import torch
from torch import Tensor

from ..routing import Routing, SiteInput
from .base import Loss, register_loss


@register_loss("gate_balance")
class GateBalance(Loss):
    """L = -(1/E) * sum over e of log(E P_e), the mean of p_e over the real tokens being P_e.

    It is the divergence KL(uniform || P): 0 when all P are equal, and it grows without bound as any
    expert is left out, so that no expert stays unused whatever the others do.

    Published: -log of the product of the q_e, E log E at balance, with q_e the mean of one weight
    per block over all blocks. With a coefficient c here, E times c log E less. Here each site is
    balanced by itself, over tokens: a mean over sites would let every site use one expert.
    """

    def __call__(self, routing: Routing, inputs: SiteInput) -> Tensor:
        probs = routing.probs
        share = routing.token_mean(probs).clamp(min=torch.finfo(probs.dtype).tiny)
        any_token = routing.token_mean(probs.new_ones(probs.shape[0]))
        return -any_token * (share.log().mean() + math.log(routing.num_experts))
