"""The tuner: finds the sites, plans them together, and puts the experts in."""

import inspect
import re
import warnings
from collections.abc import Hashable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

from peft import PeftConfig
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _ExcludedModule,
    _get_in_out_features,
    _maybe_include_all_linear_layers,
)
from peft.utils import (
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    AuxiliaryTrainingWrapper,
)
from peft.utils.constants import DUMMY_TARGET_MODULES
from peft.utils.quantization_utils import get_quantization_kwargs, resolve_quantization_backend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .allocation import SiteAllocation, allocate
from .bypassed import refuse_bypassed
from .checkpoint import check_state_dict
from .config import MoloraConfig
from .config_checks import check_adapter_name
from .context import RoutingContext, with_changed
from .decision import ModelDecision, SharedDecision
from .experts import Experts
from .feedforward import FeedForward
from .feedforward_experts import FeedForwardExperts
from .feedforward_sites import Network, check_plan, find_networks, gather, wrapped_linears
from .layer import Linear, MoloraLayer
from .merge import refuse_tied
from .mixed_batch import check_names, handed_to_layers
from .passes import LABELS
from .quantized import keep_4bit_layout
from .routers import Router
from .sharing import SitePart, borrowed, share
from .site_modules import check_parts
from .sites import Site, in_run_order, number_layers, reads_decoder
from .static_mixture import StaticMixture
from .static_storage import load_mixtures, saved_mixtures
from .targets import (
    no_match_error,
    refuse_non_causal,
    warn_unmatched,
    warn_unmatched_patterns,
    warn_without_effect,
)


