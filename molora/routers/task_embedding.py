"""Logits from a learned embedding of the task (MOELoRA, arXiv 2310.18339)."""

import math

import torch
from torch import Tensor, nn

from .. import ops
from .base import register_router
from .task import TaskRouter


@register_router("task_embedding")
class TaskEmbeddingRouter(TaskRouter):
    """z = W_g t for all tokens of a sequence, t its task's row of a table (num_tasks, d_t).

    The table starts as N(0, 1), W_g (E, d_t) as the weight of an `nn.Linear`.

    Args:
        in_features: see `Router`.
        num_experts: see `Router`.
        num_tasks: rows of the table.
        embedding_size: d_t.
        temperature: see `Router`.
        noise: see `TaskRouter`.
    """

    def __init__(
        self,
        in_features: int,
        num_experts: int,
        *,
        num_tasks: int = 16,
        embedding_size: int = 64,
        temperature: float = 1.0,
        noise: float = 0.0,
    ) -> None:
        super().__init__(
            in_features, num_experts, num_tasks=num_tasks, temperature=temperature, noise=noise
        )
        if embedding_size < 1:
            raise ValueError(f"router option embedding_size={embedding_size!r} must be at least 1")
        self.embedding = nn.Parameter(torch.empty(num_tasks, embedding_size))
        self.weight = nn.Parameter(torch.empty(num_experts, embedding_size))

    def reset_parameters(self) -> None:
        nn.init.normal_(self.embedding)
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def task_logits(self, task_ids: Tensor) -> Tensor:
        return ops.router_logits(self.embedding[task_ids], self.weight, None)
