"""A router that goes down a tree, where what was chosen above is part of the question below
(S'MoRE, arXiv 2504.06426)."""

import math
from typing import cast

import torch
from torch import Tensor, nn

from .. import ops
from ..routing import SiteInput
from .base import Router, register_router

DEPTHS = (1, 2)  # of the published trees


@register_router("tree")
class TreeRouter(Router):
    """z = keys . MLP([D x + d, keys of the nodes above]), at every node for each of its s branches.

    D (h, d_in) brings the token down to `hidden_size` features. Each level of the tree has s keys
    (s, g) and an MLP of its own, V_2 tanh(V_1 u + v_1) + v_2, with g = `key_size` hidden and output
    units; its input has g more features with every level. All of it in fp32. The logits are those
    of the s branches of the root, then those of the s^2 below. Keys start uniform in [0, 1], the
    rest kaiming-uniform (a = sqrt(5)), biases at zero.

    Args:
        depth: levels of the tree, 1 or 2.
    """

    def __init__(
        self,
        in_features: int,
        num_experts: int,
        *,
        depth: int = 2,
        hidden_size: int = 32,
        key_size: int = 32,
        temperature: float = 1.0,
        noise: float = 0.0,
    ) -> None:
        super().__init__(in_features, num_experts, temperature=temperature, noise=noise)
        if depth not in DEPTHS:
            raise ValueError(f"router option depth={depth!r} must be 1 or 2")
        for name, size in (("hidden_size", hidden_size), ("key_size", key_size)):
            if size < 1:
                raise ValueError(f"router option {name}={size!r} must be at least 1")
        s = num_experts if depth == 1 else (math.isqrt(4 * num_experts + 1) - 1) // 2
        if sum(s**level for level in range(1, depth + 1)) != num_experts:
            raise ValueError(
                f"router='tree' with depth={depth} can't give {num_experts} logits; use "
                "gate='tree_top_k' with the same depth."
            )
        self.depth, self.branches = depth, s
        self.down = nn.Linear(in_features, hidden_size)
        self.first = nn.ModuleList(
            nn.Linear(hidden_size + key_size * level, key_size) for level in range(depth)
        )
        self.second = nn.ModuleList(nn.Linear(key_size, key_size) for _ in range(depth))
        self.keys = nn.Parameter(torch.empty(depth, s, key_size))

    def reset_parameters(self) -> None:
        nn.init.uniform_(self.keys)
        for module in (self.down, *self.first, *self.second):
            layer = cast(nn.Linear, module)
            nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5))
            nn.init.zeros_(layer.bias)

    def compute_logits(self, inputs: SiteInput) -> Tensor:
        x = ops.router_logits(inputs.hidden, self.down.weight, self.down.bias)
        keys = self.keys.to(x.dtype)
        above = keys.new_zeros(1, 0)  # (s^level, level g) keys on the way to each node
        logits = []
        with torch.autocast(x.device.type, enabled=False):
            for level in range(self.depth):
                first = cast(nn.Linear, self.first[level])
                second = cast(nn.Linear, self.second[level])
                token, path = first.weight.to(x.dtype).split([x.shape[-1], above.shape[-1]], -1)
                inner = (x @ token.mT)[:, None] + above @ path.mT + first.bias.to(x.dtype)
                query = inner.tanh() @ second.weight.to(x.dtype).mT + second.bias.to(x.dtype)
                logits.append((query @ keys[level].mT).flatten(1))
                above = torch.cat(
                    [
                        above.repeat_interleave(self.branches, 0),
                        keys[level].repeat(above.shape[0], 1),
                    ],
                    -1,
                )
        return torch.cat(logits, -1)
