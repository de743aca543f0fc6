"""The smallest set of experts whose probabilities reach p ("Harder Tasks Need More Experts",
arXiv 2403.07652)."""

from torch import Tensor

from ..routing import Routing, SiteInput
from .base import Gate, normalize, register_gate, select_top_p


@register_gate("top_p")
class TopP(Gate):
    """Experts are added from the likeliest down until their probabilities sum to at least `p`.

    w_e = softmax(z)_e for the selected experts, 0 elsewhere; with `renormalize` they sum to 1.
    The expert that crosses `p` belongs to the set, so at least one is always selected, and of
    equal probabilities the first expert's is added first.
    """

    omits_zeros = True

    def __init__(
        self,
        num_experts: int,
        top_k: int | None,
        in_features: int,
        *,
        p: float = 0.8,
        renormalize: bool = False,
    ) -> None:
        super().__init__(num_experts, top_k, in_features)
        if not 0 < p <= 1:
            raise ValueError(f"gate option p={p!r} must be in (0, 1]")
        self.p = p
        self.renormalize = renormalize

    def forward(self, logits: Tensor, inputs: SiteInput) -> Routing:
        probs = logits.softmax(-1)
        weights = probs * select_top_p(probs, self.p)
        return Routing(
            weights=normalize(weights) if self.renormalize else weights,
            logits=logits,
            probs=probs,
        )
