"""X-LoRA as PEFT saves it: a classifier, and the LoRA adapters that it weighs.

PEFT 0.21.2 takes the names of the adapters, "0", "1", ..., for parts of the classifier's names
(`layers.0.weight`): it leaves adapter_model.safetensors empty and writes the classifier into the
folders of those adapters, without that part. Both places are read. Its copies of the experts there
lack layers for the same reason, so the experts are read from the folders that the configuration
names.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..composition import Composition, plan_composition
from ..sites import in_run_order
from .checkpoint import Checkpoint, read_tensors
from .parts import Parts

CLASSIFIER = re.compile(
    r"(base_model\.)?internal_xlora_classifier\.layers\.((?P<index>\d+)\.)?(?P<kind>weight|bias)"
)
USED = {
    "adapters",
    "enable_softmax",
    "enable_softmax_topk",
    "global_scaling_weight",
    "hidden_size",
    "layerwise_scalings",
    "softmax_temperature",
    "top_k_lora",
    "use_trainable_adapters",
    "xlora_dropout_p",
    "xlora_size",
}
FIXED = {
    # Any other value lets the adapters take part in the first pass.
    "scaling_pass_value": (0,),
    "xlora_depth": (1, 2),
}


def recognises(config: dict[str, Any]) -> bool:
    """Whether PEFT wrote it for X-LoRA."""
    return config.get("peft_type") == "XLORA"


def read(
    checkpoint: Checkpoint, base_model: nn.Module, adapters: Sequence[str | Path] | None = None
) -> Parts:
    """Take the checkpoint apart.

    Args:
        checkpoint: what was read.
        base_model: on the meta device.
        adapters: the experts' folders, where they aren't those that the configuration names.

    Raises:
        ValueError: something in it can't be expressed.
    """
    checkpoint.check_fields(USED, FIXED)
    config = checkpoint.config
    folders = _folders(checkpoint) if adapters is None else adapters
    plan = plan_composition(base_model, folders, "static")
    linears = _classifier(checkpoint)
    layerwise = bool(config.get("layerwise_scalings"))
    parts = Parts(
        "xlora",
        {
            "task_type": plan.config.task_type,
            "num_experts": len(plan.adapters),
            "r": plan.config.r,
            "scaling_rule": "constant",
            "lora_alpha": 1.0,
            "experts": "lora" if config.get("use_trainable_adapters") else "frozen_lora",
            "target_modules": plan.config.target_modules,
            "router_scope": "site" if layerwise else "model",
            **_gate(checkpoint, len(plan.adapters)),
        },
    )
    if len(linears) > 1:
        parts.fields["router_options"]["hidden_size"] = len(linears[0][0])
        if config.get("xlora_dropout_p"):
            parts.notes.append(
                f"The classifier was trained with xlora_dropout_p={config['xlora_dropout_p']!r}; "
                "trained further, the router has no dropout."
            )
    scaled = "global_scaling_weight" in config
    _add_experts(parts, plan, checkpoint.number("global_scaling_weight") if scaled else 1.0)
    _add_routers(parts, plan, linears, layerwise)
    return parts


def _folders(checkpoint: Checkpoint) -> list[str]:
    """Of the experts, in the order of the classifier's outputs."""
    named = checkpoint.required("adapters") or {}
    if not isinstance(named, dict) or sorted(named) != sorted(map(str, range(len(named)))):
        raise ValueError(
            f"{checkpoint.source!r} has adapters={named!r}, but PEFT runs adapters of the names "
            "'0', '1', ... only; give their folders in the order of the classifier (adapters=)."
        )
    if checkpoint.config.get("use_trainable_adapters"):
        raise ValueError(
            f"{checkpoint.source!r} has use_trainable_adapters=True: its experts were trained with "
            f"the classifier, and are no longer those in {list(named.values())!r}. Give the "
            "folders of the trained ones (adapters=)."
        )
    return [named[str(number)] for number in range(len(named))]


