"""Load balancing of each modality over its own experts (MoIIE, arXiv 2508.09779)."""

from typing import TYPE_CHECKING

from torch import Tensor

from ..routing import Routing, SiteInput
from .base import Loss, register_loss

if TYPE_CHECKING:
    from ..experts import Experts
    from ..routers import Router


@register_loss("modality_balancing")
class ModalityBalancing(Loss):
    """L = mean over the modalities m of the batch of (E_m / k_m) * sum over e of f_me P_me: 1 when
    each modality spreads evenly over the E_m experts that it may use.

    f_me is the share of the real tokens of modality m that use expert e, P_me the mean of the
    router's probability for e over them, and k_m = sum over e of f_me. The gradient flows through P
    alone. It needs router="modality_groups".
    """

    needs = ("modality_ids",)
    needs_sparse_gate = True

    def check_fit(self, router: "Router", experts: "Experts") -> None:
        if not isinstance(getattr(router, "visible", None), Tensor):
            raise ValueError("the loss 'modality_balancing' needs router='modality_groups'.")

    def __call__(self, routing: Routing, inputs: SiteInput) -> Tensor:
        visible: Tensor = inputs.router.visible  # type: ignore[union-attr,assignment]
        assert inputs.tokens is not None, "checked"
        modality = inputs.tokens.by_token("modality_ids")
        assert modality is not None, "checked"
        probs, selected = routing.probs, routing.selected.to(routing.probs.dtype)
        total = present = probs.new_zeros(())
        for m, experts in enumerate(visible.sum(-1)):
            part = (modality == m).to(probs.dtype)[:, None]
            share = routing.token_mean(part).squeeze()
            used = routing.token_mean(part * selected) / share.clamp(min=1e-9)
            mean = routing.token_mean(part * probs) / share.clamp(min=1e-9)
            there = (share > 0).to(probs.dtype)
            total = total + there * experts / used.sum().clamp(min=1e-9) * (used * mean).sum()
            present = present + there
        return total / present.clamp(min=1)
