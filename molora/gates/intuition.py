"""Token probabilities mixed with a prior on the whole instance (MoR1E and T-REX,
arXiv 2404.08985)."""

import torch
from torch import Tensor, nn

from ..routing import Routing, SiteInput
from .base import Gate, register_gate

# The published code trains both scalars through this factor: they move 100 times as fast.
STEEPNESS = 100.0


@register_gate("intuition")
class Intuition(Gate):
    """w = m (v p + (1 - v) c s), p = softmax(z), m = sigmoid(100 theta), v = sigmoid(100 omega).

    theta and omega are learned scalars that start at 0, so m = v = 1/2. s (batch, E) says how much
    an instance belongs to each expert's cluster (in the paper, cosines of its embedding with E
    centroids), comes with the batch as `instance_scores`, and is the same for all of its tokens.
    Without `instance` there is no s, and w = m p.

    Args:
        instance: mix in the instance's scores.
        instance_scale: c, the scale of s relative to p's.
    """

    sparse = False
    constant_for_one_expert = False

    def __init__(
        self,
        num_experts: int,
        top_k: int | None,
        in_features: int,
        *,
        instance: bool = False,
        instance_scale: float = 0.125,
    ) -> None:
        super().__init__(num_experts, top_k, in_features)
        self.instance_scale = instance_scale
        self.theta = nn.Parameter(torch.zeros(1))
        self.omega = nn.Parameter(torch.zeros(1)) if instance else None

    def forward(self, logits: Tensor, inputs: SiteInput) -> Routing:
        probs = logits.softmax(-1)
        weights = probs
        if self.omega is not None:
            share = torch.sigmoid(STEEPNESS * self.omega.to(logits))
            prior = self.instance_scale * self._instance_scores(logits, inputs)
            weights = share * probs + (1 - share) * prior
        weights = torch.sigmoid(STEEPNESS * self.theta.to(logits)) * weights
        return Routing(weights=weights, logits=logits, probs=probs)

    def _instance_scores(self, logits: Tensor, inputs: SiteInput) -> Tensor:
        """(T, E): each token gets its instance's."""
        scores = inputs.labels.get("instance_scores")
        if scores is None:
            raise ValueError(
                "the gate 'intuition' with instance=True needs the scores of each instance: pass "
                "instance_scores (batch, E) to the model's forward, or set "
                "gate_options={'instance': False}."
            )
        if scores.shape != (inputs.shape[0], self.num_experts):
            raise ValueError(
                f"instance_scores has shape {tuple(scores.shape)}; this site needs "
                f"{(inputs.shape[0], self.num_experts)}, one score per instance and expert."
            )
        tokens = logits.shape[0] // inputs.shape[0]
        return scores.to(logits).repeat_interleave(tokens, 0, output_size=logits.shape[0])
