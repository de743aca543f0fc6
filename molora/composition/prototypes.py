"""What the ways to compose by a given direction of each adapter have in common."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint import check_finite
from ..routers import ROUTERS, Router
from ..sites import Site
from .base import Composer, Gates, one_for_each, top_k_settings
from .sources import LoraAdapter


class PrototypeComposer(Composer):
    """Top-k of a `PrototypeRouter` of the same name.

    A subclass implements `prototype`, or hands on `gates`, which are the prototypes then.

    Args:
        top_k: experts of a token, 2 or more.
        temperature: of the softmax over them.
        gates: for each adapter a vector by site; None for a router that needs none.

    Attributes:
        gates_from: how gates are made; None for a router that needs none.
    """

    by_module = True
    gates_from: str | None = None

    def __init__(self, top_k: int, temperature: float, gates: Gates | None = None) -> None:
        self.top_k = top_k
        self.temperature = temperature
        self.gates = gates

    def check(
        self, base_model: nn.Module, adapters: Sequence[LoraAdapter], sites: Sequence[Site]
    ) -> None:
        if self.gates_from is None:
            return
        if self.gates is None:
            raise ValueError(
                f"router={self.name!r} needs gates: a mapping of site to vector for each adapter, "
                f"which {self.gates_from} makes."
            )
        one_for_each("gates", self.gates, adapters)
        more: int = getattr(ROUTERS.get(self.name), "has_offset", False)
        for e, adapter in enumerate(adapters):
            for site, (A, _) in adapter.factors.items():
                _check_vector(e, self.gates[e], site, A.shape[1] + more, adapter.source)

    def settings(self, adapters: Sequence[LoraAdapter]) -> dict[str, Any]:
        options = {"temperature": self.temperature}
        return {
            "router": self.name,
            "router_options": options,
            **top_k_settings(self.top_k, adapters),
        }

    def prototype(self, index: int, site: str, A: Tensor, B: Tensor) -> Tensor:
        """(d_in,), or one number more for a router that `has_offset`, of an adapter at a site."""
        assert self.gates is not None, "checked"
        return self.gates[index][site]

    def fill(self, router: Router, site: str, adapters: Sequence[LoraAdapter]) -> None:
        rows = router.get_parameter("prototypes")
        for e, adapter in enumerate(adapters):
            # A row of zeros takes no part.
            found = torch.zeros_like(rows[e])
            if site in adapter.factors:
                found = self.prototype(e, site, *adapter.factors[site])
            rows[e].copy_(found)


def _check_vector(
    index: int, gates: Mapping[str, Tensor], site: str, length: int, source: str
) -> None:
    """Raise `ValueError` unless an adapter's gates have a vector of that length for a site."""
    vector = gates.get(site) if isinstance(gates, Mapping) else None
    if not isinstance(vector, Tensor):
        raise ValueError(f"gates[{index}] has no vector for {site!r}, which {source!r} adapts.")
    if tuple(vector.shape) != (length,):
        raise ValueError(
            f"gates[{index}] has the shape {tuple(vector.shape)} for {site!r}, and ({length},) is "
            "needed."
        )
    check_finite(f"gates[{index}]", {site: vector})
