"""What a composition learns from data: a gate for each expert, or one weight for each adapter."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .compose_sources import LoraAdapter, check_sites, read_lora

Batches = Iterable[Mapping[str, Any]]
# (site, x (T, d_in)) -> (T, d_out) what is added to the module's output
Added = Callable[[str, Tensor], Tensor]


def fit_gates(
    base_model: nn.Module,
    adapter: str | Path,
    batches: Batches,
    *,
    steps: int = 100,
    learning_rate: float = 5e-3,
) -> dict[str, Tensor]:
    """PHATGOOSE's gates of one adapter, learned on its own data (arXiv 2402.05859).

    At each site y = W x + sigmoid(<v, x>) s B A x, where v (d_in) starts at 0 and all else is
    frozen; the published numbers of steps and learning rate are the defaults, the optimizer is
    AdamW without decay.

    Args:
        base_model: the model that the adapter was trained on; it is left as it was.
        adapter: its folder or Hub name.
        batches: keyword arguments of the model's forward, with labels; repeated if there are fewer
            than steps.
        steps: optimizer steps, one batch each.
        learning_rate: of the gates.

    Returns:
        v (d_in,) by site, in fp32 (fp64 for fp64 models), for `molora.compose(gates=...)`.

    Raises:
        ValueError: the adapter can't be composed, there is no batch, or the model gives no loss.
    """
    lora = _loras(base_model, [adapter])[0]
    place = next(base_model.parameters())
    wide = torch.promote_types(place.dtype, torch.float32)
    gates = {
        site: torch.zeros(A.shape[1], device=place.device, dtype=wide, requires_grad=True)
        for site, (A, _) in lora.factors.items()
    }

    def added(site: str, x: Tensor) -> Tensor:
        x = x.to(wide)
        return (x @ gates[site]).sigmoid()[:, None] * _output(lora, site, x)

    _fit(base_model, lora.factors, added, list(gates.values()), batches, steps, learning_rate)
    return {site: gate.detach() for site, gate in gates.items()}


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
        ValueError: an adapter can't be composed, there is no batch, or the model gives no loss.
    """
    loras = _loras(base_model, adapters)
    place = next(base_model.parameters())
    wide = torch.promote_types(place.dtype, torch.float32)
    start = torch.full((len(loras),), 1 / len(loras), device=place.device, dtype=wide)
    weights = start.requires_grad_()

    def added(site: str, x: Tensor) -> Tensor:
        x = x.to(wide)
        here = [e for e, lora in enumerate(loras) if site in lora.factors]
        return torch.stack([weights[e] * _output(loras[e], site, x) for e in here]).sum(0)

    sites = {site for lora in loras for site in lora.factors}
    _fit(
        base_model, sites, added, [weights], batches, steps, learning_rate,
        lambda: penalty * weights.abs().mean(),
    )  # fmt: skip
    return weights.tolist()


def _loras(base_model: nn.Module, adapters: Sequence[str | Path]) -> list[LoraAdapter]:
    loras = [read_lora(adapter) for adapter in adapters]
    check_sites(base_model, loras)
    return loras


def _output(lora: LoraAdapter, site: str, x: Tensor) -> Tensor:
    A, B = (factor.to(x) for factor in lora.factors[site])
    return x @ A.mT @ B.mT


def _fit(
    model: nn.Module,
    sites: Iterable[str],
    added: Added,
    leaves: list[Tensor],
    batches: Batches,
    steps: int,
    learning_rate: float,
    penalty: Callable[[], Tensor | float] = lambda: 0.0,
) -> None:
    """Minimise the model's loss over the leaves; no other tensor gets a gradient."""
    given = list(batches)
    if not given:
        raise ValueError("batches is empty: there is nothing to fit to.")
    optimizer = torch.optim.AdamW(leaves, lr=learning_rate, weight_decay=0.0)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with _adding(model, sites, added):
            for batch in islice(cycle(given), steps):
                loss = getattr(model(**batch), "loss", None)
                if loss is None:
                    raise ValueError("the model gives no loss; let the batches have labels.")
                gradients = torch.autograd.grad(loss + penalty(), leaves)
                for leaf, gradient in zip(leaves, gradients, strict=True):
                    leaf.grad = gradient
                optimizer.step()
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def _adding(model: nn.Module, sites: Iterable[str], added: Added) -> Iterator[None]:
    """Inside, those modules' outputs have that added."""

    def hook(site: str) -> Callable[..., Tensor]:
        def add(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
            result = added(site, args[0].flatten(0, -2))
            return output + result.view_as(output).to(output.dtype)

        return add

    handles = [model.get_submodule(s).register_forward_hook(hook(s)) for s in sites]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
