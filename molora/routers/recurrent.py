"""A router that remembers its decisions in the layers below (RMoE, arXiv 2408.06793)."""

import math

import torch
from torch import Tensor, nn

from .. import ops
from ..carry import LayerCarry
from ..routing import SiteInput, is_recomputation
from .base import Router, register_router


@register_router("recurrent")
class RecurrentRouter(Router):
    """h_l = GRU(W_1 x, h_(l-1)) for each token, h before the first layer 0; z = W_2 h_l; in fp32.

    W_1 (p, d_in) and W_2 (E, p), p = `hidden_size`, are the layer's own, the GRU is that of all
    layers. The chain goes from a module to the module of the same name in the next layer, so it
    advances once per layer; with router_scope="layer" there is one chain. The encoder and the
    decoder of a model have one each.

    The state h lives in the forward pass: decoding with a cache needs nothing more, since a token
    passes through all layers in one forward. Its gradient flows across layers, checkpointed ones
    too (`LayerCarry`).
    """

    shared_across_sites = ("gru",)

    def __init__(
        self,
        in_features: int,
        num_experts: int,
        *,
        hidden_size: int = 256,
        temperature: float = 1.0,
        noise: float = 0.0,
    ) -> None:
        super().__init__(in_features, num_experts, temperature=temperature, noise=noise)
        if hidden_size < 1:
            raise ValueError(f"router option hidden_size={hidden_size!r} must be at least 1")
        self.down = nn.Parameter(torch.empty(hidden_size, in_features))
        self.up = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.gru = nn.GRUCell(hidden_size, hidden_size)

    def reset_parameters(self) -> None:
        for weight in (self.down, self.up):
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
        self.gru.reset_parameters()

    def compute_logits(self, inputs: SiteInput) -> Tensor:
        """See `Router`.

        Raises:
            RuntimeError: the site runs outside of the base model's forward, or reads other tokens
                than the layer below.
        """
        given, again = inputs.given, is_recomputation()
        if given is None or given.module is None:
            raise RuntimeError(
                f"the router 'recurrent' needs the base model's forward around the site "
                f"{inputs.site!r}, to know which layers are below it."
            )
        carry = given.carries.setdefault(self._chain(inputs), LayerCarry())
        before = carry.take(inputs.site, again)
        if before is not None and before.shape[0] != inputs.hidden.shape[0]:
            raise RuntimeError(
                f"the site {inputs.site!r} reads {inputs.hidden.shape[0]} tokens and the layer "
                f"below it {before.shape[0]}; the router 'recurrent' needs the same ones."
            )
        state = self._step(ops.router_logits(inputs.hidden, self.down, None), before)
        return carry.leave(inputs.site, state, ops.router_logits(state, self.up, None), again)

    def _chain(self, inputs: SiteInput) -> tuple[str, str, int]:
        """Adapter, the part of the model that the layers are in, and who shares the GRU."""
        parts = inputs.site.split(".")
        numbers = [i for i, part in enumerate(parts) if part.isdigit()]
        return inputs.adapter, ".".join(parts[: numbers[0] if numbers else 0]), id(self.gru)

    def _step(self, x: Tensor, before: Tensor | None) -> Tensor:
        gru = self.gru
        if before is None:
            before = torch.zeros_like(x)
        from_x = ops.router_logits(x, gru.weight_ih, gru.bias_ih).chunk(3, -1)
        from_h = ops.router_logits(before, gru.weight_hh, gru.bias_hh).chunk(3, -1)
        reset, update = ((a + b).sigmoid() for a, b in zip(from_x[:2], from_h[:2], strict=True))
        new = torch.tanh(from_x[2] + reset * from_h[2])
        return new + update * (before - new)