class MoloraModel(BaseTuner):
    """PEFT tuner for mixtures of LoRA experts; made by `peft.get_peft_model`, not by hand."""

    prefix = "molora_"
    tuner_layer_cls = MoloraLayer
    target_module_mapping = {
        name: list(targets)
        for name, targets in TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.items()
    }

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """Plan all sites, then let PEFT inject one after the other."""
        check_adapter_name(adapter_name)
        state_dict = kwargs.get("state_dict")
        self._names_in_state_dict = None if state_dict is None else _adapted_names(state_dict)
        self._plan: dict[str, SiteAllocation] = {}
        self._networks: dict[str, Network] = {}
        self._decisions: dict[str, SharedDecision | ModelDecision] = {}
        self._context: RoutingContext | None = None
        self._leaders: dict[Hashable, SitePart] = {}
        with warnings.catch_warnings():
            config = cast(MoloraConfig, self.peft_config[adapter_name])
            if config.mixing == "feed_forward":  # `warn_unmatched_patterns` says it instead
                message = r"The following (rank|alpha)_pattern keys did not match"
                warnings.filterwarnings("ignore", message, RuntimeWarning)
            try:
                super().inject_adapter(model, adapter_name, *args, **kwargs)
            except Exception:
                self.peft_config.pop(adapter_name)  # PEFT has entered it already
                raise
        del self._plan, self._networks, self._decisions, self._context, self._leaders
        del self._names_in_state_dict

    def _prepare_adapter_config(
        self, peft_config: PeftConfig, model_config: dict[str, Any]
    ) -> PeftConfig:
        """PEFT's default targets; where it knows none, say what the model has."""
        assert isinstance(peft_config, MoloraConfig)
        is_known = model_config.get("model_type") in self.target_module_mapping
        if peft_config.target_modules is None and not is_known:
            raise no_match_error(peft_config, dict(_modules_outside_adapters(self.model)))
        return super()._prepare_adapter_config(peft_config, model_config)

    def _prepare_model(self, peft_config: PeftConfig, model: nn.Module) -> None:
        """Everything that can be refused is refused here, before the model is changed."""
        assert isinstance(peft_config, MoloraConfig)
        if getattr(peft_config, "target_modules", None) == DUMMY_TARGET_MODULES:
            return
        _maybe_include_all_linear_layers(peft_config, model)
        modules = dict(_modules_outside_adapters(model))
        if peft_config.mixing == "feed_forward":
            self._networks = find_networks(modules)
        sites, num_layers = self._find_sites(peft_config, model, modules)
        refuse_non_causal(peft_config, model, (site.name for site in sites))
        self._plan = allocate(peft_config, sites, num_layers)
        check_plan(peft_config, self._plan, self._networks, modules)
        check_parts(peft_config, self._plan.values())
        warn_without_effect(peft_config, self._plan)
        self._decisions = _shared_decisions(self._plan, peft_config.router_scope)
        self._context = _context_of(model)
        if self._context is None:
            self._context = RoutingContext()
            self._context_handles = self._context.install(model)
        keep_4bit_layout(model)

    def _find_sites(
        self, config: MoloraConfig, model: nn.Module, modules: dict[str, nn.Module]
    ) -> tuple[list[Site], int]:
        modules = {**modules, **wrapped_linears(modules)}
        names = in_run_order(name for name in modules if self._is_target(config, name))
        if not names:
            raise no_match_error(config, modules)
        warn_unmatched(config, modules)
        for name in names:
            _check_supported(name, modules[name])
        refuse_bypassed(model, names)
        layers, num_layers = number_layers(model, names)
        sites = [
            Site(name, layers[name], *_get_in_out_features(_base(modules[name]))) for name in names
        ]
        if config.mixing == "feed_forward":
            warn_unmatched_patterns(config, names)
            sites = gather(sites, self._networks, modules)
        return sites, num_layers

    def _is_target(self, config: MoloraConfig, name: str) -> bool:
        if self._names_in_state_dict is not None:
            return name in self._names_in_state_dict and name not in self._networks
        found = super()._check_target_module_exists(config, name)
        return bool(found) and not isinstance(found, _ExcludedModule)

    def _check_target_module_exists(  # type: ignore[override]  # PEFT's is static
        self, peft_config: PeftConfig, key: str
    ) -> Any:
        """PEFT's injection asks for each module; a network takes the place of its targeted ones."""
        assert isinstance(peft_config, MoloraConfig)
        if peft_config.mixing == "feed_forward":
            return key in self._plan
        return super()._check_target_module_exists(peft_config, key)

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        assert isinstance(peft_config, MoloraConfig) and self._context is not None
        allocation = self._plan[current_key]
        decision = self._decisions.get(allocation.router_site or "")
        if isinstance(target, MoloraLayer):
            target.update_layer(adapter_name, peft_config, allocation, decision)
            _share_parameters(target, adapter_name, self._leaders)
            return
        mask = _token_mask_name(self.model, current_key)
        quantization = get_quantization_kwargs(self.model)
        layer: FeedForward | Linear
        if allocation.parts:
            roles = self._networks[current_key].roles
            layer = FeedForward(target, roles, self._context, mask, **quantization)
        else:
            layer = Linear(target, self._context, mask, **quantization)
        layer.set_adapter(adapter_name)
        layer.update_layer(adapter_name, peft_config, allocation, decision)
        _share_parameters(layer, adapter_name, self._leaders)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        # What these held goes back as it is; PEFT would copy a weight to it.
        if isinstance(child, FeedForward | AuxiliaryTrainingWrapper):
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def _check_mergeable(self, adapter_names: Iterable[str]) -> list[StaticMixture]:
        """What the merge would fold in; refused before any weight is touched."""
        found = []
        for layer in self.model.modules():
            if not isinstance(layer, MoloraLayer):
                continue
            for name in adapter_names:
                if name not in layer.molora_allocation:
                    continue
                mixture, site = layer.static_mixture(name), layer.molora_allocation[name].site.name
                if mixture is None:
                    raise ValueError(layer.how_to_merge.format(name=name, site=site))
                refuse_tied(self.model, layer, site)
                found.append(mixture)
        return found

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False
    ) -> None:
        """Merge adapters in place: exactly, or with a warning by what `calibrate` found."""
        mixtures = self._check_mergeable(adapter_names or self.active_adapters)
        super().merge_adapter(adapter_names, safe_merge)
        _warn_inexact(mixtures)

    def _unload_and_optionally_merge(  # type: ignore[override]  # PEFT's says None, returns a model
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        mixtures = self._check_mergeable(adapter_names or self.active_adapters) if merge else []
        model: nn.Module = super()._unload_and_optionally_merge(  # type: ignore[assignment]
            merge, progressbar, safe_merge, adapter_names
        )
        _warn_inexact(mixtures)
        for handle in getattr(self, "_context_handles", ()):
            handle.remove()
        return model

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's, which refuses labels for routing; here they hold for all its passes.

        transformers' Seq2SeqTrainer gives it the whole batch.
        """
        context = _context_of(self.model)
        accepted = inspect.signature(self.model.forward).parameters
        names = [name for name in LABELS if name in kwargs and name not in accepted]
        labels = {LABELS[name]: kwargs.pop(name) for name in names}
        if not labels or context is None:
            return self.model.generate(*args, **kwargs)
        with with_changed([context], "standing_labels", lambda outer: {**outer, **labels}):
            return self.model.generate(*args, **kwargs)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Hand `adapter_names`, one adapter per row of the batch, to the layers."""
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        if self.training:
            raise ValueError("adapter_names mixes adapters at inference only; call model.eval().")
        known, beams = set(self.peft_config), kwargs.get("num_beams") or 1
        names = check_names(names, known, beams, _is_encoder_decoder(self.model))
        with handed_to_layers(self, names):
            yield

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        found = super()._get_adapter_state_dict(model, config, adapter_name, *args, **kwargs)
        return {**found, **saved_mixtures(model, adapter_name)}

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """PEFT's looks for the name beside a parameter; here it may stand above a submodule."""
        parts = "|".join(MoloraLayer.adapter_layer_names)
        return re.sub(rf"\.({parts})\.{re.escape(adapter_name)}\.", r".\1.", key)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        state_dict = load_mixtures(model, adapter_name, state_dict)
        remapped = super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, state_dict
        )
        check_state_dict(model, config, adapter_name, remapped)
        return remapped


