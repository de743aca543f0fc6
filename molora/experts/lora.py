"""Experts of two low-rank factors, stacked along the rank."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .. import ops
from .base import Experts, register_experts


@register_experts("lora")
class LoraExperts(Experts):
    """y += B G(x) A x, with A (R, d_in), B (d_out, R) and G the routing weights in rank space.

    Row block e of A and column block e of B are expert e; the shared experts come last. A starts
    kaiming-uniform (a = sqrt(5)) with the fan-in of one expert, d_in, and B at zero, as in LoRA
    (arXiv 2106.09685).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        ranks: Sequence[int],
        shared_ranks: Sequence[int],
        scaling: Sequence[float],
        dropout: float,
    ) -> None:
        super().__init__(in_features, out_features, ranks, shared_ranks, scaling, dropout)
        total_rank = sum(self.ranks) + sum(self.shared_ranks)
        self.A = nn.Parameter(torch.empty(total_rank, self.in_features))
        self.B = nn.Parameter(torch.empty(self.out_features, total_rank))
        self._rank_scaling: Tensor | None = None

    def reset_parameters(self, init: bool | str, base_weight: Callable[[], Tensor]) -> None:
        if init == "gaussian":
            for block, rank in zip(
                self._expert_rows(), self.ranks + self.shared_ranks, strict=True
            ):
                nn.init.normal_(block, std=1 / rank)
        else:
            nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        if init is False:
            nn.init.kaiming_uniform_(self.B, a=math.sqrt(5))
        else:
            nn.init.zeros_(self.B)

    def forward(self, hidden: Tensor, weights: Tensor | None, result: Tensor) -> Tensor:
        if weights is not None:
            weights = weights.unflatten(0, hidden.shape[:-1])
        return ops.routed_lora(
            self.dropout(hidden),
            self.A,
            self.B,
            weights,
            scale=self._scale(hidden.device),
            out=result,
            ranks=self.ranks,
            always_on=sum(self.shared_ranks),
        )

    def delta_weight(self, weights: Tensor | None) -> Tensor:
        gate = torch.ones(len(self.scaling), device=self.A.device, dtype=torch.float32)
        if weights is not None:
            gate[: len(self.ranks)] = weights.to(gate)
        gate = gate * torch.tensor(self.scaling, device=gate.device)
        per_rank = gate.repeat_interleave(self._ranks_tensor(gate.device))
        return (self.B.float() * per_rank) @ self.A.float()

    def _expert_rows(self) -> tuple[Tensor, ...]:
        return self.A.data.split(self.ranks + self.shared_ranks)

    def _ranks_tensor(self, device: torch.device) -> Tensor:
        return torch.tensor(self.ranks + self.shared_ranks, device=device)

    def _scale(self, device: torch.device) -> float | Tensor:
        """One number when all experts have the same scaling, else one per rank, in fp32.

        It isn't a buffer, because PEFT casts an adapter's buffers to the base model's dtype.
        """
        if len(set(self.scaling)) == 1:
            return self.scaling[0]
        if self._rank_scaling is None or self._rank_scaling.device != device:
            scaling = torch.tensor(self.scaling, device=device)
            self._rank_scaling = scaling.repeat_interleave(self._ranks_tensor(device))
        return self._rank_scaling
