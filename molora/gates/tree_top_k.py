"""Top-k of the branches at every node of a tree, from the root down (S'MoRE, arXiv 2504.06426)."""

import torch
from torch import Tensor

from ..routing import Routing, SiteInput
from .base import Gate, register_gate, softmax_top_k


@register_gate("tree_top_k")
class TreeTopK(Gate):
    """At each node p = softmax over its s branches; its f likeliest are followed, p divided by
    their sum. A path's weight is the product along it, so the E = s^L experts are the paths, and
    K = f^L of them are active.

    The logits are those of the s branches of the root, then those of the s^2 below, and so on.

    Args:
        depth: L; E and K are powers of it.
    """

    takes_top_k = True
    default_top_k = 4
    at_most_top_k = True
    needs_two_active = True

    def __init__(
        self, num_experts: int, top_k: int | None, in_features: int, *, depth: int = 2
    ) -> None:
        super().__init__(num_experts, top_k, in_features)
        if depth < 1:
            raise ValueError(f"gate option depth={depth!r} must be at least 1")
        self.depth = depth
        self.branches = self._root("num_experts", num_experts)
        self.followed = self._root("top_k", top_k or num_experts)
        if self.followed == 1 < self.branches:
            raise ValueError(
                f"top_k={top_k} follows one branch at each node, whose weight is then 1, so the "
                f"router would get no gradient; with depth={depth}, use top_k={2**depth} or more."
            )

    def _root(self, name: str, paths: int) -> int:
        root = round(paths ** (1 / self.depth))
        if root**self.depth != paths:
            raise ValueError(
                f"gate='tree_top_k' with depth={self.depth}: {name}={paths} is not a number of "
                f"paths, such as {2**self.depth} or {4**self.depth}."
            )
        return root

    @property
    def num_logits(self) -> int:
        return sum(self.branches**level for level in range(1, self.depth + 1))

    def forward(self, logits: Tensor, inputs: SiteInput) -> Routing:
        weights = probs = logits.new_ones(logits.shape[0], 1)
        sizes = [self.branches**level for level in range(1, self.depth + 1)]
        for level in torch.split(logits, sizes, dim=-1):
            branches = level.unflatten(-1, (-1, self.branches))
            chosen = softmax_top_k(branches, self.followed)
            weights = (weights[..., None] * chosen).flatten(1)
            probs = (probs[..., None] * branches.softmax(-1)).flatten(1)
        return Routing(weights, logits, probs)
