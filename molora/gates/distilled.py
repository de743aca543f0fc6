"""Top-1 by a router that learns first and is frozen then (StableMoE, arXiv 2204.08396)."""

import torch
from torch import Tensor, nn

from .. import ops
from ..routing import Routing, SiteInput
from .base import Gate, register_gate, select_top_k


@register_gate("distilled")
class Distilled(Gate):
    """w_a = sigmoid(z_a) for one expert a, 0 elsewhere.

    While the router learns, a is the largest z, and the loss "distillation" teaches a second router
    z' = D P x, with P (`distilled_dim`, d_in) and D (E, `distilled_dim`), to choose alike; nothing
    of it reaches x. Once the share `freeze_after` of the training is done, P and D are fixed for
    good, and a is the largest z'. At inference it always is. W_r keeps learning through the weight.

    The fixed P and D are copies, so neither an optimizer's momentum nor its weight decay moves
    them. Training that doesn't tell `molora.after_step` its progress never fixes them; where the
    parameters are sharded (FSDP2) copying them fails.

    Args:
        distilled_dim: inner width of the second router.
        freeze_after: share of the training, in [0, 1].
    """

    takes_top_k = True
    default_top_k = 1
    fixed_top_k = 1
    constant_for_one_expert = False
    needs_loss = "distillation"
    leaves = ("distilled", "learns")

    frozen: Tensor
    fixed_down: Tensor
    fixed_up: Tensor

    def __init__(
        self,
        num_experts: int,
        top_k: int | None,
        in_features: int,
        *,
        distilled_dim: int = 50,
        freeze_after: float = 0.1,
    ) -> None:
        super().__init__(num_experts, top_k, in_features)
        if distilled_dim < 1:
            raise ValueError(f"gate option distilled_dim={distilled_dim!r} must be at least 1")
        if not 0 <= freeze_after <= 1:
            raise ValueError(f"gate option freeze_after={freeze_after!r} must be in [0, 1]")
        self.freeze_after = freeze_after
        self.down = nn.Parameter(torch.randn(distilled_dim, in_features) * in_features**-0.5)
        self.up = nn.Parameter(torch.randn(num_experts, distilled_dim) * distilled_dim**-0.5)
        self.register_buffer("frozen", torch.zeros(1, dtype=torch.bool))
        self.register_buffer("fixed_down", torch.zeros(distilled_dim, in_features))
        self.register_buffer("fixed_up", torch.zeros(num_experts, distilled_dim))

    def forward(self, logits: Tensor, inputs: SiteInput) -> Routing:
        down = torch.where(self.frozen, self.fixed_down, self.down)
        up = torch.where(self.frozen, self.fixed_up, self.up)
        inner = ops.router_logits(inputs.hidden.detach(), down, None)
        distilled = ops.router_logits(inner, up, None)
        selected = select_top_k(distilled.detach(), 1)
        if self.training:
            selected = torch.where(self.frozen, selected, select_top_k(logits.detach(), 1))
        extras = {"distilled": distilled, "learns": (~self.frozen).expand(logits.shape[0])}
        return Routing(
            weights=logits.sigmoid() * selected,
            logits=logits,
            probs=logits.softmax(-1),
            extras=extras,
        )

    @torch.no_grad()
    def after_step(self, progress: float | None) -> None:
        """Fix the second router when its time has come, once."""
        if progress is None or progress < self.freeze_after:
            return
        self.fixed_down.copy_(torch.where(self.frozen, self.fixed_down, self.down))
        self.fixed_up.copy_(torch.where(self.frozen, self.fixed_up, self.up))
        self.frozen.fill_(True)
