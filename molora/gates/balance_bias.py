"""Balance without a loss: a bias on the selection that follows the load (arXiv 2408.15664)."""

import torch
from torch import Tensor, nn

from ..routing import is_recomputation
from .base import sum_over_processes


class BalanceBias(nn.Module):
    """b_e grows by `rate` after each optimizer step in which expert e was used less than the mean
    expert, and shrinks by it after each in which it was used more.

    The published codes change b inside forward, where evaluation and the recomputation of a
    checkpointed layer change it too. Here forward counts, in training and without padding, and
    `after_step` decides from the counts of the whole step: all micro-batches, all processes.

    b is kept as a whole number of steps, which is exact however long the training and whatever
    dtype the model is cast to; with a rate of 1e-5 a bf16 bias would not move at all.
    """

    steps: Tensor

    def __init__(self, num_experts: int, rate: float) -> None:
        super().__init__()
        if not rate >= 0:
            raise ValueError(f"gate option update_rate={rate!r} must not be negative")
        self.rate = rate
        self.register_buffer("steps", torch.zeros(num_experts, dtype=torch.int32))
        # Not a buffer: data parallelism would overwrite it with that of the first process.
        self._counts: Tensor | None = None

    def forward(self, scores: Tensor) -> Tensor:
        """(T, E) scores plus b, for the selection."""
        return scores + self.rate * self.steps.to(scores.dtype)

    def count(self, selected: Tensor, mask: Tensor | None) -> None:
        """Remember who was used.

        A compiled layer that is recomputed counts twice, alike, which leaves the deciding sign.

        Args:
            selected: (T, E) bool.
            mask: (T,) bool, False for padding; None when every token is real.
        """
        if not self.training or is_recomputation():
            return
        if mask is not None:
            selected = selected & mask[:, None]
        counts = selected.sum(0)
        self._counts = counts if self._counts is None else self._counts + counts

    @torch.no_grad()
    def after_step(self) -> None:
        """Move b by the counts since the last call."""
        counts, self._counts = self._counts, None
        if counts is None:
            counts = torch.zeros_like(self.steps, dtype=torch.int64)
        sum_over_processes(counts)
        # sign(mean - c_e), in whole numbers
        self.steps += torch.sign(counts.sum() - len(counts) * counts).to(self.steps.dtype)
