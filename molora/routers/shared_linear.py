"""One linear router for all layers (Omni-router, arXiv 2507.05724)."""

import math

from torch import Tensor, nn

from .. import ops
from ..routing import SiteInput
from .base import Router, register_router


@register_router("shared_linear")
class SharedLinearRouter(Router):
    """z = W_r x with one W_r (E, d_in) for the modules of one name in all layers, in fp32.

    Layers with other numbers of experts or features have one of their own. W_r starts as that of
    the "linear" router.
    """

    shared_across_sites = ("projection",)

    def __init__(
        self, in_features: int, num_experts: int, *, temperature: float = 1.0, noise: float = 0.0
    ) -> None:
        super().__init__(in_features, num_experts, temperature=temperature, noise=noise)
        self.projection = nn.Linear(in_features, num_experts, bias=False)

    def reset_parameters(self) -> None:
        nn.init.kaiming_uniform_(self.projection.weight, a=math.sqrt(5))

    @property
    def weight(self) -> Tensor:
        """W_r, for losses that read it."""
        return self.projection.weight

    def compute_logits(self, inputs: SiteInput) -> Tensor:
        return ops.router_logits(inputs.hidden, self.projection.weight, None)
