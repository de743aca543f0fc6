"""Sigmoids normalised within groups (Polytropon, arXiv 2202.13914; MHR, arXiv 2211.03831)."""

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from ..routing import Routing, SiteInput
from .base import Gate, register_gate

if TYPE_CHECKING:
    from ..experts import Experts
    from ..routers import Router


@register_gate("grouped_sigmoid")
class GroupedSigmoid(Gate):
    """w_e = sigmoid(z_e) / sum of sigmoid(z) over e's group, all experts used.

    The groups are `groups` equal blocks of neighbouring experts, and the weights of each sum to 1.
    They are formed from log sigmoid(z), so that they do so also where every sigmoid underflows. The
    probabilities of the record are w / groups.

    Args:
        groups: a divisor of E; for experts="factor_mixing" their `splits`.
    """

    sparse = False

    def __init__(
        self, num_experts: int, top_k: int | None, in_features: int, *, groups: int = 1
    ) -> None:
        super().__init__(num_experts, top_k, in_features)
        if groups < 1 or num_experts % groups:
            raise ValueError(
                f"gate option groups={groups!r} must divide the number of experts, {num_experts}."
            )
        self.groups = groups

    def check_fit(self, router: "Router", experts: "Experts") -> None:
        splits = getattr(experts, "splits", self.groups)
        if splits != self.groups:
            raise ValueError(
                f"the gate 'grouped_sigmoid' normalises in {self.groups} groups, but the experts "
                f"are cut into {splits} splits; set gate_options={{'groups': {splits}}}."
            )

    def forward(self, logits: Tensor, inputs: SiteInput) -> Routing:
        scores = F.logsigmoid(logits).unflatten(-1, (self.groups, -1))
        weights = scores.softmax(-1).flatten(-2)
        return Routing(weights=weights, logits=logits, probs=weights / self.groups)
