"""A site at inference, past what only training, losses and observers need.

Where router, gate and experts each say what they make of a single token, they read nothing else,
and nothing else is worked out for them.

A single token in plain memory goes a shorter way still. For so few numbers a call of torch takes
longer than what it computes, and reading the factors of experts that the token didn't choose takes
longer still. So its logits and weights are Python's numbers, and of the factors only those of the
chosen experts are read.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from .experts import Experts
from .gates import Gate
from .plain_memory import in_plain_memory
from .routers import Router
from .routing import Routing, SiteInput

# What each kind of part says of one token, and the methods that say the same of many.
SAID: dict[type, tuple[str, tuple[str, ...]]] = {
    Router: ("logits_of_token", ("forward", "perturbed_logits", "compute_logits")),
    Gate: ("weights_of_token", ("forward",)),
    Experts: ("add_token", ("forward", "mix_tokens")),
}


def add_experts(
    router: Router | None, gate: Gate | None, experts: Experts, x: Tensor, result: Tensor
) -> Tensor | None:
    """What a site makes of its tokens without gradients; None where it has to go the general way.

    Args:
        router: the site's own.
        gate: the site's own.
        experts: the site's.
        x: (..., d_in) the site's input, by `ops.widened` where the experts take it so.
        result: (..., d_out) the base layer's output.

    Returns:
        (..., d_out) in the dtype of `result`: the general way's bits for several tokens, the same
        up to rounding for one.
    """
    if router is None or gate is None or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    if not (_speaks(Router, router) and _speaks(Gate, gate) and _speaks(Experts, experts)):
        return None
    if x.numel() == x.shape[-1] and in_plain_memory(x):
        alone = add_token(router, gate, experts, x, result)
        if alone is not None:
            return alone
    inputs = SiteInput(hidden=x.reshape(-1, x.shape[-1]))
    routing: Routing = gate.forward(router.forward(inputs), inputs)
    return experts.forward(x, routing.all_weights, result)


def add_token(
    router: Router, gate: Gate, experts: Experts, x: Tensor, result: Tensor
) -> Tensor | None:
    """`add_experts` for one token, by Python's numbers; None where a part doesn't say."""
    hidden = x.reshape(-1)
    logits = router.logits_of_token(hidden)
    weights = None if logits is None else gate.weights_of_token(logits)
    return None if weights is None else experts.add_token(hidden, weights, result)


def _speaks(kind: type, part: nn.Module) -> bool:
    """Whether a part says what it makes of one token, and nobody listens to, or has replaced, what
    it makes of many."""
    if part.training or part._forward_hooks or part._forward_pre_hooks:
        return False
    part_type: Any = type(part)
    return "forward" not in vars(part) and _says_the_same(kind, part_type)


@cache
def _says_the_same(kind: type, part: type) -> bool:
    """Whether the class speaks of one token and knows what is done with many: a subclass that
    changes the latter alone has taken back the former."""
    one, many = SAID[kind]
    if getattr(part, one) is getattr(kind, one):
        return False  # `FeedForwardExperts` don't even have a `forward`

    def owner(name: str) -> int:
        return next(place for place, base in enumerate(part.__mro__) if name in vars(base))

    return all(owner(one) <= owner(name) for name in many)
