"""What to say when `target_modules` names nothing, or something that isn't there."""

import warnings
from collections.abc import Iterable, Mapping
from copy import copy
from difflib import get_close_matches

from peft import NoMatchingPeftModuleError
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from torch import nn
from transformers.pytorch_utils import Conv1D

from .allocation import SiteAllocation
from .config import MoloraConfig
from .gates import GATES
from .settings import matches
from .sites import reads_encoder

# What PEFT adds to modules_to_save for a task, whichever of them the model has.
HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def no_match_error(
    config: MoloraConfig, modules: Mapping[str, nn.Module]
) -> NoMatchingPeftModuleError:
    """No module became a site: name what was asked for, and the nearest that exists."""
    if config.target_modules is None:
        return NoMatchingPeftModuleError(
            "target_modules is not set, and no default is known for this model; name them, for "
            f"example target_modules='all-linear'. Linear modules here: {_listed(modules)}."
        )
    restrictions = [
        f"{name}={value!r}"
        for name in ("exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")
        if (value := getattr(config, name))
    ]
    besides = f" with {', '.join(restrictions)}" if restrictions else ""
    return NoMatchingPeftModuleError(
        f"target_modules={_shown(config.target_modules)}{besides} matches no module of the model."
        f"{_hints(config.target_modules, modules)} Linear modules here: {_listed(modules)}."
    )


def refuse_non_causal(config: MoloraConfig, model: nn.Module, names: Iterable[str]) -> None:
    """Raise where a gate that mixes tokens would sit in what predicts the next token."""
    if not GATES.get(config.gate).mixes_tokens:
        return
    generates = getattr(model, "can_generate", None)
    if generates is None or not generates():
        return
    if not getattr(model.config, "is_encoder_decoder", False):
        config.refuse_non_causal(f"a {type(model).__name__}")
    in_decoder = [
        name for name in names if "decoder" in name.split(".") and not reads_encoder(name)
    ]
    if in_decoder:
        config.refuse_non_causal(f"the decoder's module {in_decoder[0]!r}")


def warn_unmatched(config: MoloraConfig, modules: Mapping[str, nn.Module]) -> None:
    """Warn about targets, layers and modules to save that the model doesn't have, so that nothing
    is missed.

    Targets that it has, but that are excluded or trained whole, are as they were asked for.
    """
    _warn_unmatched_targets(config, modules)
    _warn_unmatched_layers(config, modules)
    unmatched = [
        name
        for name in config.modules_to_save or ()
        if not any(module.endswith(name) for module in modules)
        and name not in HEADS.get(config.task_type or "", ())
    ]
    if unmatched:
        warnings.warn(
            f"molora: modules_to_save {', '.join(map(repr, unmatched))} match no module, and "
            f"nothing is trained or saved for them.{_hints(unmatched, modules)}",
            stacklevel=2,
        )


def _warn_unmatched_layers(config: MoloraConfig, modules: Mapping[str, nn.Module]) -> None:
    layers = config.layers_to_transform
    if layers is None:
        return
    alone, unmatched = copy(config), []
    for layer in [layers] if isinstance(layers, int) else layers:
        alone.layers_to_transform = layer
        if not any(check_target_module_exists(alone, name) for name in modules):
            unmatched.append(layer)
    if unmatched:
        warnings.warn(
            f"molora: layers_to_transform {', '.join(map(str, unmatched))} hold no target module "
            "and get no adapter.",
            stacklevel=2,
        )


def _warn_unmatched_targets(config: MoloraConfig, modules: Mapping[str, nn.Module]) -> None:
    if isinstance(config.target_modules, str) or config.target_modules is None:
        return
    unmatched = [
        target
        for target in sorted(config.target_modules)
        if not any(name == target or name.endswith(f".{target}") for name in modules)
    ]
    if unmatched:
        warnings.warn(
            f"molora: target_modules {', '.join(map(repr, unmatched))} match no module and get no "
            f"adapter.{_hints(unmatched, modules)}",
            stacklevel=2,
        )


def warn_unmatched_patterns(config: MoloraConfig, names: Iterable[str]) -> None:
    """Warn about regexes for the rank or alpha that match none of the adapted linear modules.

    PEFT does that too, but for it a feed-forward network is one module, without those inside.
    """
    names = list(names)
    for field in ("rank_pattern", "alpha_pattern"):
        patterns = getattr(config, field)
        unmatched = [p for p in patterns if not any(matches(p, name) for name in names)]
        if unmatched:
            warnings.warn(
                f"molora: {field} {', '.join(map(repr, unmatched))} match no target module.",
                stacklevel=2,
            )


def warn_without_effect(config: MoloraConfig, plan: Mapping[str, SiteAllocation]) -> None:
    """Warn about settings that change nothing at any site of the model.

    They are regexes of a map that decide nowhere, because they match no site or because one before
    them matches the same sites (but not a closing ".*"), and losses where nothing is routed.
    """
    names = [part.site.name for site in plan.values() for part in site.parts or (site,)]
    for field in ("num_experts", "num_shared_experts", "top_k", "r"):
        value = getattr(config, field)
        if not isinstance(value, dict):
            continue
        used = {next((p for p in value if matches(p, name)), None) for name in names}
        idle = [pattern for pattern in value if pattern not in used and pattern != ".*"]
        if idle:
            warnings.warn(
                f"molora: {field} {', '.join(map(repr, idle))} decide for no site: no name of one "
                "matches, or an earlier regex does. The sites are "
                f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''}.",
                stacklevel=2,
            )
    if config.losses and not any(allocation.is_routed for allocation in plan.values()):
        warnings.warn(
            f"molora: no site has experts to choose from (num_experts={config.num_experts!r}), so "
            f"losses={config.losses!r} are never formed; drop them, or raise num_experts.",
            stacklevel=2,
        )


def _linear_suffixes(modules: Mapping[str, nn.Module]) -> list[str]:
    linear = (nn.Linear, Conv1D, BaseTunerLayer)
    return sorted({n.rpartition(".")[2] for n, m in modules.items() if isinstance(m, linear)})


def _listed(modules: Mapping[str, nn.Module]) -> str:
    return ", ".join(_linear_suffixes(modules)) or "none"


def _hints(targets: Iterable[str] | str, modules: Mapping[str, nn.Module]) -> str:
    suffixes = _linear_suffixes(modules)
    asked = [targets] if isinstance(targets, str) else sorted(targets)
    close = [match for target in asked for match in get_close_matches(target, suffixes, n=1)]
    return f" Did you mean {', '.join(dict.fromkeys(map(repr, close)))}?" if close else ""


def _shown(targets: Iterable[str] | str) -> str:
    return repr(targets) if isinstance(targets, str) else repr(sorted(targets))
