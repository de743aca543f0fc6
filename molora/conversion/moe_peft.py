"""MixLoRA, MoLA and LoRAMoE as moe-peft 2.0 and mixlora 0.2 save them (TUDB-Labs).

Tensors are named `mixlora.layers.0.mlp.up_proj.experts.3.lora_A.weight`, and the router
`mixlora.layers.0.mlp.moe_gate.weight`; the other two methods have a router in each module, and
modules without experts a plain LoRA.
"""

import math
import re
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from .checkpoint import Checkpoint
from .parts import Parts, in_order

KEY = re.compile(
    r"(?P<family>mixlora|mola|loramoe)\.(?P<site>layers\.\d+\.(self_attn|mlp)(\.(?P<module>\w+))?)\."
    r"(moe_gate|(experts\.(?P<expert>\d+)\.)?lora_(?P<factor>[AB]))\.weight"
)
FEED_FORWARD = r"mlp\.\w+"
PLAIN = r"self_attn\.\w+"
STRATEGIES = ("mixlora", "mixlora-dynamic", "mixlora-switch", "mola", "loramoe")
METHODS = dict(zip(("MIXLORA", "MOLA", "LORAMOE"), ("mixlora", "mola", "loramoe"), strict=True))
USED = {
    "act_fn",
    "expert_capacity",
    "expert_lora",
    "lora_alpha",
    "lora_dropout",
    "num_experts",
    "r",
    "routing_strategy",
    "target_modules",
    "top_k",
    "top_p",
    "use_rslora",
}
FIXED = {
    "bias": ("none",),
    # The magnitudes aren't in the file: what was trained is lost already.
    "use_dora": (False,),
    "temperature": (0, 1, None),
    # Neither does anything in moe-peft.
    "sparse_step": (None, 1),
}


def recognises(config: dict[str, Any]) -> bool:
    """Whether that is how moe-peft describes an adapter."""
    return str(config.get("peft_type")) in METHODS


def read(checkpoint: Checkpoint, base_model: nn.Module) -> Parts:
    """Take the checkpoint apart; `ValueError` for what can't be expressed."""
    config = checkpoint.config
    checkpoint.check_fields(USED, FIXED)
    family = METHODS[config["peft_type"]]
    strategy = config.get("routing_strategy", family)
    if strategy not in STRATEGIES:
        raise ValueError(
            f"{checkpoint.source!r} has routing_strategy={strategy!r}; known: "
            f"{', '.join(STRATEGIES)}. 'mixtral' is that of mixlora before 0.2: its repository's "
            "misc/legacy_weights_convertor.py brings the file up to date."
        )
    if not strategy.startswith(family):
        raise ValueError(
            f"{checkpoint.source!r} has peft_type={config['peft_type']!r} and "
            f"routing_strategy={strategy!r}, which contradict one another."
        )
    _check_activation(checkpoint, base_model)
    parts = Parts(strategy, {"task_type": _task_type(checkpoint)})
    plain = _add_tensors(parts, checkpoint, family)
    parts.fields |= _sizes(parts, checkpoint, plain) | _gate(parts, checkpoint)
    return parts


def _add_tensors(parts: Parts, checkpoint: Checkpoint, family: str) -> bool:
    """Rename the tensors; True if there are modules of plain LoRA."""
    routed: dict[str, dict[str, dict[int, Tensor]]] = {}
    plain: dict[str, dict[str, dict[int, Tensor]]] = {}
    modules = set()
    for match, tensor in checkpoint.named_by(KEY):
        if match["family"] != family:
            raise ValueError(
                f"{checkpoint.source!r} holds {match.string}, a tensor of {match['family']}, but "
                f"its configuration is of {family}."
            )
        site, module = f"model.{match['site']}", match["module"]
        if match["factor"] is None:
            parts.tensors[f"{site}.molora_router.weight"] = tensor
            continue
        modules.add(module)
        name = f"{site}.molora_experts"
        if family == "mixlora" and match["expert"] is not None:
            name = f"{site.removesuffix(f'.{module}')}.molora_experts.linears.{module}"
        found = plain if match["expert"] is None else routed
        factors = found.setdefault(name, {"A": {}, "B": {}})
        factors[match["factor"]][int(match["expert"] or 0)] = tensor
    for found, count in ((routed, checkpoint.count("num_experts")), (plain, 1)):
        for name, factors in found.items():
            downs, ups = (in_order(factors[factor], count, name) for factor in "AB")
            parts.add_experts(name, downs, ups)
    parts.fields["target_modules"] = sorted(modules)
    return bool(plain)


