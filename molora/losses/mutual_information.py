"""How much the expert says about the token (DS-MoE, arXiv 2404.05567), or about its task
(Mod-Squad, arXiv 2212.08066; BECoTTA, arXiv 2402.08712)."""

import math

from torch import Tensor

from ..registry import unknown_name_message
from ..routing import Routing, SiteInput
from .base import Loss, register_loss

SOURCES = ("token", "task")


@register_loss("mutual_information")
class MutualInformation(Loss):
    """L = -I / log E, I = H(mean of p) - mean of H(p): -1 when experts are used alike and each
    token (or task) is sure of its own, 0 when all have the same distribution.

    With about="token" the means are over the real tokens. With about="task" p is the mean over the
    tokens of a task, and each of the batch's D tasks counts 1/D: I = sum over tasks and experts of
    M log(M / (M_task M_e)), M = p / D. It is at most log min(D, E), and 0 for a batch of one task.
    The batch must then bring `task_ids` (batch,): see `molora.TaskIdCollator`.

    Published: the bare -I, so a coefficient c is c log E here. BECoTTA's M is of the weights after
    selection and detached in its code, which leaves no gradient; here it is of p, and attached.

    Unverified: the formula without ids is the usual one, not read from DS-MoE's text.

    Args:
        about: "token" or "task".
    """

    def __init__(self, *, about: str = "token") -> None:
        if about not in SOURCES:
            raise ValueError(unknown_name_message("loss option about", about, SOURCES))
        self.about = about

    def __call__(self, routing: Routing, inputs: SiteInput) -> Tensor:
        if self.about == "token":
            between = _entropy(routing.token_mean(routing.probs))
            within = routing.token_mean(_entropy(routing.probs))
        else:
            between, within = self._of_tasks(routing, inputs)
        return (within - between) / math.log(max(routing.num_experts, 2))

    def _of_tasks(self, routing: Routing, inputs: SiteInput) -> tuple[Tensor, Tensor]:
        """Entropy of the mean over tasks, and mean over tasks of the entropy."""
        probs = routing.probs.unflatten(0, (inputs.shape[0], -1))  # (B, S, E)
        ids = _task_ids(inputs).to(probs.device)
        real = probs.new_ones(probs.shape[:2])
        if routing.mask is not None:
            real = routing.mask.view(probs.shape[:2]).to(probs.dtype)
        # Every sample stands for its task, with a share of it: no count of tasks is waited for.
        alike = (ids[:, None] == ids).to(probs.dtype)
        total = alike @ (probs * real[..., None]).sum(1)
        mean = total / (alike @ real.sum(1)).clamp(min=1)[:, None]  # (B, E)
        present = (real.sum(1) > 0).to(probs.dtype)
        share = present / (alike @ present).clamp(min=1)
        share = share / share.sum().clamp(min=1)
        return _entropy(share @ mean), share @ _entropy(mean)


def _entropy(probs: Tensor) -> Tensor:
    return -(probs * probs.clamp(min=1e-30).log()).sum(-1)


def _task_ids(inputs: SiteInput) -> Tensor:
    ids = inputs.labels.get("task_ids")
    if ids is None:
        raise ValueError(
            "the loss 'mutual_information' with about='task' needs the task of each sample: wrap "
            "the trainer's data collator in molora.TaskIdCollator, or pass routing_task_ids "
            "(batch,) to the model's forward."
        )
    if ids.shape != inputs.shape[:1]:
        raise ValueError(
            f"task_ids has the shape {tuple(ids.shape)}, but the batch holds {inputs.shape[0]} "
            "samples; give one id for each, and don't pack or flatten samples into one row."
        )
    return ids
