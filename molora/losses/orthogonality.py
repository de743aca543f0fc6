"""Experts that add different things: outputs (arXiv 2505.22323) or factors at right angles."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..registry import unknown_name_message
from ..routing import Routing, SiteInput
from .base import Loss, register_loss, sample_tokens

if TYPE_CHECKING:
    from ..experts import Experts
    from ..routers import Router

SUBJECTS = ("outputs", "down_factor")


@register_loss("orthogonality")
class Orthogonality(Loss):
    """of="outputs": L = token mean of the sum over j != k of |projection of u_j on u_k|^2, over the
    experts that the token uses, u_j = s B_j A_j x. of="down_factor": L = sum over i < j of
    |A_i A_j^T|_F^2, whatever the tokens.

    Both are 0 when all are at right angles. With B = 0 the first is 0 and has no gradient. It also
    falls with the size of u; `normalize` compares directions: the mean of cos^2 over the pairs, in
    [0, 1], for outputs, and factors scaled to |A_i|_F = 1 otherwise.

    Published for the outputs: their sum over tokens, T times this, beside a loss that spreads the
    probabilities. Unverified: the coefficient, and the form for the factors (as O-LoRA's, arXiv
    2310.14152, which compares the tasks of a sequence).

    Args:
        of: "outputs" or "down_factor".
        normalize: see above.
        max_tokens: for the outputs, take so many of the real tokens, drawn at random: E d_out
            numbers are formed for each.
        eps: added to |u_k|^2 under the fraction.
    """

    def __init__(
        self,
        *,
        of: str = "outputs",
        normalize: bool = False,
        max_tokens: int = 64,
        eps: float = 1e-8,
    ) -> None:
        if of not in SUBJECTS:
            raise ValueError(unknown_name_message("loss option of", of, SUBJECTS))
        if max_tokens < 1:
            raise ValueError(f"loss option max_tokens={max_tokens!r} must be at least 1")
        if not eps > 0:
            raise ValueError(f"loss option eps={eps!r} must be above 0")
        self.of = of
        self.draws = of == "outputs"
        self.normalize = normalize
        self.max_tokens = max_tokens
        self.eps = eps

    def check_fit(self, router: "Router", experts: "Experts") -> None:
        if self.of == "outputs":  # or the refusal of experts that have none
            experts.outputs(torch.empty(1, experts.in_features))
        else:
            experts.down_factor()

    def __call__(self, routing: Routing, inputs: SiteInput) -> Tensor:
        assert inputs.experts is not None
        if self.of == "outputs":
            return self._of_outputs(routing, inputs)
        factor = inputs.experts.down_factor().to(routing.probs.dtype)
        blocks = factor.split(inputs.experts.ranks)
        if self.normalize:
            blocks = tuple(a / torch.linalg.vector_norm(a).clamp(min=1e-12) for a in blocks)
        total, later = factor.new_zeros(()), torch.cat(blocks)
        for a in blocks:
            later = later[len(a) :]
            total = total + (a @ later.mT).square().sum()
        return total

    def _of_outputs(self, routing: Routing, inputs: SiteInput) -> Tensor:
        assert inputs.experts is not None
        tokens = sample_tokens(routing, self.max_tokens)
        outputs = inputs.experts.outputs(inputs.hidden[tokens]).to(routing.weights.dtype)
        used = routing.selected[tokens]  # (M, E)
        real = used.new_ones(len(tokens)) if routing.mask is None else routing.mask[tokens]
        products = outputs @ outputs.mT  # (M, E, E)
        squares = products.diagonal(dim1=-2, dim2=-1)
        pairs = used[:, :, None] & used[:, None, :] & real[:, None, None]
        pairs = pairs & ~torch.eye(routing.num_experts, dtype=torch.bool, device=pairs.device)
        projected = products.square() / (squares[:, None, :] + self.eps)
        if not self.normalize:
            return (projected * pairs).sum() / real.sum().clamp(min=1)
        cosines = projected / (squares[:, :, None] + self.eps)
        return (cosines * pairs).sum() / pairs.sum().clamp(min=1)
