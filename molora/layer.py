"""The layer that wraps a linear module: base output plus the routed experts' part."""

from dataclasses import replace
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import (
    BaseTunerLayer,
    _get_in_out_features,
    check_adapters_to_merge,
)
from peft.utils.quantization_utils import resolve_quantization_backend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from . import inference, ops
from .allocation import SiteAllocation
from .config import MoloraConfig
from .context import RoutingContext
from .decision import ModelDecision, SharedDecision
from .experts import Experts
from .gates import Gate
from .losses import Loss
from .merge import merge_site, unmerge_site
from .routers import Router
from .routing import Routing, SiteInput, is_recomputation
from .sharing import SitePart, borrowed, refuse_out_of_reach
from .site_losses import attach_losses
from .site_modules import build_experts, build_gate, build_router, constant_weights
from .static_mixture import StaticMixture

HOW_TO_MERGE = (
    "the adapter {name!r} routes its experts by token, so no merged weight equals it. Keep it as "
    "an adapter (save_pretrained, and PeftModel.from_pretrained to load); put a static map in its "
    "routing's place, measured (molora.calibrate) or given (molora.fix_routing), and then merge; "
    "write it for an engine that routes (molora.export_bundle); or drop it with unload(). "
    "Adapters whose experts are all shared (num_experts=0 or 1) merge exactly."
)


