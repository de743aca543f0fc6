"""What the ways to compose by a given direction of each adapter have in common."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..routers import Router
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
        self, base_model: nn.Module, adapters: Sequence[LoraAdapter], sites: Sequence[str]
    ) -> None:
        if self.gates_from is None:
            return
        if self.gates is None:
            raise ValueError(
                f"router={self.name!r} needs gates: a mapping of site to vector for each adapter, "
                f"which {self.gates_from} makes."
            )
        one_for_each("gates", self.gates, adapters)
        for e, adapter in enumerate(adapters):
            missing = [site for site in adapter.factors if site not in self.gates[e]]
            if missing:
                raise ValueError(
                    f"gates[{e}] has no vector for {missing[0]!r}, which {adapter.source!r} adapts."
                )

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
