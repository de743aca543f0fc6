"""Every expert has its own threshold, and experts come and go (DynMoE, arXiv 2405.14297)."""

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..routing import Routing, SiteInput, is_recomputation
from .base import Gate, register_gate, select_top_k, sum_over_processes

if TYPE_CHECKING:
    from ..experts import Experts
    from ..routers import Router


@register_gate("expert_thresholds")
class ExpertThresholds(Gate):
    """g_e = 1 where sigmoid(z_e) > sigmoid(scale G_e), for the active experts; w = g / max(sum g,
    1).

    G (E) is learned and starts at 0. The step passes the gradient on to sigmoid(z_e) -
    sigmoid(scale G_e) where it is positive, with the number of experts in the denominator held
    fixed. In training a token may use no expert; at inference it then uses the one with the largest
    sigmoid(z_e).

    The E experts are a pool. After every `period` optimizer steps, those that no token used are
    switched off (but never all), and if some tokens had no expert, the first that is off is
    switched on: its row of the router's weight becomes the normalised sum of those tokens, its
    threshold 0. What the optimizer remembers of that row stays. It isn't done where the router's
    weight is sharded (FSDP2), which fails there.

    Args:
        scale: of the thresholds; e as the cosine router's 1 / temperature in the published code.
        initial_experts: active at the start; None is all of them.
        period: optimizer steps between changes; None never changes the number.
    """

    leaves = ("scores", "gates", "active")

    active: Tensor
    counts: Tensor
    missed: Tensor
    steps: Tensor

    def __init__(
        self,
        num_experts: int,
        top_k: int | None,
        in_features: int,
        *,
        scale: float = math.e,
        initial_experts: int | None = None,
        period: int | None = 300,
    ) -> None:
        super().__init__(num_experts, top_k, in_features)
        if not scale > 0:
            raise ValueError(f"gate option scale={scale!r} must be above 0")
        for name, value in {"initial_experts": initial_experts, "period": period}.items():
            if value is not None and value < 1:
                raise ValueError(f"gate option {name}={value!r} must be at least 1, or None")
        self.scale = scale
        self.period = period
        self.constant_for_one_expert = False
        self.thresholds = nn.Parameter(torch.zeros(num_experts))
        number = num_experts if initial_experts is None else initial_experts
        self.register_buffer("active", torch.arange(num_experts) < number)
        self.register_buffer("counts", torch.zeros(num_experts, dtype=torch.int64))
        self.register_buffer("missed", torch.zeros(in_features))
        self.register_buffer("steps", torch.zeros(1, dtype=torch.int64))
        # Not buffers: what this process has seen since the last step, and whose logits they were.
        self._seen: tuple[Tensor, Tensor] | None = None
        self._router: tuple[nn.Module, ...] = ()

    def check_fit(self, router: "Router", experts: "Experts") -> None:
        if self.period is not None and not router.has_rows(self.num_experts, len(self.missed)):
            raise ValueError(
                "the gate 'expert_thresholds' gives a new expert its row of the router's weight: "
                "use router='cosine' or 'linear', or gate_options={'period': None}."
            )

    def forward(self, logits: Tensor, inputs: SiteInput) -> Routing:
        scores = logits.sigmoid() * self.active
        margin = torch.relu(scores - (self.scale * self.thresholds.to(logits)).sigmoid())
        used = margin > 0
        gates = used.to(logits.dtype) + (margin - margin.detach())
        weights = gates / used.sum(-1, keepdim=True).clamp(min=1)
        if not self.training:
            best = select_top_k(scores.detach().masked_fill(~self.active, -1.0), 1)
            weights = torch.where(used.any(-1, keepdim=True), weights, best.to(logits.dtype))
        elif self.period is not None and not is_recomputation():
            self._count(used, logits.dtype, inputs)
        probs = F.logsigmoid(logits).masked_fill(~self.active, -torch.inf).softmax(-1)
        extras = {"scores": scores, "gates": gates, "active": self.active.expand_as(used)}
        return Routing(weights=weights, logits=logits, probs=probs, extras=extras)

    def _count(self, used: Tensor, dtype: torch.dtype, inputs: SiteInput) -> None:
        """Add up who was used, and the tokens that nobody took."""
        assert inputs.router is not None, "the layer passes its router to the gate"
        missed = ~used.any(-1)
        if inputs.mask is not None:
            used, missed = used & inputs.mask[:, None], missed & inputs.mask
        hidden = inputs.hidden.detach().to(dtype)
        seen = used.sum(0), missed.to(dtype) @ hidden
        if self._seen is not None:
            seen = self._seen[0] + seen[0], self._seen[1] + seen[1]
        self._seen, self._router = seen, (inputs.router,)  # in a tuple it is no submodule

    @torch.no_grad()
    def after_step(self, progress: float | None) -> None:
        """Every `period`th step: drop the idle, take one up for the tokens that had none."""
        if self.period is None or not self._router:
            return
        (router,), seen, self._seen = self._router, self._seen, None
        if seen is None:
            wide = torch.promote_types(self.missed.dtype, torch.float32)
            seen = torch.zeros_like(self.counts), torch.zeros_like(self.missed, dtype=wide)
        counts, missed = seen
        sum_over_processes(counts, missed)
        self.counts += counts
        if self.missed.dtype != missed.dtype:  # the model was cast
            self.missed = self.missed.to(missed.dtype)
        self.missed += missed
        self.steps += 1
        due = self.steps % self.period == 0  # on the device: nothing waits for it
        idle = self.active & (self.counts == 0)
        kept = self.active & ~(idle & ~idle.eq(self.active).all())
        free = ~kept
        new = due & free & (free.cumsum(0) == 1) & (self.missed != 0).any()
        self.active.copy_(torch.where(due, kept | new, self.active))
        weight: Tensor = router.weight  # type: ignore[assignment]
        direction = F.normalize(self.missed, dim=0).to(weight)
        weight.copy_(torch.where(new[:, None], direction, weight))
        self.thresholds.masked_fill_(new, 0.0)
        self.counts.masked_fill_(due, 0)
        self.missed.masked_fill_(due, 0.0)
