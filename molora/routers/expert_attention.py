"""Experts that attend to one another before they are weighed (HotMoE, AAAI 2026)."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import ops
from ..routing import SiteInput
from .base import Router, register_router


@register_router("expert_attention")
class ExpertAttentionRouter(Router):
    """z = S v with v = W_v x + b_v and S = softmax(Q K^T / sqrt(a)) (E, E), row by row.

    Each expert has a vector, c_e (m,); LN normalises all of them together, over (E, m), with a
    weight and a bias of that shape. K = LN(c) W_k^T. In the lower layers the experts ask one
    another, Q = LN(c) W_q^T. From the share `tokens_from` of the layers on, the token asks:
    Q = LN(U relu(D x + b_D) + b_U) W_q^T, with D of `inner` rows and U (E, m, inner).

    Everything starts as torch's linear and embedding layers do, in fp32.

    Args:
        in_features: see `Router`.
        num_experts: see `Router`.
        depth: the share of the model's layers that ends with the site's, in (0, 1].
        vector_dim: m.
        attention_dim: a.
        inner: of the map from the token to its queries.
        tokens_from: layers whose depth is above it let tokens ask.
        temperature: see `Router`.
        noise: see `Router`.
    """

    reads_depth = True

    def __init__(
        self,
        in_features: int,
        num_experts: int,
        depth: float = 1.0,
        *,
        vector_dim: int = 256,
        attention_dim: int = 256,
        inner: int = 4,
        tokens_from: float = 0.5,
        temperature: float = 1.0,
        noise: float = 0.0,
    ) -> None:
        super().__init__(in_features, num_experts, temperature=temperature, noise=noise)
        sizes = {"vector_dim": vector_dim, "attention_dim": attention_dim, "inner": inner}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"router option {name}={size!r} must be at least 1")
        if not 0 <= tokens_from <= 1:
            raise ValueError(f"router option tokens_from={tokens_from!r} must be in [0, 1]")
        self.vectors = nn.Parameter(torch.empty(num_experts, vector_dim))
        self.norm_weight = nn.Parameter(torch.empty(num_experts, vector_dim))
        self.norm_bias = nn.Parameter(torch.empty(num_experts, vector_dim))
        self.value = nn.Parameter(torch.empty(num_experts, in_features))
        self.value_bias = nn.Parameter(torch.empty(num_experts))
        self.query = nn.Parameter(torch.empty(attention_dim, vector_dim))
        self.key = nn.Parameter(torch.empty(attention_dim, vector_dim))
        self.tokens_ask = depth > tokens_from
        if self.tokens_ask:
            self.down = nn.Parameter(torch.empty(inner, in_features))
            self.down_bias = nn.Parameter(torch.empty(inner))
            self.up = nn.Parameter(torch.empty(num_experts, vector_dim, inner))
            self.up_bias = nn.Parameter(torch.empty(num_experts, vector_dim))

    def reset_parameters(self) -> None:
        nn.init.normal_(self.vectors)
        nn.init.ones_(self.norm_weight)
        nn.init.zeros_(self.norm_bias)
        pairs = [(self.value, self.value_bias), (self.query, None), (self.key, None)]
        if self.tokens_ask:
            pairs += [(self.down, self.down_bias), (self.up, self.up_bias)]
        for weight, bias in pairs:
            bound = weight.shape[-1] ** -0.5
            nn.init.uniform_(weight, -bound, bound)
            if bias is not None:
                nn.init.uniform_(bias, -bound, bound)

    def compute_logits(self, inputs: SiteInput) -> Tensor:
        values = ops.router_logits(inputs.hidden, self.value, self.value_bias)
        dtype = values.dtype
        experts = self._normalized(self.vectors.to(dtype))
        keys = experts @ self.key.to(dtype).mT
        asking = self._of_tokens(inputs.hidden, dtype) if self.tokens_ask else experts
        queries = asking @ self.query.to(dtype).mT
        attention = (queries @ keys.mT / math.sqrt(self.key.shape[0])).softmax(-1)
        return (attention @ values[..., None]).squeeze(-1)

    def _of_tokens(self, hidden: Tensor, dtype: torch.dtype) -> Tensor:
        """(T, E, m) what each token makes of the experts' vectors."""
        inner = ops.router_logits(hidden, self.down, self.down_bias).relu()
        vectors = inner @ self.up.to(dtype).flatten(0, 1).mT
        return self._normalized(vectors.unflatten(-1, self.up_bias.shape) + self.up_bias.to(dtype))

    def _normalized(self, vectors: Tensor) -> Tensor:
        weight, bias = (p.to(vectors.dtype) for p in (self.norm_weight, self.norm_bias))
        return F.layer_norm(vectors, weight.shape, weight, bias)
