"""GLIDER (UNITES-Lab/glider): PHATGOOSE's gates, and a preference of the whole request."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..routers import Router
from ..sites import Site
from .base import Gates, matrix, one_for_each, register_composer
from .phatgoose import Phatgoose
from .sources import LoraAdapter


@register_composer("glider")
class Glider(Phatgoose):
    """See `GliderRouter`; each request brings `expert_prior` (batch, E), or, with `descriptions` of
    the adapters, `request_embeddings` (batch, D) of the same encoder:

        with molora.routing_labels(model, expert_prior=prior):
            model.generate(**prompts)

    Args:
        top_k: experts of a token, 2 or more.
        temperature: of the softmax over them.
        gates: see `Phatgoose`.
        prior_scale: c, what the preference counts beside the gates.
        descriptions: (E, D) an embedding of what each adapter is for.
    """

    def __init__(
        self,
        *,
        top_k: int = 2,
        temperature: float = 1.0,
        gates: Gates | None = None,
        prior_scale: float = 100.0,
        descriptions: Tensor | None = None,
    ) -> None:
        super().__init__(top_k=top_k, temperature=temperature, gates=gates)
        self.prior_scale = prior_scale
        self.descriptions = None if descriptions is None else matrix("descriptions", descriptions)

    def check(
        self, base_model: nn.Module, adapters: Sequence[LoraAdapter], sites: Sequence[Site]
    ) -> None:
        super().check(base_model, adapters, sites)
        if self.descriptions is not None:
            one_for_each("descriptions", self.descriptions, adapters)

    def settings(self, adapters: Sequence[LoraAdapter]) -> dict[str, Any]:
        size = None if self.descriptions is None else self.descriptions.shape[1]
        settings = super().settings(adapters)
        settings["router_options"] |= {"prior_scale": self.prior_scale, "description_size": size}
        return settings

    def fill(self, router: Router, site: str, adapters: Sequence[LoraAdapter]) -> None:
        super().fill(router, site, adapters)
        if self.descriptions is not None:
            router.get_parameter("descriptions").copy_(self.descriptions)
