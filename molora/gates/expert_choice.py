"""Experts choose their tokens (Expert Choice, arXiv 2202.09368)."""

import torch
from torch import Tensor

from ..routing import Routing, SiteInput
from .base import Gate, register_gate


@register_gate("expert_choice")
class ExpertChoice(Gate):
    """p = softmax(z) over the experts; w_te = p_te if t is among the C tokens with the largest p_te
    of expert e, 0 elsewhere; C = n c / E, rounded down, at least 1.

    n is the number of real tokens of the pass: padding is never chosen and takes no place. Every
    expert gets the same load, and a token has between 0 and E experts, c = `capacity` on average.
    Of equal probabilities the first token's counts.

    Whether a token is chosen depends on the tokens after it and on the rest of the batch. A pass
    over whole sequences, in training or evaluation, is what the method defines; generation with a
    KV cache, where the later tokens aren't there yet, is refused.
    """

    def __init__(
        self, num_experts: int, top_k: int | None, in_features: int, *, capacity: float = 2.0
    ) -> None:
        super().__init__(num_experts, top_k, in_features)
        if not capacity > 0:
            raise ValueError(f"gate option capacity={capacity!r} must be above 0")
        self.capacity = capacity
        self.constant_for_one_expert = capacity >= 1

    def forward(self, logits: Tensor, inputs: SiteInput) -> Routing:
        """See `Gate.forward`.

        Raises:
            RuntimeError: the pass writes or reads a KV cache.
        """
        if inputs.cached:
            raise RuntimeError(
                "the gate 'expert_choice' can't generate with a KV cache: each expert chooses "
                "among all tokens of a pass, so a token's experts depend on tokens that have not "
                "been generated yet. Use gate='top_k', where tokens choose, for a model that "
                "generates; to evaluate whole sequences, pass use_cache=False and no "
                "past_key_values."
            )
        probs = logits.softmax(-1)
        return Routing(
            weights=probs * self._chosen(probs.detach(), inputs.mask), logits=logits, probs=probs
        )

    def _chosen(self, probs: Tensor, mask: Tensor | None) -> Tensor:
        """(T, E) bool, without waiting for the device to count the tokens."""
        if mask is None:
            mask = torch.ones(len(probs), dtype=torch.bool, device=probs.device)
        ranked = probs.masked_fill(~mask[:, None], -1.0)
        order = torch.sort(ranked, dim=0, descending=True, stable=True).indices
        place = torch.arange(len(probs), device=probs.device)[:, None].expand_as(order)
        places = torch.empty_like(order).scatter_(0, order, place)
        share = (mask.sum() * self.capacity / self.num_experts).floor().clamp(min=1)
        return (places < share) & mask[:, None]
