"""Weights pressed down until few are left, those of busy experts most (ReMoE, arXiv 2412.14711)."""

from torch import Tensor

from ..routing import Routing, SiteInput
from .base import Loss, register_loss


@register_loss("relu_sparsity")
class ReluSparsity(Loss):
    """L = lambda (E / K) sum over e of f_e times the token mean of w_e, both over the real tokens.

    f_e is the share of the tokens that use expert e, and passes no gradient. K and lambda, which
    follows the number of experts that tokens use, are those of gate="relu". With a coefficient of 1
    it is the published penalty.
    """

    needs_sparse_gate = True
    reads = ("penalty",)

    def __call__(self, routing: Routing, inputs: SiteInput) -> Tensor:
        used = routing.token_mean(routing.selected.to(routing.weights.dtype))
        pressed = routing.token_mean(routing.weights * routing.extras["penalty"][:, None])
        return routing.num_experts * (used * pressed).sum()
