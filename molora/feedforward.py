"""The layer that wraps a whole feed-forward network: its experts' outputs are mixed at the end."""

from functools import partial
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from peft.utils.quantization_utils import resolve_quantization_backend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .allocation import SiteAllocation
from .config import MoloraConfig
from .context import RoutingContext
from .decision import ModelDecision, SharedDecision
from .experts import Experts
from .feedforward_experts import FeedForwardExperts
from .feedforward_roles import Roles
from .layer import MoloraLayer
from .routers import Router
from .static_mixture import StaticMixture

HOW_TO_MERGE = (
    "the adapter {name!r} mixes the outputs of whole feed-forward networks at {site!r}, which no "
    "merged weight equals, not even with fixed routing weights. Keep it as an adapter "
    "(save_pretrained, and PeftModel.from_pretrained to load), write it as a mixture-of-experts "
    "model (molora.export_moe), or drop it with unload()."
)


class FeedForward(nn.Module, MoloraLayer):
    """A feed-forward network with routed experts: one decision for all of its linear modules.

    Every adapter on it is routed: a network without routed experts isn't wrapped, its linear
    modules are. Of several active adapters each adds what it changes in the network's output.
    """

    how_to_merge = HOW_TO_MERGE

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
        if len(names) == 1 and not self._reads_output(names[0]):
            return self._add_experts(names[0], x, x)
        base = self.base_layer(x)
        return base + sum(self._add_experts(name, x, base) - base for name in names)

    def update_layer(
        self,
        adapter_name: str,
        config: MoloraConfig,
        allocation: SiteAllocation,
        decision: SharedDecision | ModelDecision | None,
    ) -> None:
        super().update_layer(adapter_name, config, allocation, decision)
        self.molora_static.pop(adapter_name, None)

    def static_mixture(self, adapter_name: str) -> None:
        """None: even with weights held fixed, no linear map equals several networks."""
        return None

    def set_static_mixture(self, adapter_name: str, mixture: StaticMixture) -> None:
        """Refuse.

        Raises:
            ValueError: always.
        """
        raise self._no_one_map(adapter_name)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse; the tuner does before it merges anything.

        Raises:
            ValueError: an adapter would have to be merged here.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name in self.molora_allocation:
                raise self._no_one_map(name)

    def _no_one_map(self, adapter: str) -> ValueError:
        site = self.molora_allocation[adapter].site.name
        return ValueError(HOW_TO_MERGE.format(name=adapter, site=site))

    def _reads_output(self, adapter: str) -> bool:
        router = self._part("molora_router", adapter)
        return router is not None and cast(Router, router).reads_output

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
        return self.roles.sizes(self.get_base_layer())

    def _get_base_layer_device_and_dtype(
        self, base_layer: nn.Module
    ) -> tuple[torch.device | None, torch.dtype | None]:
        first = getattr(base_layer, self.roles.inputs[0])
        return super()._get_base_layer_device_and_dtype(first)

    def __repr__(self) -> str:
        return "molora." + super().__repr__()
