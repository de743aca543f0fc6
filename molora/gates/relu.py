"""Experts weighed by a ReLU, as many as a penalty leaves (ReMoE, arXiv 2412.14711)."""

import torch
from torch import Tensor

from ..routing import Routing, SiteInput, is_recomputation
from .base import Gate, register_gate, sum_over_processes


@register_gate("relu")
class Relu(Gate):
    """w = max(z, 0): a token uses the experts whose logits are positive, perhaps none.

    The loss "relu_sparsity" presses the weights down, times a factor lambda that is set so that a
    token uses K = `top_k` experts on average: after each optimizer step it grows by `growth` where
    the real tokens of the step used more than that, and shrinks by it where they used K or fewer.
    It starts at `start`, so that all of training's beginning is nearly dense.

    lambda is kept as a whole number of steps, which no cast changes.

    Args:
        start: lambda's first value.
        growth: the factor of a step.
    """

    takes_top_k = True
    default_top_k = 2
    omits_zeros = True
    constant_for_one_expert = False
    leaves = ("penalty",)

    steps: Tensor

    def __init__(
        self,
        num_experts: int,
        top_k: int | None,
        in_features: int,
        *,
        start: float = 1e-8,
        growth: float = 1.2,
    ) -> None:
        super().__init__(num_experts, top_k, in_features)
        if not start > 0:
            raise ValueError(f"gate option start={start!r} must be above 0")
        if not growth > 1:
            raise ValueError(f"gate option growth={growth!r} must be above 1")
        self.start, self.growth = start, growth
        self.register_buffer("steps", torch.zeros(1, dtype=torch.int32))
        # Not a buffer: data parallelism would overwrite it with that of the first process.
        self._counts: Tensor | None = None

    @property
    def penalty(self) -> Tensor:
        """(1,) fp64 lambda."""
        return self.start * self.growth ** self.steps.double()

    def forward(self, logits: Tensor, inputs: SiteInput) -> Routing:
        weights = logits.relu()
        if self.training and not is_recomputation():
            self._count(weights != 0, inputs.mask)
        assert self.top_k is not None
        share = (self.penalty / self.top_k).to(logits.dtype)
        return Routing(weights, logits, extras={"penalty": share.expand(len(logits))})

    def _count(self, selected: Tensor, mask: Tensor | None) -> None:
        """Remember how many experts were used, and by how many tokens."""
        if mask is not None:
            selected = selected & mask[:, None]
        tokens = (
            selected.new_full((), len(selected), dtype=torch.int64)
            if mask is None
            else (mask.sum())
        )
        counts = torch.stack([selected.sum(), tokens])
        self._counts = counts if self._counts is None else self._counts + counts

    @torch.no_grad()
    def after_step(self, progress: float | None) -> None:
        counts, self._counts = self._counts, None
        if counts is None:
            counts = torch.zeros(2, dtype=torch.int64, device=self.steps.device)
        sum_over_processes(counts)
        used, tokens = counts
        assert self.top_k is not None
        up = torch.where(used > self.top_k * tokens, 1, -1)
        self.steps += torch.where(tokens > 0, up, 0).to(self.steps.dtype)
