"""What a method asks of a batch beside tokens, made up from the tokens themselves."""

import torch
from torch import Tensor

from molora import MoloraConfig
from molora.routers import ROUTERS

PROMPT = 3  # tokens of each sequence that make its prompt


def needs_of(config: MoloraConfig) -> set[str]:
    """What its router and its losses need, of `molora.needs`."""
    router = ROUTERS.build(config.router, config.router_options, in_features=1, num_experts=2)
    losses = [loss for _, loss in config.build_losses().values()]
    return {name for part in (router, *losses) for name in part.needs}


def labels_for(
    config: MoloraConfig, input_ids: Tensor, mask: Tensor | None = None
) -> dict[str, Tensor]:
    """Labels that depend on a row's real tokens alone, not on its padding or on other rows.

    Args:
        config: whose needs they are.
        input_ids: (batch, sequence).
        mask: (batch, sequence), 0 for padding; None when every token is real.
    """
    real = torch.ones_like(input_ids) if mask is None else mask.long()
    place = real.cumsum(-1) * real  # 1, 2, ... of the real tokens
    first = (input_ids * (place == 1)).sum(-1)
    every = {
        "task_ids": ("routing_task_ids", first % 2),
        "prompt": ("prompt_mask", ((place > 0) & (place <= PROMPT)).long()),
        "modality_ids": ("modality_ids", input_ids % 2 * real),
    }
    needs = needs_of(config)
    return dict(label for need, label in every.items() if need in needs)
