"""Every expert whose probability reaches a constant (the MoLE baseline of AdaMoLE,
arXiv 2405.00361)."""

from torch import Tensor

from ..routing import Routing, SiteInput
from .base import Gate, normalize, register_gate, select_top_k


@register_gate("threshold")
class Threshold(Gate):
    """w_e = softmax(z)_e where it is at least `threshold`, 0 elsewhere, summing to 1 if
    `renormalize`; of more than `most` such experts those alone that are likeliest.

    The default threshold is 1/E, which the likeliest expert always reaches. With a higher one a
    token may select no expert at all: its output is then the base layer's.
    """

    def __init__(
        self,
        num_experts: int,
        top_k: int | None,
        in_features: int,
        *,
        threshold: float | None = None,
        renormalize: bool = True,
        most: int | None = None,
    ) -> None:
        super().__init__(num_experts, top_k, in_features)
        if threshold is not None and not 0 <= threshold <= 1:
            raise ValueError(f"gate option threshold={threshold!r} must be in [0, 1]")
        if renormalize and threshold is not None and threshold >= 0.5:
            raise ValueError(
                f"gate option threshold={threshold!r} lets at most one expert in, whose weight "
                "renormalize=True makes 1: the router would get no gradient from the task. Set "
                "renormalize=False, or a threshold below 0.5"
            )
        if most is not None and most < 2:
            raise ValueError(f"gate option most={most!r} must be at least 2, or None")
        self.threshold = threshold
        self.most = most
        self.renormalize = renormalize

    def forward(self, logits: Tensor, inputs: SiteInput) -> Routing:
        probs = logits.softmax(-1)
        if self.threshold is None:
            # Equal probabilities may all round to just below 1/E: the largest always counts.
            reached = (probs * self.num_experts >= 1) | (probs == probs.amax(-1, keepdim=True))
        else:
            reached = probs >= self.threshold
        if self.most is not None:
            reached = reached & select_top_k(probs, self.most)
        weights = probs * reached
        return Routing(
            weights=normalize(weights) if self.renormalize else weights,
            logits=logits,
            probs=probs,
        )
