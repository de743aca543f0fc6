"""What stands in for a site's routing where nothing may depend on the token."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .experts import Experts
from .experts.factors import LoraFactors


@dataclass(frozen=True)
class StaticMixture:
    """A linear map in place of one site's routed experts: the thing that is merged and exported.

    Attributes:
        exact: it equals the adapter for every input that the adapter is meant for.
        source: where it comes from, in words that a warning or a model card can quote.
        weights: (E,) routing weights held fixed, or (E + S,) where the gate weighs the S shared
            experts too; None where nothing is routed.
        factors: (A (q, d_in), B (d_out, q)) instead of the experts; None to mix these.
        fingerprint: of the experts that it was made for; None if it goes with any.
        built_in: it follows from the configuration; else somebody has set it, and it is saved.
    """

    exact: bool
    source: str
    weights: Tensor | None = None
    factors: tuple[Tensor, Tensor] | None = None
    fingerprint: Tensor | None = None
    built_in: bool = False

    def low_rank(self, experts: Experts) -> tuple[Tensor, Tensor]:
        """A (q, d_in) and B (d_out, q), in fp32 (fp64 in fp64 models), whose product is the map.

        Raises:
            ValueError: the experts are no longer those that it was made for, or aren't linear.
        """
        if not self.fits(experts):
            raise ValueError(
                f"the experts have changed since this was held in their routing's place: "
                f"{self.source}. Training, loading or a change of dtype does that; run "
                "molora.calibrate or molora.fix_routing again."
            )
        if self.factors is None:
            return experts.mixed(self.weights)
        A, B = self.factors
        own = experts.lora_factors()
        return A.to(own.A), B.to(own.B)

    def delta_weight(self, experts: Experts) -> Tensor:
        """(d_out, d_in) what it adds to the base weight; errors as `low_rank`."""
        A, B = self.low_rank(experts)
        return B @ A

    def forward(self, experts: Experts, x: Tensor, result: Tensor) -> Tensor:
        """`result` (..., d_out) plus what it makes of the tokens x (..., d_in)."""
        if self.factors is None:
            weights = self.weights
            if weights is not None:
                weights = weights.to(x.device, torch.promote_types(x.dtype, torch.float32))
                weights = weights.expand(x.numel() // x.shape[-1], -1).contiguous()
            return experts(x, weights, result)
        A, B = (factor.to(x) for factor in self.factors)
        return result + (x @ A.mT @ B.mT).to(result.dtype)

    def fits(self, experts: Experts) -> bool:
        """Whether the experts are still those that it was made for."""
        if self.fingerprint is None:
            return True
        return torch.allclose(fingerprint(experts), self.fingerprint, rtol=1e-9, atol=0)


@torch.no_grad()
def fingerprint(experts: Experts | LoraFactors) -> Tensor:
    """(2,) fp64 numbers that training the experts changes, and moving or copying them doesn't."""
    if isinstance(experts, Experts):
        experts = experts.lora_factors()
    return torch.stack([factor.double().square().sum() for factor in (experts.A, experts.B)]).cpu()