def _classifier(checkpoint: Checkpoint) -> list[tuple[Tensor, Tensor]]:
    """Weight and bias of its linear modules, the first one first."""
    found: dict[int, dict[str, Tensor]] = {}
    _collect(found, checkpoint.tensors, None)
    for folder in sorted(path for path in checkpoint.folder.iterdir() if path.name.isdigit()):
        _collect(found, read_tensors(folder), int(folder.name))
    linears = [found[index] for index in sorted(found)]
    depth = checkpoint.config.get("xlora_depth", 1)
    if len(linears) != depth or any(len(linear) < 2 for linear in linears):
        raise ValueError(
            f"{checkpoint.source!r} holds {len(linears)} of the {depth} linear modules of its "
            "classifier. PEFT 0.21 takes them for parts of its adapters: save those tensors of "
            "model.state_dict() whose names have internal_xlora_classifier as "
            "adapter_model.safetensors."
        )
    return [(linear["weight"], linear["bias"]) for linear in linears]


def _collect(
    found: dict[int, dict[str, Tensor]], tensors: dict[str, Tensor], left_out: int | None
) -> None:
    """Add the classifier's tensors; one without a number has that of the folder."""
    for key, tensor in tensors.items():
        match = CLASSIFIER.fullmatch(key)
        index = None if match is None else match["index"] or left_out
        if match is not None and index is not None:
            found.setdefault(int(index), {})[match["kind"]] = tensor


def _gate(checkpoint: Checkpoint, count: int) -> dict[str, Any]:
    """The gate and the temperature that PEFT's settings amount to."""
    config = checkpoint.config
    softmax, again = config.get("enable_softmax", True), config.get("enable_softmax_topk", False)
    if bool(softmax) == bool(again):
        raise ValueError(
            f"{checkpoint.source!r} has enable_softmax={softmax!r} and enable_softmax_topk="
            f"{again!r}; only with one of the two are the scalings a mixture that a gate computes."
        )
    top_k = config.get("top_k_lora")
    temperature = config.get("softmax_temperature", 1.0) if softmax else 1.0
    fields: dict[str, Any] = {"gate": "dense", "router_options": {"temperature": temperature}}
    if top_k is not None and top_k != count:
        fields |= {"gate": "top_k_unnormalized" if softmax else "top_k", "top_k": top_k}
    return fields


@torch.no_grad()
def _add_experts(parts: Parts, plan: Composition, weight: float) -> None:
    """A and B of each module, with zeros for an adapter that isn't there."""
    for site in plan.sites:
        known = next(lora.factors[site] for lora in plan.adapters if site in lora.factors)
        zero = known[0].new_zeros(1, known[0].shape[1]), known[1].new_zeros(len(known[1]), 1)
        pairs = [lora.factors.get(site, zero) for lora in plan.adapters]
        name = f"{site}.molora_experts"
        parts.add_experts(name, [A for A, _ in pairs], [weight * B for _, B in pairs])


def _add_routers(
    parts: Parts, plan: Composition, linears: list[tuple[Tensor, Tensor]], layerwise: bool
) -> None:
    """The classifier as the router of the first module, or cut into one for each."""
    count, width = len(plan.adapters), linears[0][0].shape[1]
    deciding = plan.sites if layerwise else in_run_order(plan.sites)[:1]
    if len(linears[-1][0]) != count * len(deciding):
        raise ValueError(
            f"the classifier has {len(linears[-1][0])} outputs; {count} experts on "
            f"{len(deciding)} modules need {count * len(deciding)}."
        )
    for number, site in enumerate(deciding):
        d_in = parts.tensors[f"{site}.molora_experts.A"].shape[1]
        if d_in != width:
            role = "has scalings of its own" if layerwise else "decides"
            raise ValueError(
                f"the module {site!r}, which {role}, has {d_in} inputs, but the classifier reads "
                f"hidden states of width {width}; that can't be converted."
            )
        name = f"{site}.molora_router"
        for layer, (weight, bias) in enumerate(linears):
            # The last one has the outputs of all modules; what comes before serves each of them.
            last = layer == len(linears) - 1
            rows = slice(number * count, (number + 1) * count) if last else slice(None)
            parts.tensors[f"{name}.weights.{layer}"] = weight[rows].clone()
            parts.tensors[f"{name}.biases.{layer}"] = bias[rows].clone()
