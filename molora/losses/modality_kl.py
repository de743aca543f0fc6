"""How far the routing of two modalities may differ (SMAR, arXiv 2506.06406)."""

import torch
from torch import Tensor

from ..routing import Routing, SiteInput
from .base import Loss, register_loss


@register_loss("modality_kl")
class ModalityKL(Loss):
    """L = max(0, low - K) + max(0, K - high), K = KL(P || Q) + KL(Q || P).

    P and Q are the means of the router's probabilities over the real tokens of modality 0 (text)
    and of all others. L is 0 while K is in [low, high], and so is its gradient; 0 too in a batch
    with tokens of one modality alone.

    Args:
        low: the least symmetric divergence.
        high: the largest.
    """

    needs = ("modality_ids",)

    def __init__(self, *, low: float = 1.5, high: float = 2.0) -> None:
        if not 0 <= low <= high:
            raise ValueError(f"loss options low={low!r}, high={high!r} must be 0 <= low <= high")
        self.low = low
        self.high = high

    def __call__(self, routing: Routing, inputs: SiteInput) -> Tensor:
        assert inputs.tokens is not None, "checked"
        modality = inputs.tokens.by_token("modality_ids")
        assert modality is not None, "checked"
        probs = routing.probs
        text = (modality == 0).to(probs.dtype)[:, None]
        shares = [routing.token_mean(part) for part in (text, 1 - text)]
        means = [
            routing.token_mean(part * probs) / share.clamp(min=1e-9)
            for part, share in zip((text, 1 - text), shares, strict=True)
        ]
        smallest = torch.finfo(probs.dtype).tiny
        logs = [mean.clamp(min=smallest).log() for mean in means]
        divergence = ((means[0] - means[1]) * (logs[0] - logs[1])).sum()
        both = ((shares[0] > 0) & (shares[1] > 0)).squeeze().to(probs.dtype)
        return both * ((self.low - divergence).relu() + (divergence - self.high).relu())
