"""Sparse forward, dense router gradient (DenseMixer)."""

from typing import Any

import torch
from torch import Tensor

from ..routing import Routing, SiteInput
from .base import Gate, normalize, register_gate, select_top_k


class _StraightThrough(torch.autograd.Function):
    """Forward: the sparse weights. Backward: the gradient goes to the dense ones alone."""

    @staticmethod
    def forward(ctx: Any, dense: Tensor, sparse: Tensor) -> Tensor:
        return sparse.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


@register_gate("dense_gradient")
class DenseGradient(Gate):
    """Top-k, renormalised, whose router learns from every expert.

    Forward: p = softmax(z), w_e = p_e / s for the K likeliest experts, 0 elsewhere, s the sum of
    their p. Backward: as if w = p / s for all experts with s held fixed, so the router hears of the
    experts that a token did not use. What it needs of them is <dL/dy, B_e A_e x> only, and the
    operator computes the gradient of every routing weight anyway: the dense gradient is free here.
    The experts learn from the tokens that use them, as always.
    """

    takes_top_k = True
    default_top_k = 2

    def forward(self, logits: Tensor, inputs: SiteInput) -> Routing:
        probs = logits.softmax(-1)
        assert self.top_k is not None
        chosen = probs * select_top_k(logits, self.top_k)
        dense = probs / chosen.detach().sum(-1, keepdim=True)
        weights = _StraightThrough.apply(dense, normalize(chosen).detach())
        return Routing(weights=weights, logits=logits, probs=probs)
