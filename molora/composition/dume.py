"""DUME (gensyn-ai/dume): by a regression on whose data a token is of."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..fixed_routing import evaluating
from .base import Gates, register_composer
from .fitting import Batches, adding, lora_output, read_loras
from .prototypes import PrototypeComposer
from .sources import LoraAdapter


@register_composer("dume")
class Dume(PrototypeComposer):
    """See `DumeRouter`; `gates` holds (w, b) (d_in + 1,) by site for each adapter.

    DUME takes the best expert alone; at its temperature of 0.1 a second one counts only where the
    two nearly tie.
    """

    data = "each"
    gates_from = "molora.fit_ridge"

    def __init__(
        self, *, top_k: int = 2, temperature: float = 0.1, gates: Gates | None = None
    ) -> None:
        super().__init__(top_k, temperature, gates)

    @classmethod
    def fit(
        cls, base_model: nn.Module, adapters: Sequence[str], batches: Sequence[Batches]
    ) -> dict[str, Any]:
        return {"gates": fit_ridge(base_model, adapters, batches)}


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
    loras = read_loras(base_model, adapters)
    sites = {site: len(A[0]) for lora in loras for site, (A, _) in lora.factors.items()}
    grams = {site: ridge * torch.eye(size + 1).double() for site, size in sites.items()}
    sums = {site: torch.zeros(size + 1, len(loras)).double() for site, size in sites.items()}
    with evaluating(base_model):
        for e, (lora, given) in enumerate(zip(loras, batches, strict=True)):
            _count_tokens(base_model, lora, list(given), e, grams, sums)
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
            return lora_output(lora, site, x.to(torch.promote_types(x.dtype, torch.float32)))
        return x.new_zeros(())

    with adding(model, grams, added):
        for batch in batches:
            given = batch.get("attention_mask")
            mask = None if given is None else given.bool()
            model(**batch)