def _sizes(parts: Parts, checkpoint: Checkpoint, plain: bool) -> dict[str, Any]:
    """Experts, ranks and scalings; `expert_lora` overrides those of the experts alone."""
    config = checkpoint.config
    override = config.get("expert_lora") or {}
    if not isinstance(override, dict):
        raise ValueError(
            f"{checkpoint.source!r} has expert_lora={override!r}, which is no mapping."
        )
    replace(checkpoint, config=override).check_fields(USED, FIXED)
    experts = replace(checkpoint, config={**config, **override})
    count, rank = experts.count("num_experts"), experts.count("r")
    alpha = experts.number("lora_alpha")
    rooted = bool(experts.config.get("use_rslora"))
    fields: dict[str, Any] = {
        "num_experts": count,
        "num_shared_experts": 0,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": experts.config.get("lora_dropout", 0.0),
        "use_rslora": rooted,
    }
    if not plain:
        return fields
    fields["num_experts"] = {FEED_FORWARD: count, ".*": 0}
    fields["num_shared_experts"] = {FEED_FORWARD: 0, ".*": 1}
    fields["r"] = {FEED_FORWARD: rank, ".*": (plain_rank := checkpoint.count("r"))}
    scaling = checkpoint.number("lora_alpha") / _root(plain_rank, bool(config.get("use_rslora")))
    plain_alpha = scaling * _root(plain_rank, rooted)
    if plain_alpha != alpha:
        fields["alpha_pattern"] = {PLAIN: plain_alpha}
    if config.get("lora_dropout", 0.0) != fields["lora_dropout"]:
        parts.notes.append(
            f"Attention was trained with lora_dropout={config.get('lora_dropout')!r}; an adapter "
            f"has one dropout, here that of the experts, {fields['lora_dropout']!r}."
        )
    return fields


def _root(rank: int, rooted: bool) -> float:
    return math.sqrt(rank) if rooted else rank


def _gate(parts: Parts, checkpoint: Checkpoint) -> dict[str, Any]:
    config = checkpoint.config
    if parts.method == "mixlora-dynamic":
        return {"gate_options": {"p": config.get("top_p", 0.8)}}
    if parts.method == "mixlora-switch":
        parts.notes.append(
            "Outside training moe-peft 2.0.2 passes the input of each network on unchanged. This "
            "adapter computes what training computed for tokens within the capacity."
        )
        return {"gate_options": {"capacity": config.get("expert_capacity", 32)}}
    return {} if parts.method == "loramoe" else {"top_k": config.get("top_k", 2)}


def _check_activation(checkpoint: Checkpoint, base_model: nn.Module) -> None:
    """Refuse experts that run another activation than their base model's network."""
    config: Any = getattr(base_model, "config", None)
    names = ("hidden_act", "hidden_activation", "activation_function")
    own = next((value for name in names if (value := getattr(config, name, None))), None)
    given = checkpoint.config.get("act_fn")
    if given is not None and own is not None and given != own:
        raise ValueError(
            f"{checkpoint.source!r} has act_fn={given!r}, but the base model's networks run "
            f"{own!r}, and so do their experts here."
        )


def _task_type(checkpoint: Checkpoint) -> str:
    given = checkpoint.config.get("task_type") or "CAUSAL_LM"
    # moe-peft answers questions with a language model too.
    if given not in ("CAUSAL_LM", "QUESTION_ANS"):
        raise ValueError(
            f"{checkpoint.source!r} has task_type={given!r}: the classifier that it trained beside "
            "the adapter can't be converted, only 'CAUSAL_LM' or 'QUESTION_ANS' can."
        )
    return "CAUSAL_LM"
