"""What LD-MoLE (arXiv 2509.25684) asks of the sparsity lambda of its gate."""

import torch
from torch import Tensor

from ..routing import Routing, SiteInput
from .base import Loss, register_loss


@register_loss("sparsity_budget")
class SparsityBudget(Loss):
    """L = mean over the real tokens of max(lambda_K - lambda, 0): 0 where no more than K are used.

    lambda_K = 1 - sum over the K largest z of (z - z'), with z' the largest of the others, is where
    the (K + 1)th expert's weight becomes zero. No gradient reaches the logits. The authors' code
    has K = 2 and counts padding.

    Args:
        active: K, the number of experts that a token may use freely.
    """

    reads = ("sparsity",)

    def __init__(self, *, active: int = 2) -> None:
        if active < 1:
            raise ValueError(f"loss option active={active!r} must be at least 1")
        self.active = active

    def __call__(self, routing: Routing, inputs: SiteInput) -> Tensor:
        sparsity = routing.extras["sparsity"]
        if self.active >= routing.num_experts:
            return 0 * routing.token_mean(sparsity)
        largest = routing.logits.detach().topk(self.active + 1, dim=-1).values
        excess = (largest[:, : self.active] - largest[:, self.active :]).sum(-1)
        return routing.token_mean(torch.relu(1 - excess - sparsity))


@register_loss("sparsity_slack")
class SparsitySlack(Loss):
    """L = mean over the real tokens of 1 - lambda, which is never below the gate's eps."""

    reads = ("sparsity",)

    def __call__(self, routing: Routing, inputs: SiteInput) -> Tensor:
        return routing.token_mean(1 - routing.extras["sparsity"])
