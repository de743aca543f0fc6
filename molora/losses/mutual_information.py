"""How much the expert says about the token (DS-MoE, arXiv 2404.05567), or about its task
(Mod-Squad, arXiv 2212.08066; BECoTTA, arXiv 2402.08712)."""

import math

import torch
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
    sequences of a task of the mean over their real tokens, and each of the batch's D tasks counts
    1/D: I = sum over tasks and experts of M log(M / (M_task M_e)), M = p / D. It is at most
    log min(D, E), and 0 for a batch of one task. The batch must then bring `task_ids`.

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
        self.needs = ("task_ids",) if about == "task" else ()

    def __call__(self, routing: Routing, inputs: SiteInput) -> Tensor:
        if self.about == "token":
            between = _entropy(routing.token_mean(routing.probs))
            within = routing.token_mean(_entropy(routing.probs))
        else:
            between, within = self._of_tasks(routing, inputs)
        return (within - between) / math.log(max(routing.num_experts, 2))

    def _of_tasks(self, routing: Routing, inputs: SiteInput) -> tuple[Tensor, Tensor]:
        """Entropy of the mean over tasks, and mean over tasks of the entropy."""
        tokens = inputs.tokens
        assert tokens is not None, "checked"
        ids = tokens.by_sequence("task_ids")
        assert ids is not None, "checked"
        probs = tokens.mean(routing.probs, tokens.real)  # (N, E)
        present = tokens.mean(torch.ones_like(routing.probs[:, :1]), tokens.real)[:, 0]
        # Every sequence stands for its task, with a share of it: nothing waits for their number.
        alike = (ids[:, None] == ids).to(probs.dtype)
        number = (alike @ present).clamp(min=1)
        mean = alike @ probs / number[:, None]
        share = present / number
        share = share / share.sum().clamp(min=1)
        return _entropy(share @ mean), share @ _entropy(mean)


def _entropy(probs: Tensor) -> Tensor:
    return -(probs * probs.clamp(min=1e-30).log()).sum(-1)