class MoloraLayer(BaseTunerLayer):
    """Adapters of one site. Each holds experts and, if it decides here, a router and a gate.

    A mixin for an `nn.Module`, which wraps the base module and says in `forward` when its adapters
    are at work.
    """

    training: bool
    _modules: dict[str, nn.Module | None]

    adapter_layer_names = ("molora_experts", "molora_router", "molora_gate")
    other_param_names = ("molora_allocation", "molora_losses", "molora_decision", "molora_static")
    how_to_merge = HOW_TO_MERGE

    def __init__(
        self, base_layer: nn.Module, context: RoutingContext, token_mask: str, **kwargs: Any
    ) -> None:
        self.base_layer = base_layer
        self.quantization_backend = resolve_quantization_backend(self.get_base_layer(), **kwargs)
        self.molora_experts = nn.ModuleDict({})
        self.molora_router = nn.ModuleDict({})
        self.molora_gate = nn.ModuleDict({})
        self.molora_allocation: dict[str, SiteAllocation] = {}
        self.molora_losses: dict[str, dict[str, tuple[float, Loss]]] = {}
        self.molora_decision: dict[str, SharedDecision | ModelDecision] = {}
        self.molora_static: dict[str, StaticMixture] = {}
        self.borrows = False  # some adapter reads here what another layer holds
        self.routing_context = context
        self.token_mask = token_mask
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.unmerged_weight: Tensor | None = None
        self.in_features, self.out_features = self._sizes()

    def _sizes(self) -> tuple[int | None, int | None]:
        """d_in and d_out of the base layer."""
        return _get_in_out_features(self.get_base_layer())

    def update_layer(
        self,
        adapter_name: str,
        config: MoloraConfig,
        allocation: SiteAllocation,
        decision: SharedDecision | ModelDecision | None,
    ) -> None:
        """Add an adapter to this site."""
        experts = build_experts(config, allocation)
        self._reset_parameters(experts, config.init_lora_weights)
        self.molora_experts[adapter_name] = experts
        self.molora_allocation[adapter_name] = allocation
        self.molora_losses[adapter_name] = config.build_losses()
        if allocation.owns_router:
            gate = build_gate(config, allocation)
            router = build_router(config, allocation, gate.num_logits)
            router.reset_parameters()
            self.molora_router[adapter_name] = router
            self.molora_gate[adapter_name] = gate
            self.routing_context.looks_ahead |= router.looks_ahead
            once = router.per_sequence or router.per_task
            self.routing_context.decides_once |= once
            self.routing_context.follows_cache |= (
                once or router.looks_ahead or "positions" in router.needs
            )
            if isinstance(decision, ModelDecision):
                decision.decided_by(router, gate, allocation.site.layer)
        if decision is not None:
            self.molora_decision[adapter_name] = decision
            if isinstance(decision, ModelDecision):
                self.borrows |= decision.layer != allocation.site.layer
        constant = constant_weights(config, allocation)
        if constant is not None:
            source = f"gate={config.gate!r} weighs all tokens alike"
            self.molora_static[adapter_name] = StaticMixture(True, source, constant, built_in=True)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def after_step(self, progress: float | None) -> None:
        """Let experts, routers and gates of the active adapters take their own step."""
        for name in self.active_adapters:
            for parts in (self.molora_experts, self.molora_router, self.molora_gate):
                if name in parts:
                    cast(Experts | Router | Gate, parts[name]).after_step(progress)

    def _freeze_non_trainable_peft_weights(self, adapter_names: Any = None) -> None:
        """PEFT's hook after it has let whole adapters train."""
        super()._freeze_non_trainable_peft_weights(adapter_names)
        for parts in (self.molora_experts, self.molora_router):
            for part in parts.values():
                for name in cast(SitePart, part).frozen_parameters:
                    part.get_parameter(name).requires_grad_(False)

    def is_routed(self, adapter_name: str) -> bool:
        """Whether that adapter's experts depend on the input here."""
        allocation = self.molora_allocation.get(adapter_name)
        return allocation is not None and allocation.is_routed

    def experts_of(self, adapter_name: str) -> Experts:
        """That adapter's experts here."""
        return cast(Experts, self.molora_experts[adapter_name])

    def _reset_parameters(self, experts: Experts, init: bool | str) -> None:
        experts.reset_parameters(init, self._dense_weight)

    def _dense_weight(self) -> Tensor:
        weight = self.get_base_weight()
        return weight.T if isinstance(self.get_base_layer(), Conv1D) else weight

    def static_mixture(self, adapter_name: str) -> StaticMixture | None:
        """What stands in for the adapter's routing here: nothing is routed, or all tokens are
        routed alike, or somebody has set one; None where the experts depend on the token."""
        held = self.molora_static.get(adapter_name)
        if held is not None or self.is_routed(adapter_name):
            return held
        return StaticMixture(exact=True, source="no expert is routed")

    def set_static_mixture(self, adapter_name: str, mixture: StaticMixture) -> None:
        """Hold a map that merging and exporting take for the adapter's routing.

        Raises:
            ValueError: the adapter is merged, and could not be taken out again.
        """
        if adapter_name in self.merged_adapters:
            raise ValueError(f"the adapter {adapter_name!r} is merged; unmerge it first.")
        self.molora_static[adapter_name] = mixture

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether PEFT's `convert_to_lora` may take the adapter: something static stands for it."""
        return self.static_mixture(adapter_name) is not None

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """What the adapter adds to the base weight, in that weight's layout.

        Raises:
            ValueError: the experts are routed and nothing static stands in for that, so that no
                single weight equals them.
        """
        mixture = self.static_mixture(adapter_name)
        if mixture is None:
            raise ValueError(
                f"the adapter {adapter_name!r} routes the experts of "
                f"{self.molora_allocation[adapter_name].site.name!r} by token; no single weight "
                "equals them."
            )
        delta = mixture.delta_weight(self.experts_of(adapter_name))
        return delta.T if isinstance(self.get_base_layer(), Conv1D) else delta

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fold adapters into the base weight, routed ones by what stands in for their routing."""
        for name in check_adapters_to_merge(self, adapter_names):
            if name in self.molora_experts:
                merge_site(self, name, safe_merge)

    def unmerge(self) -> None:
        """Take merged adapters out again."""
        unmerge_site(self)

    def _refuse_threads(self) -> None:
        if "_is_replica" in self.__dict__:  # set by torch.nn.DataParallel
            raise RuntimeError(
                "torch.nn.DataParallel runs copies of the model in threads, which would mix up "
                "their routing decisions; start one process per device with accelerate launch, "
                "or let the process see one device only."
            )

    def _add_experts(
        self, adapter: str, source: Tensor, result: Tensor, rows: Tensor | None = None
    ) -> Tensor:
        """`result` plus the adapter's part; of the base layer's input `source` those rows alone."""
        x = source if rows is None else source[rows]
        context = self.routing_context
        if self.borrows:
            self._check_borrowed(adapter)
        experts: Experts = self._part("molora_experts", adapter)
        if context.static and adapter in self.molora_static:
            return self.molora_static[adapter].forward(experts, x, result)
        if not self.molora_allocation[adapter].is_routed:
            return self._run_experts(experts, x, None, result)
        merges = context.given().merges if rows is None else None
        factors = None if merges is None else merges.factors(experts)
        if factors is not None:
            return factors.add(x, result)
        if experts.takes_widened:
            x = ops.widened(x)
        looked_at = merges is not None or context.records is not None
        if rows is None and not looked_at and adapter not in self.molora_decision:
            parts = self._part("molora_router", adapter), self._part("molora_gate", adapter)
            alone = inference.add_experts(*parts, experts, x, result)
            if alone is not None:
                return alone
        inputs = self._site_input(adapter, x, source, rows)
        if inputs.router is not None and inputs.router.reads_output:
            inputs = replace(inputs, output=result.reshape(-1, result.shape[-1]))
        routing = self._route(adapter, inputs, source)
        if merges is not None:
            merges.collect(self._part("molora_gate", adapter), routing, inputs)
        if experts.mixes_tokens:
            result = experts.mix_tokens(x, routing, result)
        else:
            result = self._run_experts(experts, x, routing.all_weights, result)
        if self.training and inputs.router is not None:
            losses, name = self.molora_losses[adapter], self._record_name(adapter)
            decisions = self.molora_allocation[adapter].num_decisions
            result = attach_losses(losses, decisions, context, name, routing, inputs, result)
        return result

    def _check_borrowed(self, adapter: str) -> None:
        """Refuse to read what another layer holds where this one can't."""
        kinds = ("molora_experts", "molora_router")
        lent = [module for kind in kinds for module in borrowed(self._part(kind, adapter))]
        decision = self.molora_decision.get(adapter)
        if isinstance(decision, ModelDecision):
            lent += decision.parts
        refuse_out_of_reach(lent, self._record_name(adapter), self.routing_context.runs_again)

    def _run_experts(
        self, experts: Experts, x: Tensor, weights: Tensor | None, result: Tensor
    ) -> Tensor:
        """What the experts make of the base layer's output (..., d_out), in its dtype."""
        return experts(x, weights, result)

    def _site_input(
        self, adapter: str, x: Tensor, source: Tensor, rows: Tensor | None
    ) -> SiteInput:
        context = self.routing_context
        given = context.given()
        mask = context.token_mask(self.token_mask, source)
        if rows is not None and mask is not None:
            mask = mask.view(source.shape[:-1])[rows].flatten()
        return SiteInput(
            hidden=x.reshape(-1, x.shape[-1]),
            mask=mask,
            shape=x.shape[:-1],
            experts=self._part("molora_experts", adapter),
            router=self._part("molora_router", adapter),
            given=given,
            rows=rows,
            site=self.molora_allocation[adapter].site.name,
            adapter=adapter,
        )

    def _part(self, kind: str, adapter: str) -> Any:
        """The adapter's experts, router or gate, looked up as fast as every token of a generation
        needs it: `nn.Module` and `nn.ModuleDict` are asked thousands of times for one token.
        """
        parts: Any = self._modules[kind]
        return parts._modules.get(adapter)

    def _route(self, adapter: str, inputs: SiteInput, source: Tensor) -> Routing:
        decision = self.molora_decision.get(adapter)
        context, mixed = self.routing_context, inputs.rows is not None
        records = context.records
        if isinstance(decision, ModelDecision):
            routing = decision.routing(inputs).with_mask(inputs.mask)
            if self.training and inputs.router is not None:
                context.check_finite(self._record_name(adapter, mixed), routing.logits)
        elif inputs.router is None:
            site = self._record_name(adapter, mixed)
            assert decision is not None, f"{site} has experts to route and nobody to route them"
            routing = decision.take(site, source, inputs.hidden.shape[0])
        else:
            logits = inputs.router(inputs)
            if self.training:
                context.check_finite(self._record_name(adapter, mixed), logits)
            routing = self._part("molora_gate", adapter)(logits, inputs)
            if inputs.mask is not None and (self.training or records is not None):
                routing = routing.with_mask(inputs.mask)
            if decision is not None:
                decision.publish(routing, source)
        if records is not None and not is_recomputation():
            site = self._record_name(adapter, mixed)
            records.setdefault(site, []).append(routing.detach())
        return routing

    def _record_name(self, adapter: str, mixed: bool = False) -> str:
        """The site's name, with the adapter's where several are at work at once."""
        site = self.molora_allocation[adapter].site.name
        several = mixed or len(self.active_adapters) > 1
        return f"{site} ({adapter})" if several else site

    def _mixed_batch(self, x: Tensor, adapter_names: list[str], result: Tensor) -> Tensor:
        if len(adapter_names) != len(x):
            raise ValueError(
                f"adapter_names has {len(adapter_names)} entries for a batch of {len(x)}; give one "
                "adapter per row, '__base__' for none."
            )
        if self.merged:
            raise ValueError(
                "adapter_names can't be used while adapters are merged; unmerge first."
            )
        result = result.clone()
        for name in dict.fromkeys(adapter_names):
            if name not in self.molora_experts:
                continue
            rows = torch.tensor([i for i, n in enumerate(adapter_names) if n == name])
            rows = rows.to(x.device)
            result[rows] = self._add_experts(name, x, result[rows], rows)
        return result


