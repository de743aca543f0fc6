"""The mixture that a composition should be: adapters' dense deltas, weighted by a formula."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

# Unlike ranks, scalings and targets: the third has no v_proj and, of the first layer, nothing.
SPECS: list[dict[str, Any]] = [
    {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "up_proj", "v_proj"]},
    {"r": 4, "lora_alpha": 3, "use_rslora": True, "target_modules": ["q_proj", "v_proj"]},
    {
        "r": 3,
        "lora_alpha": 6,
        "target_modules": ["q_proj", "up_proj"],
        "layers_to_transform": [1],
        "rank_pattern": {"up_proj": 1},
        "alpha_pattern": {"q_proj": 5},
    },
]
Formula = Callable[[Tensor, str, list[Tensor], list[bool]], Tensor]


def deltas(folder: str) -> dict[str, Tensor]:
    """Site -> s B A of a saved adapter, from PEFT's own layers' merged weights."""
    config = json.loads((Path(folder) / "adapter_config.json").read_text())
    state, found = load_file(Path(folder) / "adapter_model.safetensors"), {}
    for key, A in state.items():
        if key.endswith("lora_A.weight"):
            site = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            last = site.rpartition(".")[2]
            alpha = config["alpha_pattern"].get(last, config["lora_alpha"])
            scale = alpha / (len(A) ** 0.5 if config["use_rslora"] else len(A))
            found[site] = scale * state[key.replace("lora_A", "lora_B")] @ A
    return found


def by_formula(model: Any, folders: list[str], formula: Formula, batch: dict) -> Tensor:
    """Logits of the base model with the experts' dense deltas, weighted by `formula` at each site.

    `formula(x (T, d_in), site, deltas, present)` gives the routing weights (T, E).
    """
    experts = [deltas(folder) for folder in folders]
    for site in {site for expert in experts for site in expert}:
        module = model.get_submodule(site)
        zero = torch.zeros_like(module.weight)
        dense = [expert.get(site, zero) for expert in experts]
        present = [site in expert for expert in experts]

        def add(module, args, output, site=site, dense=dense, present=present):
            x = args[0].flatten(0, 1)
            weights = formula(x, site, dense, present)
            parts = [weights[:, e, None] * (x @ d.mT) for e, d in enumerate(dense)]
            return output + sum(parts).view_as(output)

        module.register_forward_hook(add)
    with torch.no_grad():
        return model(**batch).logits


def top_2(scores: Tensor, present: list[bool]) -> Tensor:
    """Softmax over the two largest scores of those present, token by token."""
    weights = torch.zeros_like(scores)
    here = [e for e, yes in enumerate(present) if yes]
    for t, row in enumerate(scores):
        best = sorted(here, key=lambda e: -row[e])[:2]
        weights[t, best] = row[best].softmax(0)
    return weights


def random_gates(folders: list[str]) -> list[dict[str, Tensor]]:
    """A vector for each module that an adapter targets."""
    generator = torch.Generator().manual_seed(5)
    return [
        {site: torch.randn(d.shape[1], generator=generator).double() for site, d in found.items()}
        for found in map(deltas, folders)
    ]


def phatgoose_scores(x: Tensor, site: str, gates: list[dict[str, Tensor]]) -> Tensor:
    """(T, E) <LN(x), LN(v_e)> / sqrt(d_in), with 0 for the adapters that aren't there."""
    size = (x.shape[1],)
    v = torch.stack([g.get(site, torch.zeros(size, dtype=x.dtype)) for g in gates])
    return F.layer_norm(x, size) @ F.layer_norm(v, size).mT / size[0] ** 0.5


def router_of(model: Any, site: str) -> Any:
    """The router of a site of a composed model."""
    return model.get_base_model().get_submodule(site).molora_router["default"]
