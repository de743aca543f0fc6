"""A router that reads what the base layer made of the input (MoV, arXiv 2309.05444)."""

from torch import Tensor

from .. import ops
from ..routing import SiteInput
from .base import register_router
from .linear import LinearRouter


@register_router("output")
class OutputRouter(LinearRouter):
    """z = W_r y (+ b) with y (T, d_out) the base layer's output, W_r (E, d_out), in fp32.

    Sites that share its decision (`router_scope`) follow the output of the first of them. The
    options are those of the linear router; `jitter` would change what other sites read, so it isn't
    among them.
    """

    reads_output = True

    def __init__(
        self,
        in_features: int,
        num_experts: int,
        *,
        bias: bool = False,
        init_std: float | None = None,
        temperature: float = 1.0,
        noise: float = 0.0,
    ) -> None:
        super().__init__(
            in_features,
            num_experts,
            bias=bias,
            init_std=init_std,
            temperature=temperature,
            noise=noise,
        )

    def compute_logits(self, inputs: SiteInput) -> Tensor:
        assert inputs.output is not None, "the layer gives the output to routers that read it"
        return ops.router_logits(inputs.output, self.weight, self.bias)
