"""Sequences that are alike should be routed alike (HotMoE, AAAI 2026)."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from ..routing import Routing, SiteInput
from .base import Loss, register_loss

TINY = 1e-9  # as published


@register_loss("similarity_guided")
class SimilarityGuided(Loss):
    """L = max(0, log E - I) / log E + mean over pairs of (alike (1 - S) C + unlike S (1 - C)).

    I = H(mean of w) - mean of H(w), over the real tokens' weights w: large when the experts are
    used alike and each token is sure of its own. C and S are the cosines, of every two sequences
    of the batch, each with itself included, of the means over their real tokens of the site's
    input, and of the weights. No gradient goes to the input.

    Published: the sum over the routers, where losses here are their mean; the micro-batches of an
    optimizer step are one batch there.

    Args:
        alike: what it costs that sequences with like inputs are routed differently.
        unlike: what it costs that those with unlike inputs are routed alike.
    """

    needs = ("positions",)  # whose sequences are asked for

    def __init__(self, *, alike: float = 1.0, unlike: float = 1.5) -> None:
        for name, value in (("alike", alike), ("unlike", unlike)):
            if not value >= 0:
                raise ValueError(f"loss option {name}={value!r} must not be negative")
        self.alike, self.unlike = alike, unlike

    def __call__(self, routing: Routing, inputs: SiteInput) -> Tensor:
        tokens, weights = inputs.tokens, routing.weights
        assert tokens is not None, "checked"
        between = _entropy(routing.token_mean(weights))
        within = routing.token_mean(_entropy(weights))
        most = math.log(max(routing.num_experts, 2))
        loss = (most - between + within).clamp(min=0) / most
        used = _cosines(tokens.mean(weights, tokens.real))
        seen = _cosines(tokens.mean(inputs.hidden.detach(), tokens.real)).to(used.dtype)
        pairs = self.alike * (1 - used) * seen + self.unlike * used * (1 - seen)
        return loss + pairs.mean()


def _entropy(weights: Tensor) -> Tensor:
    return -(weights * (weights + TINY).log()).sum(-1)


def _cosines(rows: Tensor) -> Tensor:
    """(N, n) -> (N, N)"""
    unit = F.normalize(rows, dim=-1, eps=torch.finfo(rows.dtype).tiny ** 0.5)
    return unit @ unit.mT