def _warn_inexact(mixtures: Iterable[StaticMixture]) -> None:
    for source in dict.fromkeys(m.source for m in mixtures if not m.exact):
        warnings.warn(f"molora: merged an approximation of the routing: {source}.", stacklevel=3)


def _modules_outside_adapters(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Named modules, without what is inside the layers of adapters."""
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if not name or name.startswith(inside or "\0"):
            continue
        if isinstance(module, BaseTunerLayer):
            inside += (name + ".",)
        yield name, module


def _adapted_names(state_dict: dict[str, Tensor]) -> set[str]:
    """The modules that an adapter's tensors belong to, in a network with experts its modules."""
    names = set()
    for key in state_dict:
        site, _, rest = key.rpartition("." + MoloraModel.prefix)
        names.add(site)
        kind, _, inside = rest.partition(".linears.")
        if kind == "experts" and inside:
            names.add(f"{site}.{inside.partition('.')[0]}")
    return names


def _base(module: nn.Module) -> nn.Module:
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def _check_supported(name: str, module: nn.Module) -> None:
    base = _base(module)
    if isinstance(base, nn.Linear | Conv1D):
        return
    backend = resolve_quantization_backend(base) if not isinstance(base, nn.Embedding) else None
    if backend is None or backend.layer_type != "linear":
        raise ValueError(
            f"the target module {name!r} is a {type(base).__name__}; supported are "
            "torch.nn.Linear, transformers' Conv1D and the quantised linears that PEFT knows."
        )


def _shared_decisions(
    plan: dict[str, SiteAllocation], scope: str
) -> dict[str, SharedDecision | ModelDecision]:
    """One for each router that decides for more than its own site."""
    followers: dict[str, int] = {}
    for allocation in plan.values():
        if allocation.router_site is not None and not allocation.owns_router:
            followers[allocation.router_site] = followers.get(allocation.router_site, 0) + 1
    if scope == "model":
        return {leader: ModelDecision(leader) for leader in followers}
    return {
        leader: SharedDecision(leader, count, scope == "block")
        for leader, count in followers.items()
    }


def _share_parameters(
    layer: MoloraLayer, adapter_name: str, leaders: dict[Hashable, SitePart]
) -> None:
    """Let an adapter's parts at a site use what its earlier sites hold, or hold it for the rest."""
    allocation = layer.molora_allocation[adapter_name]
    experts = layer.experts_of(adapter_name)
    if isinstance(experts, FeedForwardExperts):
        for part, its in zip(experts.linears.values(), allocation.parts, strict=True):
            share(cast(Experts, part), its.alike, leaders)
    else:
        share(experts, allocation.alike, leaders)
    if adapter_name in layer.molora_router:
        router = cast(Router, layer.molora_router[adapter_name])
        group = allocation.site.module, router.in_features, router.num_experts
        share(router, group, leaders)
        layer.borrows |= bool(borrowed(router))
    layer.borrows |= bool(borrowed(experts))


def _context_of(model: nn.Module) -> RoutingContext | None:
    layers = (m for m in model.modules() if isinstance(m, MoloraLayer))
    return next((layer.routing_context for layer in layers), None)


def _token_mask_name(model: nn.Module, site: str) -> str:
    """Which mask describes the site's input; cross-attention's keys and values read the encoder."""
    decoder = _is_encoder_decoder(model) and reads_decoder(site)
    return "decoder_attention_mask" if decoder else "attention_mask"


def _is_encoder_decoder(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
