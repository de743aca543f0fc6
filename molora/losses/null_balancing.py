"""Load balancing that doesn't care which null expert is chosen (AdaMoE, arXiv 2406.13233)."""

import torch
from torch import Tensor

from ..routing import Routing, SiteInput
from .base import Loss, register_loss


@register_loss("null_balancing")
class NullBalancing(Loss):
    """L = ((E + N) / K) * sum over all E + N of f_i P_i, which is 1 at perfect balance.

    f and P as in "load_balancing", over real and null experts, but with the mean f of the null
    experts in place of each of theirs: they differ in nothing, and only their total matters.
    Published: the same.
    """

    reads = ("null_selected",)

    def __call__(self, routing: Routing, inputs: SiteInput) -> Tensor:
        experts, total = routing.num_experts, routing.logits.shape[-1]
        probability = routing.token_mean(routing.logits.softmax(-1))
        used = routing.token_mean(routing.selected.to(probability.dtype))
        null = routing.token_mean(routing.extras["null_selected"].to(probability.dtype))
        each_null = (null / max(total - experts, 1)).expand(total - experts)
        choices = (used.sum() + null).clamp(min=1e-9)
        return total / choices * (torch.cat([used, each_null]) * probability).sum()
