"""The layer that wraps a whole feed-forward network: its experts' outputs are mixed at the end."""

from functools import partial
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import _get_in_out_features
from peft.utils.quantization_utils import resolve_quantization_backend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .context import RoutingContext
from .experts import Experts
from .feedforward_experts import FeedForwardExperts
from .feedforward_roles import Roles
from .layer import MoloraLayer


class FeedForward(nn.Module, MoloraLayer):
    """A feed-forward network with routed experts: one decision for all of its linear modules.

    Every adapter on it is routed: a network without routed experts isn't wrapped, its linear
    modules are. Of several active adapters each adds what it changes in the network's output.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        roles: Roles,
        context: RoutingContext,
        token_mask: str,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.roles = roles
        self._quantization_kwargs = kwargs
        MoloraLayer.__init__(self, base_layer, context, token_mask)

    def __getattr__(self, name: str) -> Any:
        """The network's own parts, for code that asks for `mlp.down_proj`, say."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)

    def forward(self, x: Tensor, adapter_names: list[str] | None = None) -> Tensor:
        """(..., d_in) -> (..., d_out), in the network's dtype.

        Args:
            x: the input; all leading dimensions together are the T tokens.
            adapter_names: the adapter of each row of the batch, "__base__" for none.
        """
        self._refuse_threads()
        if self.disable_adapters:
            return self.base_layer(x)
        if adapter_names is not None:
            return self._mixed_batch(x, adapter_names, self.base_layer(x))
        names = [name for name in self.active_adapters if name in self.molora_allocation]
        if len(names) == 1:
            return self._add_experts(names[0], x, x)
        base = self.base_layer(x)
        return base + sum(self._add_experts(name, x, base) - base for name in names)

    def _run_experts(
        self, experts: Experts, x: Tensor, weights: Tensor | None, result: Tensor
    ) -> Tensor:
        """The network's output with these experts; they need no result of the base network's."""
        assert weights is not None, "a feed-forward network is wrapped for routed experts only"
        network = self.get_base_layer()
        return cast(FeedForwardExperts, experts).mix(network, self.roles, x, weights)

    def _reset_parameters(self, experts: Experts, init: bool | str) -> None:
        for name, part in cast(FeedForwardExperts, experts).linears.items():
            cast(Experts, part).reset_parameters(init, partial(self._weight_of, name))

    def _weight_of(self, name: str) -> Tensor:
        """(d_out, d_in) weight of one of the network's linear modules, dequantised if need be."""
        linear = getattr(self.get_base_layer(), name)
        backend = resolve_quantization_backend(linear, **self._quantization_kwargs)
        weight = linear.weight.data if backend is None else backend.get_base_weight(linear)
        return weight.T if isinstance(linear, Conv1D) else weight

    def _sizes(self) -> tuple[int, int] | tuple[None, None]:
        network = self.get_base_layer()
        first, last = getattr(network, self.roles.inputs[0]), getattr(network, self.roles.down)
        return _get_in_out_features(first)[0], _get_in_out_features(last)[1]  # type: ignore

    def _get_base_layer_device_and_dtype(
        self, base_layer: nn.Module
    ) -> tuple[torch.device | None, torch.dtype | None]:
        first = getattr(base_layer, self.roles.inputs[0])
        return super()._get_base_layer_device_and_dtype(first)

    def __repr__(self) -> str:
        return "molora." + super().__repr__()
