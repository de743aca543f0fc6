"""Top-k among experts and null experts, which do nothing (AdaMoE, arXiv 2406.13233)."""

from torch import Tensor

from ..routing import Routing, SiteInput
from .base import Gate, normalize, register_gate, select_top_k


@register_gate("null_experts")
class NullExperts(Gate):
    """The router gives E + N logits; a token selects the K largest of them.

    w_e = p_e / sum over the selected real experts, for those experts; a null expert only takes up
    one of the K choices. A token that selects nothing but null experts gets the base layer's
    output. The last N logits are those of the null experts; the record's probabilities are over the
    real experts, and its extras hold "null_selected" (T,), how many of the K choices went to null
    experts.
    """

    takes_top_k = True
    at_most_top_k = True
    default_top_k = 2
    needs_two_active = True
    constant_for_one_expert = False
    leaves = ("null_selected",)

    def __init__(
        self,
        num_experts: int,
        top_k: int | None,
        in_features: int,
        *,
        num_null: int = 4,
    ) -> None:
        super().__init__(num_experts, top_k, in_features)
        if num_null < 0:
            raise ValueError(f"gate option num_null={num_null!r} must not be negative")
        self.num_null = num_null

    @property
    def num_logits(self) -> int:
        return self.num_experts + self.num_null

    def forward(self, logits: Tensor, inputs: SiteInput) -> Routing:
        assert self.top_k is not None
        selected, null = select_top_k(logits, self.top_k).split(
            [self.num_experts, self.num_null], -1
        )
        probs = logits[:, : self.num_experts].softmax(-1)
        return Routing(
            weights=normalize(probs * selected),
            logits=logits,
            probs=probs,
            extras={"null_selected": null.sum(-1)},
        )
