"""What a composition learns from data: gates of the experts, or one weight for each adapter."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .compose_sources import LoraAdapter, check_sites, read_lora

Batches = Iterable[Mapping[str, Any]]
# (site, x (T, d_in)) -> (T, d_out), or (), what is added to the module's output
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


@torch.no_grad()
def fit_ridge(
    base_model: nn.Module,
    adapters: Sequence[str | Path],
    batches: Sequence[Batches],
    *,
    ridge: float = 1e-2,
) -> list[dict[str, Tensor]]:
    """DUME's router: at each site, ridge regression from a token to whose data it is of.

    One pass over the data of each adapter, with that adapter at work, and a linear system in fp64
    of d_in + 1 unknowns for each site, kept on the CPU: (d_in + 1)^2 * 8 bytes, which is 135 MB at
    d_in 4096. Real tokens count, by `attention_mask`. The published code counts padding too.

    Args:
        base_model: the model that the adapters were trained on; it is left as it was.
        adapters: their folders or Hub names.
        batches: for each adapter, batches of its own data.
        ridge: the published one is the default.

    Returns:
        For each adapter (w_e, b_e) (d_in + 1,) by site, of length 1, for `molora.compose(gates=)`.

    Raises:
        ValueError: an adapter can't be composed, or has no batch of its own.
    """
    if len(batches) != len(adapters) or not ridge > 0:
        raise ValueError(
            f"batches has {len(batches)} entries for {len(adapters)} adapters, ridge={ridge!r}; "
            "there must be one for each, and ridge above 0."
        )
    loras = _loras(base_model, adapters)
    sites = {site: len(A[0]) for lora in loras for site, (A, _) in lora.factors.items()}
    grams = {site: ridge * torch.eye(size + 1).double() for site, size in sites.items()}
    sums = {site: torch.zeros(size + 1, len(loras)).double() for site, size in sites.items()}
    modes = [(module, module.training) for module in base_model.modules()]
    base_model.eval()
    try:
        for e, (lora, given) in enumerate(zip(loras, batches, strict=True)):
            _count_tokens(base_model, lora, list(given), e, grams, sums)
    finally:
        for module, mode in modes:
            module.training = mode
    rows: list[dict[str, Tensor]] = [{} for _ in loras]
    for site, gram in grams.items():
        here = [e for e, lora in enumerate(loras) if site in lora.factors]
        solution = torch.linalg.solve(gram, sums[site][:, here])
        for e, column in zip(here, solution.mT, strict=True):
            rows[e][site] = column / column.norm()
    return rows


def _count_tokens(
    model: nn.Module,
    lora: LoraAdapter,
    batches: Sequence[Mapping[str, Any]],
    number: int,
    grams: dict[str, Tensor],
    sums: dict[str, Tensor],
) -> None:
    """Add the tokens of one adapter's data to the sums of every site."""
    if not batches:
        raise ValueError(f"{lora.source!r} has no batch of its own.")
    mask: Tensor | None = None

    def added(site: str, x: Tensor) -> Tensor:
        real = x if mask is None else x[mask.flatten().to(x.device)]
        wide = torch.cat([real.double(), real.new_ones(len(real), 1).double()], 1).cpu()
        grams[site] += wide.mT @ wide
        sums[site][:, number] += wide.sum(0)
        if site in lora.factors:
            return _output(lora, site, x.to(torch.promote_types(x.dtype, torch.float32)))
        return x.new_zeros(())

    with _adding(model, grams, added):
        for batch in batches:
            given = batch.get("attention_mask")
            mask = None if given is None else given.bool()
            model(**batch)


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
            result = added(site, args[0].flatten(0, -2)).to(output.dtype)
            return output + (result.view_as(output) if result.dim() else result)

        return add

    handles = [model.get_submodule(s).register_forward_hook(hook(s)) for s in sites]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
