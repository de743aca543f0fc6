"""Experts whose factors are mixed before they are multiplied (Polytropon, arXiv 2202.13914), also
in several heads (MHR, arXiv 2211.03831)."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .base import Experts, SiteSpec, register_experts
from .start import start_down, start_up


@register_experts("factor_mixing")
class FactorMixingExperts(Experts):
    """y += s B(w) A(w) x, with the mixed factors A(w) = sum over e of w_e A_e, B(w) alike.

    It has the cross terms w_e w_f B_e A_f, so it equals the mixture of the experts' outputs only
    where one weight is 1 and the others are 0. Given the weights it is one LoRA of rank r.

    With `splits` = q, input and output features are cut into q equal blocks, and E = q S: expert
    i S + j is skill j of block i, with A_e (r, d_in / q) and B_e (d_out / q, r). A(w) is the blocks
    mixed, side by side: every block of features has a mix of its own.

    Formed token by token without the mixed factors: A_e x for all e, their mean by w, and that
    times w_e for all e, so it costs what a dense mixture costs. A (E r, d_in / q) starts
    kaiming-uniform (a = sqrt(5)) and B (d_out / q, E r) at zero.

    Args:
        splits: q, a divisor of E, d_in and d_out.
    """

    takes_gaussian = True

    def __init__(self, spec: SiteSpec, *, splits: int = 1) -> None:
        super().__init__(spec)
        # A single expert whose gate needs no router comes as a shared one.
        ranks = self.ranks or self.shared_ranks
        if (self.ranks and self.shared_ranks) or len(set(ranks)) != 1:
            raise ValueError(
                "experts='factor_mixing' need one rank for all and no shared experts, not the "
                f"ranks {list(self.ranks)} and {list(self.shared_ranks)}."
            )
        sizes = {
            "the number of experts": len(ranks),
            "the input features": self.in_features,
            "the output features": self.out_features,
        }
        for name, size in sizes.items():
            if splits < 1 or size % splits:
                raise ValueError(f"expert option splits={splits!r} must divide {name}, {size}.")
        if len(set(self.scaling)) != 1:
            raise ValueError("experts='factor_mixing' need one scaling for all experts.")
        self.splits = splits
        total = sum(ranks)
        self.A = nn.Parameter(torch.empty(total, self.in_features // splits))
        self.B = nn.Parameter(torch.empty(self.out_features // splits, total))

    def reset_parameters(self, init: bool | str, base_weight: Callable[[], Tensor]) -> None:
        start_down(self.A, init, rank=(self.ranks or self.shared_ranks)[0])
        start_up(self.B, init)

    @torch.no_grad()
    def reorder(self, order: Sequence[int]) -> None:
        ranks = self.ranks or self.shared_ranks
        self.A.copy_(torch.cat([self.A.split(ranks)[e] for e in order]))
        self.B.copy_(torch.cat([self.B.split(ranks, 1)[e] for e in order], 1))

    def forward(self, hidden: Tensor, weights: Tensor | None, result: Tensor) -> Tensor:
        A, B = self._blocks()
        if weights is None:
            weights = torch.ones(1, device=hidden.device)
        else:
            weights = weights.view(*hidden.shape[:-1], -1)
        weights = weights.unflatten(-1, (self.splits, -1))[..., None]  # (..., q, S, 1)
        x = self.dropout(hidden).to(A.dtype).unflatten(-1, (self.splits, -1))
        inner = torch.einsum("...qd,qsrd->...qsr", x, A)
        mixed = (weights * inner).sum((-3, -2), keepdim=True)  # (..., 1, 1, r), in fp32 as w is
        spread = (weights * mixed).to(B.dtype)
        update = torch.einsum("...qsr,oqsr->...qo", spread, B).flatten(-2)
        return result + (self.scaling[0] * update).to(result.dtype)

    def mixed(self, weights: Tensor | None) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(self.A.dtype, torch.float32)
        A, B = (factor.to(wide) for factor in self._blocks())
        if weights is None:
            weights = A.new_ones(1)
        weights = weights.to(A).unflatten(0, (self.splits, -1))
        down = torch.einsum("qs,qsrd->rqd", weights, A).flatten(1)
        up = torch.einsum("qs,oqsr->qor", weights, B).flatten(0, 1)
        return down, self.scaling[0] * up

    def _blocks(self) -> tuple[Tensor, Tensor]:
        """A (q, S, r, d_in / q) and B (d_out / q, q, S, r)."""
        ranks = self.ranks or self.shared_ranks
        grid = (self.splits, len(ranks) // self.splits, ranks[0])
        return self.A.unflatten(0, grid), self.B.unflatten(1, grid)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, splits={self.splits}"
