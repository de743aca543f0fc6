"""The linear router of nearly all published mixtures."""

import math

import torch
from torch import Tensor, nn

from .. import ops
from ..routing import SiteInput
from .base import Router, register_router


@register_router("linear")
class LinearRouter(Router):
    """z = W_r x (+ b), computed in fp32 whatever the parameters' dtype.

    W_r (E, d_in) starts as kaiming-uniform with a = sqrt(5), the initialisation of `nn.Linear`
    that MoLA, LoRAMoE and HydraLoRA use; with `init_std` it is normal with that deviation (MixLoRA:
    0.02). It never starts at zero: experts that share B = 0 and equal routing weights would stay
    equal for ever. In training, `jitter` multiplies each input feature by a draw from
    U(1 - jitter, 1 + jitter) (Switch Transformer, arXiv 2101.03961).
    """

    def __init__(
        self,
        in_features: int,
        num_experts: int,
        *,
        bias: bool = False,
        init_std: float | None = None,
        temperature: float = 1.0,
        noise: float = 0.0,
        jitter: float = 0.0,
    ) -> None:
        super().__init__(in_features, num_experts, temperature=temperature, noise=noise)
        if not 0 <= jitter < 1:
            raise ValueError(f"router option jitter={jitter!r} must be in [0, 1)")
        self.jitter = jitter
        if init_std is not None and not init_std > 0:
            raise ValueError(f"router option init_std={init_std!r} must be above 0")
        self.init_std = init_std
        self.weight = nn.Parameter(torch.empty(num_experts, in_features))
        self.bias = nn.Parameter(torch.empty(num_experts)) if bias else None

    def reset_parameters(self) -> None:
        if self.init_std is None:
            nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        else:
            nn.init.normal_(self.weight, std=self.init_std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def compute_logits(self, inputs: SiteInput) -> Tensor:
        hidden = inputs.hidden
        if self.training and self.jitter > 0:
            # In bf16 a factor near 1 comes in steps of 1/128: as much as the usual jitter of 0.01.
            hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
            hidden = hidden * torch.empty_like(hidden).uniform_(1 - self.jitter, 1 + self.jitter)
        return ops.router_logits(hidden, self.weight, self.bias)

    def logits_of_token(self, hidden: Tensor) -> list[float] | None:
        weight, bias = self.weight, self.bias
        if weight.dtype != hidden.dtype:
            return None
        logits = torch.mv(weight, hidden) if bias is None else torch.addmv(bias, weight, hidden)
        if self.temperature != 1.0:
            logits = logits / self.temperature
        return logits.tolist()
