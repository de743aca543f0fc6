"""Sparsegen with a sparsity that depends on the token (LD-MoLE, arXiv 2509.25684)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..routing import Routing, SiteInput
from .base import Gate, register_gate


@register_gate("sparsegen")
class Sparsegen(Gate):
    """w_e = max(z_e - tau, 0) / (1 - lambda), which sums to 1 and is zero for the weak experts.

    w is the point of the simplex that minimises |w - z|^2 - lambda |w|^2 (arXiv 1810.03522): from
    lambda -> 1, one expert, to lambda -> -inf, all alike. The threshold tau follows in closed form
    from the sorted logits, and the gradient flows through it. Per token,

        lambda = log sigmoid(v relu(V x + c) + c_0) + 1 - eps,    below 1 - eps.

    The record's probabilities are the weights themselves, as in the paper's balance loss; lambda is
    in its extras under "sparsity".

    Args:
        hidden_size: rows of V.
        eps: keeps lambda away from 1.
        bias: at which c_0 starts; a lower one spreads tokens over more experts. c starts at 0.
    """

    leaves = ("sparsity",)

    def __init__(
        self,
        num_experts: int,
        top_k: int | None,
        in_features: int,
        *,
        hidden_size: int = 256,
        eps: float = 1e-2,
        bias: float = -2.5,
    ) -> None:
        super().__init__(num_experts, top_k, in_features)
        if hidden_size < 1:
            raise ValueError(f"gate option hidden_size={hidden_size!r} must be at least 1")
        if not 0 < eps < 1:
            raise ValueError(f"gate option eps={eps!r} must be in (0, 1)")
        self.eps = eps
        self.weight_1 = nn.Parameter(torch.empty(hidden_size, in_features))
        self.bias_1 = nn.Parameter(torch.zeros(hidden_size))
        self.weight_2 = nn.Parameter(torch.empty(1, hidden_size))
        self.bias_2 = nn.Parameter(torch.full((1,), float(bias)))
        for weight in (self.weight_1, self.weight_2):
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5))

    def forward(self, logits: Tensor, inputs: SiteInput) -> Routing:
        sparsity = self._sparsity(inputs.hidden).to(logits.dtype)
        slack = 1 - sparsity[:, None]  # (T, 1)
        ordered = torch.sort(logits, dim=-1, descending=True, stable=True).values
        totals = ordered.cumsum(-1)
        counts = torch.arange(1, self.num_experts + 1, device=logits.device)
        # The support is a prefix of the sorted experts: its size is the number of those that hold.
        size = (slack + counts * ordered > totals).sum(-1, keepdim=True).clamp(min=1)
        threshold = (totals.gather(-1, size - 1) - slack) / size
        weights = (logits - threshold).clamp(min=0) / slack
        return Routing(weights=weights, logits=logits, probs=weights, extras={"sparsity": sparsity})

    def _sparsity(self, hidden: Tensor) -> Tensor:
        """(T,) lambda, in fp32 (fp64 in fp64 models)."""
        inner = F.relu(ops.router_logits(hidden, self.weight_1, self.bias_1))
        score = ops.router_logits(inner, self.weight_2, self.bias_2)
        return F.logsigmoid(score.squeeze(-1)) + (1 - self.eps)
