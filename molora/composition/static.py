"""The same weights for every token, so that merging is exact; LoraHub's objective to fit them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config_checks import check_not_negative
from ..sites import Site
from .base import NOTHING, Composer, one_for_each, register_composer
from .fitting import Batches, lora_output, minimize
from .sources import LoraAdapter, read_loras


@register_composer("static")
class Static(Composer):
    """The gate "fixed" with one weight for each adapter; None is 1/E each."""

    data = "examples"
    fitted = "weights"

    def __init__(self, *, weights: Sequence[float] | None = None) -> None:
        self.weights = weights

    @classmethod
    def fit(
        cls,
        base_model: nn.Module,
        adapters: Sequence[str],
        batches: Sequence[Batches],
        chosen: Mapping[str, Any] = NOTHING,
    ) -> dict[str, Any]:
        (examples,) = batches
        return {"weights": fit_weights(base_model, adapters, examples)}

    def check(
        self, base_model: nn.Module, adapters: Sequence[LoraAdapter], sites: Sequence[Site]
    ) -> None:
        if self.weights is not None:
            one_for_each("weights", self.weights, adapters)

    def settings(self, adapters: Sequence[LoraAdapter]) -> dict[str, Any]:
        equal = [1 / len(adapters)] * len(adapters)
        numbers = equal if self.weights is None else [float(w) for w in self.weights]
        return {"router": "random", "gate": "fixed", "gate_options": {"weights": numbers}}


def fit_weights(
    base_model: nn.Module,
    adapters: Sequence[str | Path],
    batches: Batches,
    *,
    steps: int = 50,
    learning_rate: float = 0.05,
    penalty: float = 0.05,
) -> list[float]:
    """One weight for each adapter, for `molora.compose(router="static", weights=...)`.

    They start at 1/E and minimise the loss plus `penalty` times the mean of |w|, LoraHub's
    objective (arXiv 2307.13269, whose coefficient is the default). LoraHub mixes the factors, which
    has cross terms, and searches without gradients; here the outputs are mixed, by AdamW.

    Args:
        base_model: the model that the adapters were trained on; it is left as it was.
        adapters: their folders or Hub names.
        batches: a few examples of the task, as keyword arguments of the model's forward.
        steps: optimizer steps, one batch each; batches are repeated.
        learning_rate: of the weights.
        penalty: on the mean absolute weight.

    Raises:
        ValueError: an adapter can't be composed, there is no batch, the model gives no loss, or an
            option is out of range.
    """
    check_not_negative("penalty", penalty)
    loras, sites = read_loras(base_model, adapters)
    place = next(base_model.parameters())
    wide = torch.promote_types(place.dtype, torch.float32)
    start = torch.full((len(loras),), 1 / len(loras), device=place.device, dtype=wide)
    weights = start.requires_grad_()

    def added(site: str, x: Tensor) -> Tensor:
        x = x.to(wide)
        here = [e for e, lora in enumerate(loras) if site in lora.factors]
        return torch.stack([weights[e] * lora_output(loras[e], site, x) for e in here]).sum(0)

    minimize(
        base_model, sites, added, [weights], batches, steps, learning_rate,
        lambda: penalty * weights.abs().mean(),
    )  # fmt: skip
    return weights.tolist()
