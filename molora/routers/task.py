"""Routers that read the task of a sequence and nothing else."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..evaluating import evaluating
from ..routing import SiteInput, weigh_by_logits
from ..value_types import is_whole
from .base import Router, unknown_id

if TYPE_CHECKING:
    from ..gates import Gate


class TaskRouter(Router):
    """All tokens of a sequence get the logits of its task.

    A subclass implements `task_logits`. The batch brings `task_ids`, one for each sequence, from 0
    to num_tasks - 1; given the task the adapter is one static weight, which `static_weights` tells.

    Args:
        in_features: see `Router`.
        num_experts: see `Router`.
        num_tasks: number of tasks.
        temperature: see `Router`.
        noise: see `Router`; one draw for a sequence.
    """

    needs = ("task_ids",)
    per_task = True
    reads_site = False

    def __init__(
        self,
        in_features: int,
        num_experts: int,
        *,
        num_tasks: int = 16,
        temperature: float = 1.0,
        noise: float = 0.0,
    ) -> None:
        super().__init__(in_features, num_experts, temperature=temperature, noise=noise)
        if num_tasks < 1:
            raise ValueError(f"router option num_tasks={num_tasks!r} must be at least 1")
        self.num_tasks = num_tasks

    def task_logits(self, task_ids: Tensor) -> Tensor:
        """From (N,) int64 in [0, num_tasks) to (N, E) in fp32 (fp64 in fp64 models)."""
        raise NotImplementedError

    def compute_logits(self, inputs: SiteInput) -> Tensor:
        """(N, E) of the N sequences.

        Raises:
            ValueError: an id isn't one of a task (on an accelerator, where looking would wait for
                the device, torch's own error).
        """
        tokens = inputs.tokens
        assert tokens is not None, "checked"
        task_ids = tokens.by_sequence("task_ids")
        assert task_ids is not None, "checked"
        wrong = unknown_id(task_ids, self.num_tasks)
        if wrong is not None:
            raise ValueError(self._unknown(wrong))
        return self.task_logits(task_ids.long())

    def forward(self, inputs: SiteInput) -> Tensor:
        """(T, E) logits, equal for the tokens of a sequence, with temperature and noise."""
        self.check_needs(inputs)
        assert inputs.tokens is not None, "checked"
        return inputs.tokens.spread(self.perturbed_logits(inputs))

    @torch.no_grad()
    def static_weights(self, gate: "Gate", task: int) -> Tensor | None:
        """See `Router.static_weights`."""
        if not is_whole(task) or not 0 <= task < self.num_tasks:
            raise ValueError(self._unknown(task))
        device = next((p.device for p in self.parameters()), torch.device("cpu"))
        ids = torch.tensor([task], device=device)
        logits = self.task_logits(ids) / self.temperature
        with evaluating(gate):
            weights = weigh_by_logits(gate, logits, router=self)
        return None if weights is None else weights[0]

    def _unknown(self, task: object) -> str:
        return (
            f"there is no task {task!r}: this router knows {self.num_tasks}, numbered from 0. Set "
            "router_options={'num_tasks': ...} to their number before training."
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, num_tasks={self.num_tasks}"
