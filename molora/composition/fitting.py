"""What the ways to compose share of learning from data."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor, nn

from ..config_checks import check_alpha, check_count
from ..evaluating import evaluating
from .sources import LoraAdapter

Batches = Iterable[Mapping[str, Any]]
# (site, x (T, d_in)) -> (T, d_out), or (), what is added to the module's output
Added = Callable[[str, Tensor], Tensor]


def lora_output(lora: LoraAdapter, site: str, x: Tensor) -> Tensor:
    """(T, d_in) -> (T, d_out) what the adapter adds at a site, in the dtype of x."""
    A, B = (factor.to(x) for factor in lora.factors[site])
    return x @ A.mT @ B.mT


def minimize(
    model: nn.Module,
    sites: Iterable[str],
    added: Added,
    leaves: list[Tensor],
    batches: Batches,
    steps: int,
    learning_rate: float,
    penalty: Callable[[], Tensor | float] = lambda: 0.0,
) -> None:
    """Minimise the model's loss over the leaves; no other tensor gets a gradient.

    Raises:
        ValueError: there is no batch, the model gives no loss, or one that isn't finite, or `steps`
            or `learning_rate` is no number to fit by.
    """
    check_count(1)("steps", steps)
    check_alpha("learning_rate", learning_rate)
    given = list(batches)
    if not given:
        raise ValueError("batches is empty: there is nothing to fit to.")
    optimizer = torch.optim.AdamW(leaves, lr=learning_rate, weight_decay=0.0)
    with evaluating(model), adding(model, sites, added):
        for batch in islice(cycle(given), steps):
            loss = getattr(model(**batch), "loss", None)
            if loss is None:
                raise ValueError("the model gives no loss; let the batches have labels.")
            if not loss.isfinite():
                raise ValueError(
                    f"the loss of a batch is {loss.item()}: none of its labels counts (a causal "
                    "model predicts none of a row of one token), or the model's weights or the "
                    "learning rate are wrong."
                )
            gradients = torch.autograd.grad(loss + penalty(), leaves)
            for leaf, gradient in zip(leaves, gradients, strict=True):
                leaf.grad = gradient
            optimizer.step()


@contextmanager
def adding(model: nn.Module, sites: Iterable[str], added: Added) -> Iterator[None]:
    """Inside, those modules' outputs have that added."""

    def hook(site: str) -> Callable[..., Tensor]:
        def add(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
            result = added(site, args[0].flatten(0, -2)).to(output.dtype)
            return output + (result.view_as(output) if result.dim() else result)

        return add

    handles = [model.get_submodule(s).register_forward_hook(hook(s)) for s in sites]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
