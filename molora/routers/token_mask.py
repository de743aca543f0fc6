"""A linear router with a fixed mask for each id of the vocabulary (MaskMoE, arXiv 2407.09816)."""

import math

import torch
from torch import Tensor, nn

from .. import ops
from ..routing import SiteInput
from .base import HIDDEN, Router, register_router


@register_router("token_mask")
class TokenMaskRouter(Router):
    """z_e = w_e x for the experts that the token's id may use; the others are out of the question.

    Which ones those are is drawn once for each id and router, evenly over the experts, and never
    changes: `frequent` experts for the ids below `frequent_ids`, `rare` for the others. The draw is
    a hash of the id, the expert and a number that the adapter keeps, so that it takes no memory
    for the vocabulary and no look at it.

    Args:
        in_features: see `Router`.
        num_experts: see `Router`.
        frequent: experts of a frequent id; at most E of them are there.
        rare: experts of another id. With 1 the router has no part in where such a token goes.
        frequent_ids: ids below it are the frequent ones. Byte-pair merges are numbered by how
            often they occur, roughly.
        temperature: see `Router`.
        noise: see `Router`.
    """

    needs = ("input_ids",)
    salt: Tensor

    def __init__(
        self,
        in_features: int,
        num_experts: int,
        *,
        frequent: int = 4,
        rare: int = 1,
        frequent_ids: int = 10_000,
        temperature: float = 1.0,
        noise: float = 0.0,
    ) -> None:
        super().__init__(in_features, num_experts, temperature=temperature, noise=noise)
        for name, value in (("frequent", frequent), ("rare", rare)):
            if value < 1:
                raise ValueError(f"router option {name}={value!r} must be at least 1")
        if frequent_ids < 0:
            raise ValueError(f"router option frequent_ids={frequent_ids!r} must not be negative")
        self.frequent, self.rare, self.frequent_ids = frequent, rare, frequent_ids
        self.weight = nn.Parameter(torch.empty(num_experts, in_features))
        self.register_buffer("salt", torch.zeros(1, dtype=torch.int64))

    def reset_parameters(self) -> None:
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        self.salt.random_(2**31)

    def visible(self, ids: Tensor) -> Tensor:
        """(T, E) bool: the experts that tokens with those ids (T,) may use."""
        expert = torch.arange(self.num_experts, device=ids.device)
        draws = _hash(ids[:, None] * self.num_experts + expert + (self.salt << 32))
        order = torch.sort(draws, dim=-1, stable=True).indices
        place = torch.empty_like(order).scatter_(-1, order, expert.expand_as(order))
        count = torch.where(ids < self.frequent_ids, self.frequent, self.rare)
        return place < count[:, None]

    def compute_logits(self, inputs: SiteInput) -> Tensor:
        assert inputs.tokens is not None and inputs.tokens.input_ids is not None, "checked"
        logits = ops.router_logits(inputs.hidden, self.weight, None)
        return logits.masked_fill(~self.visible(inputs.tokens.input_ids), HIDDEN)


def _hash(values: Tensor) -> Tensor:
    """int64 -> evenly spread int64: the finaliser of splitmix64, in wrapping arithmetic."""
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        values = (values ^ _shift(values, shift)) * factor
    return values ^ _shift(values, 31)


def _shift(values: Tensor, bits: int) -> Tensor:
    """To the right, with zeros from the left; torch's repeats the sign."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)
