"""Experts that form a tree of low-rank residuals (S'MoRE, arXiv 2504.06426)."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..registry import unknown_name_message
from .base import Experts, SiteSpec, register_experts

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "identity": lambda values: values,
}


@register_experts("residual_tree")
class ResidualTreeExperts(Experts):
    """y += P x_L + b_P, where x_L is gathered from the leaves of a tree of L layers to its root.

    Layer l, counted from the leaves, has s residuals of rank r, and

        x_{l+1}^i = sum over n of w_{i,n} phi( s_n (B_l^n (A_l^n x + a) + b) + W_l x_l^n + c )

    with no W at the leaves, x_l of l s r features, and one sum for each i, the node above. A routed
    expert is a path from the root to a leaf, so E = s^L, and its weight is the product of the
    weights w along it: the expert of the path (n_{L-1}, ..., n_0) has the number whose digits to
    the base s these are. From any weights of paths the w follow: those below the root as shares of
    what reaches their node, so they sum to 1.

    All residuals of a layer are computed once for a token, whatever the number of paths. A, B and W
    start kaiming-uniform (a = sqrt(5)), the biases at zero, and so does P.

    Args:
        depth: L.
        activation: phi, "tanh", "relu" or "identity".
    """

    def __init__(self, spec: SiteSpec, *, depth: int = 2, activation: str = "tanh") -> None:
        super().__init__(spec)
        if activation not in ACTIVATIONS:
            raise ValueError(
                unknown_name_message("expert option activation", activation, ACTIVATIONS)
            )
        # A single expert whose gate needs no router comes as a shared one.
        ranks = self.ranks or self.shared_ranks
        if (self.ranks and self.shared_ranks) or len(set(ranks)) != 1:
            raise ValueError(
                "experts='residual_tree' need one rank for all and no shared experts, not the "
                f"ranks {list(self.ranks)} and {list(self.shared_ranks)}."
            )
        if len(set(self.scaling)) != 1:
            raise ValueError("experts='residual_tree' need one scaling for all experts.")
        self.depth, self.branches = depth, branches_of(len(ranks), depth)
        self.activation = activation
        s, r, d_in = self.branches, ranks[0], self.in_features
        sizes = [s * r * level for level in range(depth + 1)]
        self.A = nn.Parameter(torch.empty(depth, s * r, d_in))
        self.a = nn.Parameter(torch.empty(depth, s * r))
        self.B = nn.ParameterList(torch.empty(s, size, r) for size in sizes[1:])
        self.b = nn.ParameterList(torch.empty(s, size) for size in sizes[1:])
        self.W = nn.ParameterList(
            torch.empty(above, below) for below, above in zip(sizes[1:], sizes[2:], strict=False)
        )
        self.c = nn.ParameterList(torch.empty(size) for size in sizes[2:])
        self.P = nn.Parameter(torch.empty(self.out_features, sizes[-1]))
        self.p = nn.Parameter(torch.empty(self.out_features))

    def reset_parameters(self, init: bool | str, base_weight: Callable[[], Tensor]) -> None:
        for factor in (self.A, *self.B, *self.W):
            bound = 1 / math.sqrt(factor.shape[-1])
            nn.init.uniform_(factor, -bound, bound)
        for bias in (self.a, *self.b, *self.c, self.p):
            nn.init.zeros_(bias)
        if init is False:
            nn.init.kaiming_uniform_(self.P, a=math.sqrt(5))
        else:
            nn.init.zeros_(self.P)

    def forward(self, hidden: Tensor, weights: Tensor | None, result: Tensor) -> Tensor:
        x = self.dropout(hidden).to(self.A.dtype).reshape(-1, self.in_features)
        if weights is None:
            weights = x.new_ones(1, 1)
        phi, s = ACTIVATIONS[self.activation], self.branches
        down = torch.einsum("td,lud->tlu", x, self.A) + self.a  # (T, L, s r)
        gathered = None
        for level, shares in enumerate(self._shares(weights)):  # (T, s^(L - 1 - level), s)
            inner = down[:, level].unflatten(-1, (s, -1))
            own = torch.einsum("tsr,sor->tso", inner, self.B[level]) + self.b[level]
            nodes = (self.scaling[0] * own)[:, None]  # (T, 1, s, (level + 1) s r)
            if gathered is not None:
                below = gathered.unflatten(1, (-1, s)) @ self.W[level - 1].mT
                nodes = nodes + below + self.c[level - 1]
            gathered = (shares[..., None] * phi(nodes)).sum(2).to(x.dtype)
        assert gathered is not None
        update = gathered[:, 0] @ self.P.mT + self.p
        return result + update.view(result.shape).to(result.dtype)

    def _shares(self, paths: Tensor) -> list[Tensor]:
        """From the leaves to the root, (T, s^(L - 1 - l), s): each node's part of what reaches the
        node above it; at the root the weights themselves."""
        shares = []
        for _ in range(self.depth):
            grouped = paths.unflatten(-1, (-1, self.branches))
            paths = grouped.sum(-1)
            reached = paths[..., None]
            shares.append(grouped / torch.where(reached == 0, 1, reached))
        shares[-1] = grouped
        return shares


def branches_of(paths: int, depth: int) -> int:
    """s, of which the given number of paths is the power `depth`.

    Raises:
        ValueError: it is no such power.
    """
    if depth < 1:
        raise ValueError(f"expert option depth={depth!r} must be at least 1")
    branches = round(paths ** (1 / depth))
    if branches**depth != paths:
        raise ValueError(
            f"expert option depth={depth}: {paths} experts are not the paths of a tree, whose "
            f"number is a power of {depth}, such as {2**depth} or {4**depth}."
        )
    return branches
