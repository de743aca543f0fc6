"""The auxiliary losses of one decision, attached to what its site gives."""

from collections.abc import Mapping

import torch
from torch import Tensor

from .auxiliary import attach
from .context import RoutingContext
from .losses import Loss
from .needs import require
from .routing import Routing, SiteInput


def attach_losses(
    losses: Mapping[str, tuple[float, Loss]],
    decisions: int,
    context: RoutingContext,
    site: str,
    routing: Routing,
    inputs: SiteInput,
    result: Tensor,
) -> Tensor:
    """`result`, unchanged, whose backward also runs that of the losses.

    Args:
        losses: coefficient and loss, by name.
        decisions: of the adapter, over which losses are averaged.
        context: whose statistics they go to, and which scales them.
        site: the name in the statistics.
        routing: the decision.
        inputs: of the site.
        result: (..., d_out) what the site gives.

    Raises:
        ValueError: the batch doesn't bring what a loss needs.
    """
    statistics = context.counting()
    if not torch.is_grad_enabled() and statistics is None:
        for _, term in losses.values():
            if term.draws:  # as it will when reentrant checkpointing runs the layer again
                term(routing, inputs)
        return result
    for name, (_, term) in losses.items():
        if term.needs:
            require(term.needs, inputs, f"the loss {name!r}")
    terms = {name: loss(routing, inputs) for name, (_, loss) in losses.items()}
    if statistics is not None:
        statistics.update(site, routing, terms)
    if torch.is_grad_enabled() and terms:
        weighted = torch.stack([losses[name][0] * term for name, term in terms.items()])
        result = attach(result, context.loss_scale(weighted.sum() / decisions))
    return result
