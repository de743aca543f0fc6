"""Experts that start from segments of the base weight's spectrum (GOAT, arXiv 2502.16894)."""

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from .. import ops
from ..registry import unknown_name_message
from .base import SiteSpec, register_experts
from .factors import LoraFactors
from .lora import LoraExperts

SEGMENT_ENDS = ("first", "last")


@register_experts("svd_segments")
class SvdSegmentExperts(LoraExperts):
    """y += sum over e of (w_e s_e B_e A_e x) - (1 / E) sum over e of s_e B0_e A0_e x.

    With W = U S V^T and L = min(d_in, d_out) // E, expert e starts from r_e triplets of the e-th
    run of L: B_e = U sqrt(S / (s_e rho)), A_e = sqrt(S / (s_e rho)) V^T. B0 and A0 keep these
    values, frozen, so that weights of 1 / E leave the base model's output as it was. A token's own
    weights don't: unlike with other experts, a new adapter changes the output.

    The paper subtracts the second sum from the base weight. Here the base weight stays: disabling
    the adapter restores the model, and the base may be quantised. B0 and A0 are saved with the
    adapter; loading it with low_cpu_mem_usage=True computes no SVD.

    Args:
        eta: s_e = sqrt(3 eta d_in / r_e), the paper's scale; None for the config's scaling rule.
        rho: how much smaller than W's own the experts' singular values start.
        segment_end: the "first" (largest) or "last" triplets of each run.
    """

    takes_gaussian = False

    initial_A: Tensor
    initial_B: Tensor

    def __init__(
        self,
        spec: SiteSpec,
        *,
        eta: float | None = 1.0,
        rho: float = 10.0,
        segment_end: str = "first",
    ) -> None:
        for name, value in (("eta", eta), ("rho", rho)):
            if value is not None and not value > 0:
                raise ValueError(f"expert option {name}={value!r} must be above 0")
        if segment_end not in SEGMENT_ENDS:
            raise ValueError(
                unknown_name_message("expert option segment_end", segment_end, SEGMENT_ENDS)
            )
        if eta is not None:
            own = [math.sqrt(3 * eta * spec.in_features / rank) for rank in spec.ranks]
            spec = replace(spec, scaling=(*own, *spec.scaling[len(own) :]))
        super().__init__(spec)
        self.rho, self.segment_end = rho, segment_end
        ranks, d_in, d_out = spec.ranks, spec.in_features, spec.out_features
        self.segment = min(d_in, d_out) // max(len(ranks), 1)
        if ranks and max(ranks) > self.segment:
            raise ValueError(
                f"a weight of {d_out} x {d_in} has {self.segment} singular values for each of "
                f"{len(ranks)} experts, fewer than the rank {max(ranks)}."
            )
        self.register_buffer("initial_A", torch.zeros(sum(ranks), d_in))
        self.register_buffer("initial_B", torch.zeros(d_out, sum(ranks)))

    def reset_parameters(self, init: bool | str, base_weight: Callable[[], Tensor]) -> None:
        super().reset_parameters(init, base_weight)
        if init is False or not self.ranks or self.A.is_meta:
            return
        weight = base_weight().detach()
        U, S, Vh = torch.linalg.svd(
            weight.to(torch.promote_types(weight.dtype, torch.float32)), full_matrices=False
        )
        columns: list[int] = []
        factors: list[float] = []
        for e, rank in enumerate(self.ranks):
            start = e * self.segment + (0 if self.segment_end == "first" else self.segment - rank)
            columns += range(start, start + rank)
            factors += [1 / (self.scaling[e] * self.rho)] * rank
        root = (S[columns] * torch.tensor(factors).to(S)).sqrt()
        with torch.no_grad():
            self.initial_A.copy_(root[:, None] * Vh[columns])
            self.initial_B.copy_(U[:, columns] * root)
            self.A[: len(columns)] = self.initial_A.to(self.A)
            self.B[:, : len(columns)] = self.initial_B.to(self.B)

    def forward(self, hidden: Tensor, weights: Tensor | None, result: Tensor) -> Tensor:
        result = super().forward(hidden, weights, result)
        if not self.ranks:
            return result
        A, B = self.initial_A.to(self.A.dtype), self.initial_B.to(self.B.dtype)
        return ops.routed_lora(hidden, A, B, None, self._correction_scale(hidden), result)

    def lora_factors(self) -> LoraFactors:
        own = super().lora_factors()
        if not self.ranks:
            return own
        correction = self.initial_B.to(own.B) * self._correction_scale(own.B)
        return replace(
            own,
            A=torch.cat([own.A, self.initial_A.to(own.A)]),
            B=torch.cat([own.B, correction], dim=1),
            ranks=(*own.ranks, sum(self.ranks)),
        )

    def _correction_scale(self, like: Tensor) -> float | Tensor:
        scale = self._scale(like)
        if isinstance(scale, Tensor):
            scale = scale[: sum(self.ranks)]
        return -scale / len(self.ranks)
