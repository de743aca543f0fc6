"""HydraLoRA and LoRAMoE as their authors' repositories save them (Clin0212/HydraLoRA,
Ablustrund/LoRAMoE).

Both carry a PEFT of their own, whose type "LORA" has a field `lora_nums`. A module has
`lora_B0.weight`, `lora_B1.weight`, ..., a router `lora_route.weight`, and one `lora_A.weight`
(HydraLoRA) or as many A as B (LoRAMoE).
"""

import re
from typing import Any

from torch import Tensor, nn

from ..export.peft_folder import target_modules
from .checkpoint import Checkpoint
from .parts import Parts, in_order

KEY = re.compile(
    r"base_model\.model\.(?P<site>.+)\.lora_((?P<factor>[AB])(?P<expert>\d*)|route)\.weight"
)
USED = {
    "blc_alpha",
    "blc_weight",
    "lora_alpha",
    "lora_dropout",
    "lora_nums",
    "merge_weights",
    "r",
    "target_modules",
}
FIXED: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "enable_lora": (None,),
    "fan_in_fan_out": (False,),
    "modules_to_save": (None, []),
}


def recognises(config: dict[str, Any]) -> bool:
    """Whether those repositories wrote it."""
    return config.get("peft_type") == "LORA" and "lora_nums" in config


def read(checkpoint: Checkpoint, base_model: nn.Module) -> Parts:
    """Take the checkpoint apart; `ValueError` for what can't be expressed."""
    checkpoint.check_fields(USED, FIXED)
    config = checkpoint.config
    count = checkpoint.count("lora_nums")
    downs, ups, routers = _by_site(checkpoint)
    shared = any("" in found for found in downs.values())
    parts = Parts(
        "hydralora" if shared else "loramoe",
        {
            "task_type": config.get("task_type"),
            "num_experts": count,
            "r": checkpoint.required("r"),
            "lora_alpha": checkpoint.required("lora_alpha"),
            "lora_dropout": config.get("lora_dropout") or 0.0,
            "target_modules": target_modules(base_model, downs),
        },
    )
    for site in dict.fromkeys([*downs, *ups, *routers]):
        found = downs.get(site, {})
        name = f"{site}.molora_experts"
        if shared and found.keys() != {""}:
            raise ValueError(
                f"{checkpoint.source!r} has not one lora_A, which all share, of {site!r}."
            )
        A = [found[""]] if shared else in_order(_numbered(found), count, f"lora_A of {site}")
        B = in_order(_numbered(ups.get(site, {})), count, f"lora_B of {site}")
        if site not in routers:
            raise ValueError(f"{checkpoint.source!r} has no lora_route of {site!r}.")
        parts.add_experts(name, A, B)
        parts.tensors[f"{site}.molora_router.weight"] = routers[site]
    if config.get("blc_weight"):
        parts.notes.append(
            f"It was trained with a balance loss over tasks, blc_weight={config['blc_weight']!r} "
            f"and blc_alpha={config.get('blc_alpha')!r}, which isn't switched on here "
            "(losses={'localized_balancing': ...})."
        )
    return parts


BySite = dict[str, dict[str, Tensor]]


def _by_site(checkpoint: Checkpoint) -> tuple[BySite, BySite, dict[str, Tensor]]:
    """A and B by site and number, "" for none, and the routers by site."""
    factors: dict[str, BySite] = {"A": {}, "B": {}}
    routers = {}
    for match, tensor in checkpoint.named_by(KEY):
        if match["factor"] is None:
            routers[match["site"]] = tensor
        else:
            factors[match["factor"]].setdefault(match["site"], {})[match["expert"]] = tensor
    return factors["A"], factors["B"], routers


def _numbered(found: dict[str, Tensor]) -> dict[int, Tensor]:
    return {int(number): tensor for number, tensor in found.items() if number}
