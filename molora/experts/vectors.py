"""Experts of one vector each, on the output of a site.

They scale it (MoV, arXiv 2309.05444, after IA3, arXiv 2205.05638) or shift it (Steer-MoE,
arXiv 2510.13558).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .base import Experts, SiteSpec, register_experts


class VectorExperts(Experts):
    """Vectors v (E + S, d_out), one for each expert, which start at zero.

    An expert has no rank and reads no input, so r must be 1 and lora_dropout 0. Sums over experts
    are formed in fp32 whatever the parameters' dtype.
    """

    def __init__(self, spec: SiteSpec) -> None:
        super().__init__(spec)
        name = type(self).__name__
        if set(self.ranks + self.shared_ranks) != {1}:
            raise ValueError(
                f"{name} are vectors, of no rank; set r=1 instead of the ranks "
                f"{list(self.ranks + self.shared_ranks)}."
            )
        if spec.dropout > 0:
            raise ValueError(
                f"{name} read no input that could be dropped; set lora_dropout=0 instead of "
                f"{spec.dropout}."
            )
        count = len(self.ranks + self.shared_ranks)
        self.vectors = nn.Parameter(torch.empty(count, self.out_features))

    def reset_parameters(self, init: bool | str, base_weight: Callable[[], Tensor]) -> None:
        if init is False:
            nn.init.normal_(self.vectors, std=0.1)
        else:
            nn.init.zeros_(self.vectors)

    def reorder(self, order: Sequence[int]) -> None:
        self.vectors.data[: len(order)] = self.vectors.data[list(order)]

    def _scaled(self) -> Tensor:
        """(E + S, d_out) each vector times its scaling, in fp32 (fp64 in fp64 models)."""
        wide = torch.promote_types(self.vectors.dtype, torch.float32)
        vectors = self.vectors.to(wide)
        if len(set(self.scaling)) == 1:
            return vectors * self.scaling[0]
        return vectors * vectors.new_tensor(self.scaling)[:, None]

    def _mixed(self, weights: Tensor | None, result: Tensor) -> Tensor:
        """(..., d_out), or (d_out,): each token's weighted sum of vectors."""
        vectors = self._scaled()
        if weights is None:
            return vectors.sum(0)
        routed = weights.shape[-1]
        with torch.autocast(result.device.type, enabled=False):
            mixed = weights.to(vectors.dtype) @ vectors[:routed] + vectors[routed:].sum(0)
        return mixed.view(result.shape)


@register_experts("scaling_vectors")
class ScalingVectorExperts(VectorExperts):
    """y = (W x + b) * (1 + sum over e of w_e s_e v_e), elementwise.

    The bias of the base layer is scaled too, as IA3 does. Where several adapters are active, each
    scales what those before it have made. No weight that is added equals it, so it isn't merged.
    """

    def forward(self, hidden: Tensor, weights: Tensor | None, result: Tensor) -> Tensor:
        return (result * (1 + self._mixed(weights, result))).to(result.dtype)


@register_experts("steering_vectors")
class SteeringVectorExperts(VectorExperts):
    """y = W x + b + g sum over e of w_e s_e v_e, with a learned number g that starts at `scale`.

    It moves a bias that the base layer may not have, so it isn't merged.
    """

    def __init__(self, spec: SiteSpec, *, scale: float = 1.0) -> None:
        super().__init__(spec)
        if scale == 0:
            raise ValueError("expert option scale=0 would leave the vectors without a gradient")
        self.start = scale
        self.scale = nn.Parameter(torch.empty(1))

    def reset_parameters(self, init: bool | str, base_weight: Callable[[], Tensor]) -> None:
        super().reset_parameters(init, base_weight)
        nn.init.constant_(self.scale, self.start)

    def forward(self, hidden: Tensor, weights: Tensor | None, result: Tensor) -> Tensor:
        vectors = self._mixed(weights, result)
        return result + (self.scale.to(vectors) * vectors).to(result.dtype)

    def outputs(self, hidden: Tensor) -> Tensor:
        vectors = self._scaled()[: len(self.ranks)]
        return (self.scale.to(vectors) * vectors).expand(hidden.shape[0], -1, -1)
