"""Soft slots: every expert reads mixtures of all tokens (Soft MoE, arXiv 2308.00951)."""

import torch
from torch import Tensor

from ..routing import Routing, SiteInput
from .base import Gate, register_gate


@register_gate("soft_slots")
class SoftSlots(Gate):
    """Of the logits z (m, E p) of a sequence of m tokens, p = `slots` for each expert:

        D = softmax of z over the tokens, what a slot reads of each token
        C = softmax of z over the slots, what a token gets of each slot

    The record's weights are C summed over each expert's slots; C and D are its extras "combine" and
    "dispatch" (T, E p), for experts that mix tokens. Padding is read by no slot.

    A token's output depends on all tokens of its sequence, later ones too. In a model that predicts
    the next token training would see the answer, so that is refused unless `allow_non_causal`, and
    generation with a KV cache, where later tokens aren't there yet, is refused in any case.
    """

    sparse = False
    constant_for_one_expert = False
    mixes_tokens = True
    leaves = ("combine", "dispatch")

    def __init__(
        self,
        num_experts: int,
        top_k: int | None,
        in_features: int,
        *,
        slots: int = 1,
        allow_non_causal: bool = False,
    ) -> None:
        super().__init__(num_experts, top_k, in_features)
        if slots < 1:
            raise ValueError(f"gate option slots={slots!r} must be at least 1")
        self.slots = slots
        self.allow_non_causal = allow_non_causal

    @property
    def num_logits(self) -> int:
        return self.num_experts * self.slots

    def forward(self, logits: Tensor, inputs: SiteInput) -> Routing:
        """See `Gate.forward`.

        Raises:
            RuntimeError: the pass writes or reads a KV cache or packs sequences into one row, or
                the input doesn't say which tokens are of one sequence.
        """
        if inputs.cached:
            raise RuntimeError(
                "the gate 'soft_slots' can't generate with a KV cache: a slot reads all tokens of "
                "a sequence, also those that have not been generated yet. Pass use_cache=False and "
                "no past_key_values to evaluate whole sequences, or use gate='dense' with "
                "experts='lora' for a model that generates."
            )
        if inputs.tokens is not None and inputs.tokens.packed:
            raise RuntimeError(
                "the gate 'soft_slots' mixes the tokens of a row, and this batch packs several "
                "sequences into one; turn packing off."
            )
        combine = logits.softmax(-1)
        by_row = logits.view(-1, self._tokens_of_a_row(inputs), self.num_logits)
        if inputs.mask is not None:
            padding = ~inputs.mask.view(by_row.shape[:2])
            by_row = by_row.masked_fill(padding[..., None], torch.finfo(logits.dtype).min)
        dispatch = by_row.softmax(1).view_as(logits)
        weights = combine.unflatten(-1, (self.num_experts, self.slots)).sum(-1)
        extras = {"combine": combine, "dispatch": dispatch}
        return Routing(weights=weights, logits=logits, probs=weights, extras=extras)

    def _tokens_of_a_row(self, inputs: SiteInput) -> int:
        """m; 1 for an input of one row per sequence, such as a pooled output."""
        if len(inputs.shape) > 1:
            return inputs.shape[-1]
        batch = None if inputs.given is None else inputs.given.batch
        if inputs.shape and inputs.shape[0] != batch:
            raise RuntimeError(
                f"the gate 'soft_slots' mixes the tokens of each sequence, but the input of "
                f"{inputs.site!r} has lost its sequences: it is {inputs.shape[0]} rows, in a batch "
                f"of {batch}. Leave that module out (exclude_modules)."
            )
        return 1
