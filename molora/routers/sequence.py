"""Routers that decide once for a sequence, from its prompt, and keep that while it is decoded."""

from torch import Tensor

from ..registry import unknown_name_message
from ..routing import SiteInput
from .base import Router

POOLS = ("prompt", "sequence")


class SequenceRouter(Router):
    """All tokens of a sequence get the same logits, made from the sequence's prompt.

    A subclass's `compute_logits` gives (N, E), one row for each of the N sequences of the pass
    (rows of the batch, or what is packed into them); `pool` makes (N, d) of (T, d).

    In a pass that writes an empty KV cache the logits are kept beside the cache, and the passes
    that continue it read them from there: one token doesn't say what the prompt said. The forward
    changes nothing of the model itself, so that generations may alternate.

    Args:
        in_features: see `Router`.
        num_experts: see `Router`.
        pool: what a sequence is summarised from. "prompt", the tokens of its prompt: see
            `Tokens.prompt` for how they are known. "sequence", all of its real tokens, for models
            that read them all at once, such as BERT or ViT: in the training of a causal model the
            decision would see the answer. In a pass that writes a cache it means the prompt too.
        temperature: see `Router`.
        noise: see `Router`; one draw for a sequence.
    """

    per_sequence = True
    needs: tuple[str, ...] = ("prompt",)

    def __init__(
        self,
        in_features: int,
        num_experts: int,
        *,
        pool: str = "prompt",
        temperature: float = 1.0,
        noise: float = 0.0,
    ) -> None:
        super().__init__(in_features, num_experts, temperature=temperature, noise=noise)
        if pool not in POOLS:
            raise ValueError(unknown_name_message("router option pool", pool, POOLS))
        self.pooled_over = pool

    def forward(self, inputs: SiteInput) -> Tensor:
        """(T, E) logits, equal for the tokens of a sequence, with temperature and noise.

        Raises:
            ValueError: nothing says which tokens are the prompt.
            RuntimeError: the pass continues a cache that carries no decision for its sequences.
        """
        self.check_needs(inputs)
        tokens = inputs.tokens
        assert tokens is not None, "checked"
        logits = tokens.kept(inputs.deciding_site, inputs.adapter)
        if logits is None:
            logits = self.perturbed_logits(inputs)
            tokens.keep(inputs.deciding_site, inputs.adapter, logits)
        return tokens.spread(logits)

    def chosen(self, inputs: SiteInput) -> Tensor:
        """(T,) bool: the tokens that the decision reads."""
        tokens = inputs.tokens
        assert tokens is not None, "checked"
        whole = self.pooled_over == "sequence" and not tokens.given.cached
        return tokens.real if whole else tokens.prompt

    def mean(self, values: Tensor, inputs: SiteInput) -> Tensor:
        """(T, d) -> (N, d): the mean over those tokens, in fp32 (fp64 of fp64)."""
        tokens = inputs.tokens
        assert tokens is not None, "checked"
        return tokens.mean(values, self.chosen(inputs))
