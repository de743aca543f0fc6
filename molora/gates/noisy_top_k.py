"""Top-k of logits with learned noise (Shazeer et al., arXiv 1701.06538, eqs. 3-5)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..routing import Routing, SiteInput
from .base import Gate, register_gate, softmax_top_k


@register_gate("noisy_top_k")
class NoisyTopK(Gate):
    """w = softmax over the K largest h_e, in training h_e = z_e + s_e n with n ~ N(0, 1) and
    s_e = softplus(u_e) + epsilon, at inference h = z.

    The router gives 2E logits: z, then u. The loss "load_cv" reads what is drawn.

    Args:
        num_experts: see `Gate`.
        top_k: see `Gate`.
        in_features: see `Gate`.
        epsilon: the least deviation.
        per_sequence: one draw for all tokens of a sequence, for routers that decide once for it.
    """

    takes_top_k = True
    at_most_top_k = True
    default_top_k = 2
    needs_two_active = True
    draws = True
    leaves = ("deviation", "noisy_threshold")

    def __init__(
        self,
        num_experts: int,
        top_k: int | None,
        in_features: int,
        *,
        epsilon: float = 1e-2,
        per_sequence: bool = False,
    ) -> None:
        super().__init__(num_experts, top_k, in_features)
        if not epsilon > 0:
            raise ValueError(f"gate option epsilon={epsilon!r} must be above 0")
        self.epsilon = epsilon
        self.per_sequence = per_sequence

    @property
    def num_logits(self) -> int:
        return 2 * self.num_experts

    def forward(self, logits: Tensor, inputs: SiteInput) -> Routing:
        """See `Gate.forward`; logits (T, 2E)."""
        assert self.top_k is not None
        clean, spread = logits.split(self.num_experts, -1)
        noisy, extras = clean, {}
        if self.training:
            deviation = F.softplus(spread) + self.epsilon
            noisy = clean + deviation * self._draw(clean, inputs)
            extras = {"deviation": deviation, "noisy_threshold": self._threshold(noisy)}
        return Routing(
            weights=softmax_top_k(noisy, self.top_k),
            logits=logits,
            probs=noisy.softmax(-1),
            extras=extras,
        )

    def _threshold(self, noisy: Tensor) -> Tensor:
        """(T, E) what each logit must exceed to be chosen: the K-th largest of the others."""
        assert self.top_k is not None
        if self.top_k >= self.num_experts:
            return torch.full_like(noisy, -1e9)
        largest = noisy.topk(self.top_k + 1, dim=-1).values
        last, next_best = largest[:, -2:-1], largest[:, -1:]
        return torch.where(noisy >= last, next_best, last)

    def _draw(self, clean: Tensor, inputs: SiteInput) -> Tensor:
        tokens = inputs.tokens
        if not self.per_sequence or tokens is None:
            return torch.randn_like(clean)
        return tokens.spread(clean.new_empty(tokens.num_sequences, self.num_experts).normal_())
