"""Two sampled experts with a gradient estimator (SparseMixer-v2 of GRIN, arXiv 2409.12136)."""

import torch
from torch import Tensor

from ..routing import Routing, SiteInput
from .base import Gate, register_gate

MID_POINT = 1 / 3  # of Heun's third-order method: the estimator looks there three times in four


@register_gate("sparse_mixer")
class SparseMixer(Gate):
    """Two experts, one after the other, each weighted by its own masked softmax.

    A round keeps the logits near the largest one, (max - z) <= 2 `jitter` max(|z|, max), and takes
    pi = softmax over them. At inference it uses the argmax with w = pi. In training it draws the
    expert from pi; if that isn't the argmax, w is pi / 3 in three cases of four, while the gradient
    is always that of pi. The second round repeats it without the first expert. The weights aren't
    normalised.
    """

    takes_top_k = True
    at_most_top_k = True
    default_top_k = 2
    fixed_top_k = 2
    draws = True

    def __init__(
        self, num_experts: int, top_k: int | None, in_features: int, *, jitter: float = 0.01
    ) -> None:
        super().__init__(num_experts, top_k, in_features)
        if not jitter > 0:
            raise ValueError(f"gate option jitter={jitter!r} must be above 0.")
        self.jitter = jitter

    def forward(self, logits: Tensor, inputs: SiteInput) -> Routing:
        first, chosen = self._round(logits, torch.zeros_like(logits, dtype=torch.bool))
        second, _ = self._round(logits, chosen)
        return Routing(weights=first + second, logits=logits, probs=logits.softmax(-1))

    def _round(self, logits: Tensor, taken: Tensor) -> tuple[Tensor, Tensor]:
        """Weights (T, E) with one entry a row that isn't zero, and where it is."""
        open_logits = logits.masked_fill(taken, -torch.inf)
        largest = open_logits.detach().amax(-1, keepdim=True)
        far = (largest - logits.detach()) > 2 * self.jitter * torch.maximum(
            logits.detach().abs(), largest
        )
        near = open_logits.masked_fill(far, -torch.inf)
        pi = near.softmax(-1)
        best = near.argmax(-1, keepdim=True)
        factor = torch.ones_like(largest)
        if self.training:
            uniform = torch.rand_like(near).clamp(1e-9, 1 - 1e-7)
            drawn = (near.detach() - (-uniform.log()).log()).argmax(-1, keepdim=True)
            full = (drawn == best) | (torch.rand_like(largest) > 0.75)
            factor = torch.where(full, factor, MID_POINT)
            best = drawn
        chosen = torch.zeros_like(taken).scatter(-1, best, True)
        weight = pi * chosen
        return weight + (weight * factor - weight).detach(), chosen
