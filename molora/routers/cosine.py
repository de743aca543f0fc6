"""Logits from the angle between token and expert (DynMoE, arXiv 2405.14297)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..routing import SiteInput
from .base import Router, register_router


@register_router("cosine")
class CosineRouter(Router):
    """z_e = cos(x, w_e) / temperature, in [-1, 1] / temperature whatever the lengths.

    W (E, d_in) starts with orthogonal rows (columns where E > d_in).
    """

    def __init__(
        self, in_features: int, num_experts: int, *, temperature: float = 1.0, noise: float = 0.0
    ) -> None:
        super().__init__(in_features, num_experts, temperature=temperature, noise=noise)
        self.weight = nn.Parameter(torch.empty(num_experts, in_features))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        # QR decompositions exist from fp32 on.
        self.weight.copy_(nn.init.orthogonal_(torch.empty_like(self.weight, dtype=torch.float32)))

    def compute_logits(self, inputs: SiteInput) -> Tensor:
        hidden = inputs.hidden
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        directions = F.normalize(self.weight.to(dtype), dim=-1)
        length = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True, dtype=dtype)
        return ops.router_logits(hidden, directions, None) / length.clamp(min=1e-12)
