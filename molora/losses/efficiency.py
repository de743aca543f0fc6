"""Balanced and few experts (DynMoE, arXiv 2405.14297)."""

from torch import Tensor

from ..routing import Routing, SiteInput
from .base import Loss, register_loss


@register_loss("efficiency")
class Efficiency(Loss):
    """L = E * sum over e of m_e c_e + mean over tokens and experts of g_e.

    Over the real tokens with at least one expert, m_e is the mean score sigmoid(z_e) of an active
    expert and c_e the share that uses it; g_e is 1 for the experts that a token uses. The first
    term is E c times the mean score at perfect balance, c the share each expert gets; the second is
    the share of the pool that a token uses. Published: the same.

    For gate="expert_thresholds" only.
    """

    reads = ("gates", "scores")

    def __call__(self, routing: Routing, inputs: SiteInput) -> Tensor:
        gates, scores = routing.extras["gates"], routing.extras["scores"]
        used = (gates != 0).to(scores.dtype)
        routed = used.amax(-1, keepdim=True)
        share = routing.token_mean(routed).clamp(min=1e-9)
        score = routing.token_mean(scores * routed) / share
        balance = routing.num_experts * (score * routing.token_mean(used) / share).sum()
        return balance + routing.token_mean(gates).mean()
