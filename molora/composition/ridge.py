"""DUME's regression (gensyn-ai/dume), and the sums from which it goes on with further adapters."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import _get_in_out_features
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..config_checks import check_alpha
from ..evaluating import evaluating
from .fitting import Batches, adding, lora_output
from .sources import LoraAdapter, read_loras


class RidgeStatistics:
    """All that `fit_ridge` keeps of data: sums over the real tokens x~ = (x, 1) of each site.

    With them, adapters can be added later without the data of those before, and the result is the
    one of all data at once.

        statistics = molora.RidgeStatistics()
        gates = molora.fit_ridge(base, ["sql", "chat"], batches, statistics=statistics)
        statistics.save("ridge.safetensors")
        statistics = molora.RidgeStatistics.load("ridge.safetensors")
        gates = molora.fit_ridge(base, ["maths"], more, statistics=statistics)  # of all three

    Args:
        sites: modules that later adapters may target beside those of the first; only where sums
            were kept from the start can an adapter be added.

    Attributes:
        sources: the adapters, in order.
        grams: site -> G = sum of x~ x~^T over the data of all adapters, (d_in + 1, d_in + 1).
        sums: site -> number of an adapter -> sum of x~ over its data, (d_in + 1,), for the adapters
            that target the site. All are fp64 and on the CPU.
    """

    def __init__(self, sites: Iterable[str] = ()) -> None:
        self.sites = tuple(sites)
        self.sources: list[str] = []
        self.grams: dict[str, Tensor] = {}
        self.sums: dict[str, dict[int, Tensor]] = {}

    def prepare(self, base_model: nn.Module, loras: Sequence[LoraAdapter]) -> None:
        """Make room for the data of these adapters.

        Raises:
            ValueError: one targets a module where nothing was kept of the earlier data.
        """
        sizes = {site: len(A[0]) for lora in loras for site, (A, _) in lora.factors.items()}
        if not self.sources:
            for site in self.sites:
                sizes.setdefault(site, _width(base_model, site))
            self.grams = {s: torch.zeros(n + 1, n + 1).double() for s, n in sizes.items()}
            self.sums = {site: {} for site in sizes}
        for lora in loras:
            for site, (A, _) in lora.factors.items():
                if site not in self.grams or len(self.grams[site]) != len(A[0]) + 1:
                    raise ValueError(
                        f"{lora.source!r} adapts {site!r} with {len(A[0])} inputs, where the "
                        "statistics keep nothing of the earlier data; start anew with all data, "
                        "and name the modules to come: RidgeStatistics(sites=[...])."
                    )

    @torch.no_grad()
    def add(self, base_model: nn.Module, lora: LoraAdapter, batches: Batches) -> None:
        """Count the real tokens of one adapter's data, with it at work; after `prepare`."""
        number = len(self.sources)
        self.sources.append(lora.source)
        for site in lora.factors:
            self.sums[site][number] = torch.zeros(len(self.grams[site])).double()
        mask: Tensor | None = None

        def added(site: str, x: Tensor) -> Tensor:
            real = x if mask is None else x[mask.flatten().to(x.device)]
            wide = torch.cat([real.double(), real.new_ones(len(real), 1).double()], 1).cpu()
            self.grams[site] += wide.mT @ wide
            if site not in lora.factors:
                return x.new_zeros(())
            self.sums[site][number] += wide.sum(0)
            return lora_output(lora, site, x.to(torch.promote_types(x.dtype, torch.float32)))

        with adding(base_model, self.grams, added):
            for batch in batches:
                given = batch.get("attention_mask")
                mask = None if given is None else given.bool()
                base_model(**batch)

    def solve(self, ridge: float) -> list[dict[str, Tensor]]:
        """For each adapter (w, b) = (G + ridge I)^-1 (its sum), brought to length 1, by site."""
        rows: list[dict[str, Tensor]] = [{} for _ in self.sources]
        for site, sums in self.sums.items():
            if not sums:
                continue
            gram = self.grams[site] + ridge * torch.eye(len(self.grams[site])).double()
            solution = torch.linalg.solve(gram, torch.stack(list(sums.values()), 1))
            for e, column in zip(sums, solution.mT, strict=True):
                rows[e][site] = column / column.norm()
        return rows

    def save(self, path: str | Path) -> None:
        """Write one safetensors file."""
        tensors = {f"gram {site}": gram for site, gram in self.grams.items()}
        for site, sums in self.sums.items():
            tensors |= {f"sum {e} {site}": vector for e, vector in sums.items()}
        save_file(tensors, str(path), metadata={"sources": json.dumps(self.sources)})

    @classmethod
    def load(cls, path: str | Path) -> "RidgeStatistics":
        """Read what `save` wrote.

        Raises:
            ValueError: the file holds something else.
        """
        statistics = cls()
        with safe_open(str(path), "pt") as file:
            metadata: Mapping[str, str] = file.metadata() or {}
            if "sources" not in metadata:
                raise ValueError(f"{path} holds no statistics that RidgeStatistics.save wrote.")
            statistics.sources = json.loads(metadata["sources"])
            for key in file.keys():  # noqa: SIM118  # no mapping
                kind, _, rest = key.partition(" ")
                if kind == "gram":
                    statistics.grams[rest] = file.get_tensor(key)
                    statistics.sums.setdefault(rest, {})
                else:
                    number, _, site = rest.partition(" ")
                    statistics.sums.setdefault(site, {})[int(number)] = file.get_tensor(key)
        return statistics


def fit_ridge(
    base_model: nn.Module,
    adapters: Sequence[str | Path],
    batches: Sequence[Batches],
    *,
    ridge: float = 1e-2,
    statistics: RidgeStatistics | None = None,
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
        statistics: sums of adapters before these, to which these are added in place: keep it to go
            on later. Should the model fail on a batch, they are spoilt.

    Returns:
        For each adapter, those of the statistics first, (w_e, b_e) (d_in + 1,) by site, of length
        1, for `molora.compose(gates=...)`.

    Raises:
        ValueError: an adapter can't be composed, has no batch of its own, or targets a module where
            the statistics keep nothing of the earlier data.
    """
    check_alpha("ridge", ridge)
    if len(batches) != len(adapters):
        raise ValueError(f"batches has {len(batches)} entries for {len(adapters)} adapters.")
    loras, _ = read_loras(base_model, adapters)
    given = [list(own) for own in batches]
    for lora, own in zip(loras, given, strict=True):
        if not own:
            raise ValueError(f"{lora.source!r} has no batch of its own.")
    statistics = RidgeStatistics() if statistics is None else statistics
    statistics.prepare(base_model, loras)
    with evaluating(base_model):
        for lora, own in zip(loras, given, strict=True):
            statistics.add(base_model, lora, own)
    return statistics.solve(ridge)


def _width(base_model: nn.Module, site: str) -> int:
    """d_in of a module by name."""
    found: Any = dict(base_model.named_modules()).get(site)
    width = None if found is None else _get_in_out_features(found)[0]
    if width is None:
        raise ValueError(f"sites: the model has no linear module {site!r}.")
    return width
