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
        fingerprint: of the experts that it was fitted to; None if it goes with any.
    """

    exact: bool
    source: str
    weights: Tensor | None = None
    factors: tuple[Tensor, Tensor] | None = None
    fingerprint: Tensor | None = None

    def low_rank(self, experts: Experts) -> tuple[Tensor, Tensor]:
        """A (q, d_in) and B (d_out, q), in fp32 (fp64 in fp64 models), whose product is the map.

        Raises:
            ValueError: the experts are no longer those that it was fitted to, or aren't linear.
        """
        if self.fingerprint is not None:
            self._check(experts.lora_factors())
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

    def _check(self, experts: LoraFactors) -> None:
        if self.fingerprint is None:
            return
        now = fingerprint(experts)
        if not torch.allclose(now, self.fingerprint, rtol=1e-9, atol=0):
            raise ValueError(
                "the experts have changed since they were calibrated, by training, loading or a "
                "change of dtype; run molora.calibrate again."
            )


@torch.no_grad()
def fingerprint(experts: LoraFactors) -> Tensor:
    """(2,) fp64 numbers that training the experts changes, and moving or copying them doesn't."""
    return torch.stack([factor.double().square().sum() for factor in (experts.A, experts.B)]).cpu()
