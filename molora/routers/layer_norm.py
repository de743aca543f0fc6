"""Logits of the mean of a prompt, both sides normalised (SMEAR, arXiv 2306.03745)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..routing import SiteInput
from .base import register_router
from .sequence import SequenceRouter


@register_router("layer_norm")
class LayerNormRouter(SequenceRouter):
    """z_e = (a * n(v)) . (c * n(w_e)) + b_e, v the mean of a site's inputs over the prompt.

    n takes off the mean over the d_in features and divides by their standard deviation (layer norm,
    eps 1e-5); a starts at 1, c at `scale`, b at 0, the w_e as N(0, 0.01^2).
    """

    def __init__(
        self,
        in_features: int,
        num_experts: int,
        *,
        scale: float = 1e-2,
        pool: str = "prompt",
        temperature: float = 1.0,
        noise: float = 0.0,
    ) -> None:
        super().__init__(in_features, num_experts, pool=pool, temperature=temperature, noise=noise)
        if not scale > 0:
            raise ValueError(f"router option scale={scale!r} must be above 0")
        self.scale = scale
        self.weight = nn.Parameter(torch.empty(num_experts, in_features))
        self.bias = nn.Parameter(torch.empty(num_experts))
        self.input_scale = nn.Parameter(torch.empty(in_features))
        self.weight_scale = nn.Parameter(torch.empty(in_features))

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.01)
        nn.init.zeros_(self.bias)
        nn.init.ones_(self.input_scale)
        nn.init.constant_(self.weight_scale, self.scale)

    def compute_logits(self, inputs: SiteInput) -> Tensor:
        """(N, E); see `SequenceRouter`."""
        pooled = self.mean(inputs.hidden, inputs)
        dtype, shape = pooled.dtype, (self.in_features,)
        pooled = F.layer_norm(pooled, shape, self.input_scale.to(dtype))
        weight = F.layer_norm(self.weight.to(dtype), shape, self.weight_scale.to(dtype))
        return ops.router_logits(pooled, weight, self.bias)