class Linear(nn.Module, MoloraLayer):
    """A linear module (`nn.Linear`, `Conv1D`, or quantised) with routed LoRA experts."""

    def __init__(
        self, base_layer: nn.Module, context: RoutingContext, token_mask: str, **kwargs: Any
    ) -> None:
        super().__init__()
        MoloraLayer.__init__(self, base_layer, context, token_mask, **kwargs)

    def forward(
        self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any
    ) -> Tensor:
        """(..., d_in) -> (..., d_out), in the base layer's dtype.

        Args:
            x: the input; all leading dimensions together are the T tokens.
            adapter_names: the adapter of each row of the batch, "__base__" for none.
        """
        self._refuse_threads()
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        if adapter_names is not None:
            return self._mixed_batch(x, adapter_names, self.base_layer(x, *args, **kwargs))
        result = self.base_layer(x, *args, **kwargs)
        if self.merged:
            return result
        if self.quantization_backend is not None:
            result = self.quantization_backend.maybe_clone_base_result(result)
        for name in self.active_adapters:
            if name in self.molora_allocation:
                result = self._add_experts(name, x, result)
        return result

    def __repr__(self) -> str:
        return "molora." + super().__repr__()


def adapted_layers(model: nn.Module, adapter_name: str = "default") -> dict[str, MoloraLayer]:
    """The sites of an adapter by name, in the order of the model.

    Raises:
        ValueError: the model has no site with an adapter of that name.
    """
    layers: dict[str, MoloraLayer] = {
        module.molora_allocation[adapter_name].site.name: module
        for module in model.modules()
        if isinstance(module, MoloraLayer) and adapter_name in module.molora_allocation
    }
    if not layers:
        raise ValueError(f"the model has no MoLoRA adapter named {adapter_name!r}.")
    return layers
