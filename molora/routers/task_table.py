"""A learned row of logits for each task (Polytropon, arXiv 2202.13914; MHR, arXiv 2211.03831)."""

import torch
from torch import Tensor, nn

from ..routing import SiteInput
from .base import register_router
from .task import TaskRouter


@register_router("task_table")
class TaskTable(TaskRouter):
    """z = Z[:, task] with a table Z (E, num_tasks); nothing else is read.

    In training `relaxed` adds a draw from the logistic distribution to each logit of a sequence:
    the sigmoid of the sum is a sample of the relaxed Bernoulli distribution with logits z and
    `temperature`, as both papers train their skills. Z starts uniform in [-1e-3, 1e-3].

    Args:
        in_features: see `Router`.
        num_experts: see `Router`.
        num_tasks: see `TaskRouter`.
        relaxed: draw in training.
        temperature: see `Router`; both papers' is 1.
        noise: see `TaskRouter`.
    """

    def __init__(
        self,
        in_features: int,
        num_experts: int,
        *,
        num_tasks: int = 16,
        relaxed: bool = True,
        temperature: float = 1.0,
        noise: float = 0.0,
    ) -> None:
        super().__init__(
            in_features, num_experts, num_tasks=num_tasks, temperature=temperature, noise=noise
        )
        self.relaxed = relaxed
        self.table = nn.Parameter(torch.empty(num_experts, num_tasks))

    def reset_parameters(self) -> None:
        nn.init.uniform_(self.table, -1e-3, 1e-3)

    def task_logits(self, task_ids: Tensor) -> Tensor:
        table = self.table.to(torch.promote_types(self.table.dtype, torch.float32))
        return table.mT[task_ids]

    def compute_logits(self, inputs: SiteInput) -> Tensor:
        logits = super().compute_logits(inputs)
        if self.training and self.relaxed:
            # Kept away from 0 and 1, where the logit is infinite.
            tiny = torch.finfo(logits.dtype).eps
            logits = logits + torch.rand_like(logits).clamp(tiny, 1 - tiny).logit()
        return logits
