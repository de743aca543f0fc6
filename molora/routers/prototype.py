"""What routers by given directions have in common."""

import torch
from torch import Tensor, nn

from ..routing import SiteInput
from .base import Router

# Logit of an expert that doesn't take part: finite, as the logits of a diverged run aren't, and low
# enough that a softmax gives it exactly 0.
ABSENT = -1e30


class PrototypeRouter(Router):
    """z_e from the token and the direction of expert e, which never trains.

    A subclass implements `compare`. `prototypes` (E, d_in) start as random directions, and
    `molora.compose` sets them. An expert whose row is zero takes no part at this site: its logit is
    so low that its weight is 0 beside any other's.

    Attributes:
        has_offset: rows have one number more, their last, that is added to the logit.
    """

    frozen_parameters: tuple[str, ...] = ("prototypes",)
    has_offset = False

    def __init__(
        self, in_features: int, num_experts: int, *, temperature: float = 1.0, noise: float = 0.0
    ) -> None:
        super().__init__(in_features, num_experts, temperature=temperature, noise=noise)
        self.prototypes = nn.Parameter(torch.empty(num_experts, in_features + self.has_offset))

    def reset_parameters(self) -> None:
        nn.init.normal_(self.prototypes, std=self.in_features**-0.5)

    def compare(self, hidden: Tensor, prototypes: Tensor) -> Tensor:
        """(T, d_in) and (E, d_in), the latter in fp32 (fp64 in fp64 models), to (T, E) logits."""
        raise NotImplementedError

    def compute_logits(self, inputs: SiteInput) -> Tensor:
        dtype = torch.promote_types(inputs.hidden.dtype, torch.float32)
        prototypes = self.prototypes.to(dtype)
        absent = (prototypes == 0).all(-1)
        return self.compare(inputs.hidden, prototypes).masked_fill(absent, ABSENT)
