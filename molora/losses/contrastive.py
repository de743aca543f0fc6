"""Outputs of one expert alike, those of different experts apart (MoELoRA, arXiv 2402.12851)."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..routing import Routing, SiteInput
from .base import Loss, register_loss, sample_tokens

if TYPE_CHECKING:
    from ..experts import Experts
    from ..routers import Router


@register_loss("contrastive")
class Contrastive(Loss):
    """L = mean over pairs i of -log(sum over i+ of exp(s_i,i+) / sum over j of exp(s_i,j)).

    A pair is a token and an expert that it uses, h its output B_e A_e x scaled to length 1, and
    s_i,j = h_i h_j / temperature; i+ are the other pairs with i's expert, j all others. A pair with
    an output of (nearly) zero has no direction and is left out: with B = 0 the loss is 0 and has no
    gradient. Where B is small the gradient is large, as that of a direction is; clip gradients.

    Unverified: the paper's own formula and its settings were not available; this is the usual
    contrastive loss of what its abstract says.

    Args:
        temperature: of the similarities.
        max_tokens: take so many of the real tokens, drawn at random: the cost grows with the square
            of max_tokens * E.
        min_norm: outputs shorter than this are left out.
    """

    needs_sparse_gate = True
    draws = True

    def __init__(
        self, *, temperature: float = 0.1, max_tokens: int = 64, min_norm: float = 1e-6
    ) -> None:
        for name, value in {"temperature": temperature, "min_norm": min_norm}.items():
            if not value > 0:
                raise ValueError(f"loss option {name}={value!r} must be above 0")
        if max_tokens < 2:
            raise ValueError(f"loss option max_tokens={max_tokens!r} must be at least 2")
        self.temperature = temperature
        self.max_tokens = max_tokens
        self.min_norm = min_norm

    def check_fit(self, router: "Router", experts: "Experts") -> None:
        experts.outputs(torch.empty(1, experts.in_features))  # or the refusal of what has none

    def __call__(self, routing: Routing, inputs: SiteInput) -> Tensor:
        assert inputs.experts is not None
        tokens = sample_tokens(routing, self.max_tokens)
        outputs = inputs.experts.outputs(inputs.hidden[tokens]).to(routing.weights.dtype)
        used = routing.selected[tokens]  # (M, E)
        if routing.mask is not None:
            used = used & routing.mask[tokens, None]
        length = outputs.detach().norm(dim=-1)
        used = (used & (length > self.min_norm)).flatten()
        # Masked before the division: the gradient of 0 / 0 would be NaN even where it is unused.
        outputs = outputs.flatten(0, 1).masked_fill(~used[:, None], 0.0)
        squares = outputs.square().sum(-1, keepdim=True)
        h = outputs * squares.masked_fill(~used[:, None], 1.0).rsqrt()
        others = used[:, None] & used & ~torch.eye(len(h), dtype=torch.bool, device=h.device)
        expert = torch.arange(len(h), device=h.device) % routing.num_experts
        same = others & (expert[:, None] == expert)
        similarity = h @ h.mT / self.temperature
        counted = same.any(-1)
        # Rows without a positive would be -inf - -inf.
        rows = counted[:, None]
        numerator = similarity.masked_fill(~same & rows, -torch.inf).logsumexp(-1)
        denominator = similarity.masked_fill(~others & rows, -torch.inf).logsumexp(-1)
        terms = (denominator - numerator).masked_fill(~counted, 0.0)
        return terms.sum() / counted.sum().clamp(min=1)
