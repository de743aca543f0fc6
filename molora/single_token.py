"""The single token of a generation's step on a CPU, past what only many tokens need.

For so few numbers a call of torch takes longer than what it computes, and reading the factors of
experts that the token didn't choose takes longer still. So where a site's router, gate and experts
each say what they make of one token, logits and weights are Python's numbers, and of the factors
only those of the chosen experts are read.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from .experts import Experts
from .gates import Gate
from .routers import Router

# What each kind of part says of one token, and the methods that say the same of many.
SAID: dict[type, tuple[str, tuple[str, ...]]] = {
    Router: ("logits_of_token", ("forward", "perturbed_logits", "compute_logits")),
    Gate: ("weights_of_token", ("forward",)),
    Experts: ("add_token", ("forward", "mix_tokens")),
}


def add_experts(
    router: Router | None, gate: Gate | None, experts: Experts, x: Tensor, result: Tensor
) -> Tensor | None:
    """What a site makes of one token at inference; None where it has to go the general way.

    Args:
        router: the site's own.
        gate: the site's own.
        experts: the site's.
        x: (..., d_in) the site's input, by `ops.widened` where the experts take it so.
        result: (..., d_out) the base layer's output, which stays as it is.

    Returns:
        (..., d_out) in the dtype of `result`, the same as the general way's up to rounding.
    """
    if router is None or gate is None or not _in_plain_memory(x) or x.numel() != x.shape[-1]:
        return None
    if not (_speaks(Router, router) and _speaks(Gate, gate) and _speaks(Experts, experts)):
        return None
    hidden = x.reshape(-1)
    logits = router.logits_of_token(hidden)
    weights = None if logits is None else gate.weights_of_token(logits)
    return None if weights is None else experts.add_token(hidden, weights, result)


def _in_plain_memory(x: Tensor) -> bool:
    """Whether Python may look at numbers made of x, in fp32 or fp64, and nothing has to be kept for
    a backward."""
    if type(x) is not Tensor or not x.is_cpu or x.element_size() < 4 or torch.is_grad_enabled():
        return False
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined]
        return False
    return not torch.is_autocast_enabled("cpu")


def _speaks(kind: type, part: nn.Module) -> bool:
    """Whether a part says what it makes of one token, and nobody listens to, or has replaced, what
    it makes of many."""
    if part.training or part._forward_hooks or part._forward_pre_hooks:
        return False
    part_type: Any = type(part)
    return "forward" not in vars(part) and _says_the_same(kind, part_type)


@cache
def _says_the_same(kind: type, part: type) -> bool:
    """Whether the class that speaks of one token knows what is done with many: a subclass that
    changes the latter alone has taken back the former."""
    one, many = SAID[kind]

    def owner(name: str) -> int:
        return next(place for place, base in enumerate(part.__mro__) if name in vars(base))

    return all(owner(one) <= owner(name) for name in many)
