"""Experts that share one of their two factors (HydraLoRA, arXiv 2404.19245; MoSLD)."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import SiteSpec, register_experts
from .lora import LoraExperts


class SharedFactorExperts(LoraExperts):
    """The factor `tied` has one block of rank r that all routed experts share.

    In training `drop_connect` zeroes each entry of that block with this probability, and divides
    the others by one minus it. Shared experts (always on) keep factors of their own.
    """

    def __init__(
        self,
        spec: SiteSpec,
        *,
        init_std: float | None = None,
        drop_connect: float = 0.0,
    ) -> None:
        if len(set(spec.ranks)) > 1:
            raise ValueError(f"experts that share a factor need one rank for all, not {spec.ranks}")
        if not 0 <= drop_connect < 1:
            raise ValueError(f"expert option drop_connect={drop_connect!r} must be in [0, 1)")
        super().__init__(spec, init_std=init_std)
        self.drop_connect = drop_connect

    def training_factors(self) -> tuple[Tensor, Tensor]:
        A, B = self.A, self.B
        if self.drop_connect == 0 or not self.ranks:
            return A, B
        own = self.ranks[0]
        if self.tied == "A":
            return torch.cat([F.dropout(A[:own], self.drop_connect), A[own:]]), B
        return A, torch.cat([F.dropout(B[:, :own], self.drop_connect), B[:, own:]], dim=1)


@register_experts("shared_a")
class SharedAExperts(SharedFactorExperts):
    """y += sum over e of w_e s B_e (A x): one A (r, d_in), and B (d_out, E r)."""

    tied = "A"


@register_experts("shared_b")
class SharedBExperts(SharedFactorExperts):
    """y += s B (sum over e of w_e A_e x): one B (d_out, r), and A (E r, d_in).

    The factors that the experts don't share, A, start at zero, and B random.
    """

    tied = "B"

    def reset_parameters(self, init: bool | str, base_weight: Callable[[], Tensor]) -> None:
        super().reset_parameters(init, base_weight)
        if init is False or not self.ranks:
            return
        own = sum(self.ranks)
        nn.init.zeros_(self.A.data[:own])
        shared = self.B.data[:, : self.ranks[0]]
        if self.init_std is not None:
            nn.init.normal_(shared, std=self.init_std)
        elif init == "gaussian":
            nn.init.normal_(shared, std=1 / self.ranks[0])
        else:
            nn.init.kaiming_uniform_(shared, a=math.sqrt(5))
