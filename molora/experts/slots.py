"""Experts that read mixtures of a sequence's tokens and give their outputs back to all of them
(Omni-SMoLA, arXiv 2312.00968; Soft-MoA, arXiv 2402.00828)."""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..routing import Routing
from .base import Experts, SiteSpec, register_experts


class SlotExperts(Experts):
    """With C and D of the gate "soft_slots", for each sequence X (m, d_in):

        S = D^T X                  (E p, d_in) what the slots read
        Z_e = s f_e(S_e)           each expert on its own p slots
        Y += C Z                   (m, d_out)

    S is formed in fp32. All experts have one rank r and are computed together.
    """

    takes_gaussian = True
    mixes_tokens = True

    def __init__(self, spec: SiteSpec) -> None:
        super().__init__(spec)
        if len(set(self.ranks)) != 1 or self.shared_ranks or len(set(self.scaling)) != 1:
            raise ValueError(
                f"{type(self).__name__} need one rank and one scaling for all, and no shared "
                f"experts; not the ranks {list(self.ranks)} and {list(self.shared_ranks)}."
            )
        count, rank = len(self.ranks), self.ranks[0]
        self.A = nn.Parameter(torch.empty(count, rank, self.in_features))
        self.B = nn.Parameter(torch.empty(count, self.out_features, rank))

    def reset_parameters(self, init: bool | str, base_weight: Callable[[], Tensor]) -> None:
        if init == "gaussian":
            nn.init.normal_(self.A, std=1 / self.A.shape[1])
        else:
            nn.init.uniform_(self.A, -1 / math.sqrt(self.in_features), self.in_features**-0.5)
        if init is False:
            bound = 1 / math.sqrt(self.B.shape[-1])
            nn.init.uniform_(self.B, -bound, bound)
        else:
            nn.init.zeros_(self.B)

    @torch.no_grad()
    def reorder(self, order: Sequence[int]) -> None:
        for parameter in self.parameters():
            parameter.copy_(parameter[list(order)])

    def mix_tokens(self, hidden: Tensor, routing: Routing, result: Tensor) -> Tensor:
        # Of an input without a sequence, such as a pooled one, each row is one by itself.
        rows = hidden.reshape(-1, hidden.shape[-2] if hidden.dim() > 2 else 1, hidden.shape[-1])
        combine, dispatch = (
            routing.extras[name].view(*rows.shape[:2], -1) for name in ("combine", "dispatch")
        )
        with torch.autocast(hidden.device.type, enabled=False):
            slots = dispatch.mT @ self.dropout(rows).to(dispatch.dtype)  # (batch, E p, d_in)
        slots = slots.to(self.A.dtype).unflatten(1, (len(self.ranks), -1))
        outputs = self.scaling[0] * self.apply_experts(slots).flatten(1, 2)
        update = combine @ outputs.to(combine.dtype)
        return result + update.view(result.shape).to(result.dtype)

    def apply_experts(self, slots: Tensor) -> Tensor:
        """(batch, E, p, d_in) -> (batch, E, p, d_out)."""
        raise NotImplementedError


@register_experts("slot_lora")
class SlotLoraExperts(SlotExperts):
    """f_e(S) = B_e A_e S. A starts kaiming-uniform (a = sqrt(5)), B at zero."""

    def apply_experts(self, slots: Tensor) -> Tensor:
        return slots @ self.A.mT @ self.B.mT


@register_experts("slot_adapters")
class SlotAdapterExperts(SlotExperts):
    """f_e(S) = B_e gelu(A_e S + a_e) + b_e, with r features in between.

    A starts kaiming-uniform (a = sqrt(5)); B and the biases at zero.
    """

    def __init__(self, spec: SiteSpec) -> None:
        super().__init__(spec)
        self.a = nn.Parameter(torch.empty(*self.A.shape[:2]))
        self.b = nn.Parameter(torch.empty(*self.B.shape[:2]))

    def reset_parameters(self, init: bool | str, base_weight: Callable[[], Tensor]) -> None:
        super().reset_parameters(init, base_weight)
        nn.init.zeros_(self.a)
        nn.init.zeros_(self.b)

    def apply_experts(self, slots: Tensor) -> Tensor:
        inner = F.gelu(slots @ self.A.mT + self.a[:, None])
        return inner @ self.B.mT + self.b[:, None]
