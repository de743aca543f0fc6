"""Routing records in fp64 for the tests of single losses, and what a loss makes of them."""

from typing import Any

import torch
from torch import Tensor, nn

from molora.losses import LOSSES
from molora.passes import Pass
from molora.routing import Routing, SiteInput

MASKS = {"all": None, "some": [1, 1, 0, 1, 0, 0, 1, 1], "none": [0] * 8}


def record(
    experts: int = 4, mask: list[int] | None = None, seed: int = 0, active: int | None = None
) -> Routing:
    """8 tokens with random probabilities; the likeliest `active` experts are used, by default all.

    The logits are a leaf with a gradient.
    """
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(8, experts, generator=generator, dtype=torch.float64).requires_grad_()
    probs = logits.softmax(-1)
    chosen = torch.zeros_like(probs).scatter(1, probs.topk(active or experts).indices, 1.0)
    kept = None if mask is None else torch.tensor(mask).bool()
    return Routing(probs * chosen, logits, probs, kept)


def real_tokens(routing: Routing) -> list[int]:
    """Those that the mask keeps."""
    tokens = range(len(routing.weights))
    return [t for t in tokens if routing.mask is None or routing.mask[t]]


def loss(name: str, routing: Routing, options: dict[str, Any], **fields: Any) -> Tensor:
    """The loss, with `fields` of the `SiteInput` beside two samples of equal length."""
    labels = fields.pop("labels", {})
    samples = fields.get("shape", (2,))[0]
    fields = {
        "given": Pass(labels=labels, batch=samples, module=nn.Identity()),
        "hidden": torch.zeros(len(routing.weights), 3, dtype=torch.float64),
        "shape": (2, len(routing.weights) // 2),
        "mask": routing.mask,
        **fields,
    }
    value: Tensor = LOSSES.build(name, options)(routing, SiteInput(**fields))
    assert value.shape == ()
    return value


def check_padding(name: str, options: dict[str, Any], **fields: Any) -> None:
    """Padding gets no gradient, a batch of nothing else gives a finite loss and gradient."""
    for mask in ("some", "none"):
        routing = record(mask=MASKS[mask], active=2)
        value = loss(name, routing, options, **fields)
        assert torch.isfinite(value)
        (grad,) = torch.autograd.grad(value, routing.logits)
        assert torch.isfinite(grad).all()
        assert not grad[~routing.mask].any()
        assert (mask == "none" or grad.any()) and (mask == "some" or value == 0)
