"""Experts in groups, each for a kind of task (LoRAMoE, arXiv 2312.09979)."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..routing import Routing, SiteInput
from .base import Loss, register_loss

if TYPE_CHECKING:
    from ..experts import Experts
    from ..routers import Router


@register_loss("localized_balancing")
class LocalizedBalancing(Loss):
    """L = var(Z) / mean(Z)^2 over the B * E values Z_{b,e} = I_{b,e} Q_{b,e}: 0 when all are equal.

    Q_{b,e} is the mean weight of expert e over the real tokens of sample b. The experts are cut
    into `num_groups` equal blocks, and I_{b,e} = 1 + delta where the task id of sample b is the
    number of e's block, 1 - delta elsewhere. At the optimum the experts of a sample's own block get
    (1 - delta) / (1 + delta) of the weight of the others: the block *named* by the task id is used
    less, which for two groups is a matter of naming.

    The batch must bring `task_ids` (B,), from 0 to num_groups - 1: see `molora.TaskIdCollator`.

    Published: the sum of this over all sites instead of the mean, with sums over a sample's tokens,
    padding included, instead of the mean over its real ones (with sums, samples of different
    lengths never reach 0), and with the halves numbered the other way round. The variance divides
    by B * E - 1, as published.

    Args:
        delta: how much the groups differ.
        num_groups: kinds of tasks.
    """

    needs = ("task_ids",)

    def __init__(self, *, delta: float = 0.1, num_groups: int = 2) -> None:
        if not 0 <= delta < 1:
            raise ValueError(f"loss option delta={delta!r} must be in [0, 1)")
        if num_groups < 1:
            raise ValueError(f"loss option num_groups={num_groups!r} must be at least 1")
        self.delta = delta
        self.num_groups = num_groups

    def check_fit(self, router: "Router", experts: "Experts") -> None:
        if len(experts.ranks) % self.num_groups:
            raise ValueError(
                f"the loss 'localized_balancing' cuts the experts into num_groups="
                f"{self.num_groups} equal blocks, which {len(experts.ranks)} experts don't allow."
            )

    def __call__(self, routing: Routing, inputs: SiteInput) -> Tensor:
        weights = routing.weights.unflatten(0, (inputs.shape[0], -1))  # (B, S, E)
        task_ids = self._task_ids(inputs, len(weights)).to(weights.device)
        if routing.mask is None:
            real = weights.new_ones(weights.shape[:2])
        else:
            real = routing.mask.view(weights.shape[:2]).to(weights.dtype)
        tokens = real.sum(-1, keepdim=True)
        load = (weights * real[..., None]).sum(1) / tokens.clamp(min=1)  # (B, E)
        experts = torch.arange(routing.num_experts, device=weights.device)
        block = experts * self.num_groups // routing.num_experts
        sign = (task_ids[:, None] == block).to(weights.dtype) * 2 - 1
        scaled = (1 + self.delta * sign) * load
        # A sample of padding alone says nothing.
        count = (tokens > 0).sum() * routing.num_experts
        mean = scaled.sum() / count.clamp(min=1)
        squares = ((scaled - mean).square() * (tokens > 0)).sum() / (count - 1).clamp(min=1)
        return squares / (mean * mean + 1e-10)

    def _task_ids(self, inputs: SiteInput, samples: int) -> Tensor:
        task_ids = inputs.labels["task_ids"]
        if task_ids.shape != (samples,):
            raise ValueError(
                f"task_ids has the shape {tuple(task_ids.shape)}, but the batch holds {samples} "
                "samples; give one id for each, and don't pack or flatten samples into one row."
            )
        return task_ids
