"""Top-k within groups of experts (MoGE of Pangu Pro MoE, arXiv 2505.21411)."""

from torch import Tensor

from ..routing import Routing, SiteInput
from .base import Gate, register_gate, select_top_k


@register_gate("grouped_top_k")
class GroupedTopK(Gate):
    """p = softmax(z) over all experts; in each of `groups` equal groups of neighbouring experts the
    K / groups likeliest are used, w_e = p_e for them and 0 elsewhere.

    Every group does the same work for every token; among LoRA experts that is "one expert
    of each family". E and K must be multiples of `groups`.
    """

    takes_top_k = True
    at_most_top_k = True
    default_top_k = 2

    def __init__(
        self, num_experts: int, top_k: int | None, in_features: int, *, groups: int = 2
    ) -> None:
        super().__init__(num_experts, top_k, in_features)
        if not isinstance(groups, int) or groups < 1:
            raise ValueError(f"gate option groups={groups!r} must be a whole number of at least 1.")
        for name, value in (("num_experts", num_experts), ("top_k", top_k or groups)):
            if value % groups:
                raise ValueError(
                    f"gate option groups={groups}: {name}={value} must be a multiple of it."
                )
        self.groups = groups

    def forward(self, logits: Tensor, inputs: SiteInput) -> Routing:
        probs = logits.softmax(-1)
        assert self.top_k is not None
        grouped = logits.unflatten(-1, (self.groups, -1))
        selected = select_top_k(grouped, self.top_k // self.groups).flatten(-2)
        return Routing(weights=probs * selected, logits=logits, probs=probs)
