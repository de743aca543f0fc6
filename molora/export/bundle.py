"""Everything that a serving engine needs to route by itself.

    experts/e0 ... shared0 ...   plain PEFT LoRA adapters, every scaling inside lora_B
    router.safetensors           SITE.weight (E, d_in), SITE.bias, SITE.selection_bias, fp32
    parity.safetensors           SITE.input (n, d_in), .logits, .weights (n, E), .output (n, d_out)
    routing.json                 what to do with them; checksums of the other files
    README.md                    the model card

routing.json, schema 1: "format" ("molora-bundle"), "schema_version", "molora_version", "method",
"base" (name, revision, fingerprint), "dtype" of the experts, "router" and "gate" (`semantics`),
"sites" in the order of the model, "files" (path -> sha256, bytes). A site has its "name", the
"fused_group" that it shares its input with, "router_site" (whose decision it takes; null where
nothing is routed), "in_features", "out_features", "ranks", "shared_ranks" and, where it decides by
a fixed number of experts, "top_k". What is added to its output, `.output`, is the sum over e of
w_e B_e (A_e x), and with weight 1 the shared experts.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..evaluating import evaluating
from ..gates import Gate
from ..gates.sigmoid import Sigmoid
from ..routers import LinearRouter, Router
from ..routing import Routing, SiteInput
from ..sites import block_of
from ..version import __version__
from .card import write_card
from .fingerprint import base_fingerprint
from .folder import new_folder
from .lora import write_experts
from .peft_folder import Source, source_of
from .semantics import gate_record, router_record

SCHEMA_VERSION = 1
PARITY_TOKENS = 4


def export_bundle(
    model: nn.Module,
    out_dir: str | Path,
    *,
    adapter_name: str = "default",
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a routed adapter for engines that route by themselves: experts, router, its semantics,
    and test vectors. `examples/read_bundle.py` reads it with torch and safetensors alone.

    Args:
        model: a model with a MoLoRA adapter.
        out_dir: folder to be made; it appears when everything in it is written.
        adapter_name: which adapter.
        dtype: of the experts' files; None for their own.
        overwrite: replace a folder that isn't empty.

    Returns:
        The folder.

    Raises:
        ValueError: the router isn't linear in the module's input, the gate isn't one that the
            record can describe, the experts aren't LoRA, or the adapter has trained more than them.
        FileExistsError: the folder isn't empty.
    """
    source = source_of(model, adapter_name)
    described = _semantics(source)
    with new_folder(out_dir, overwrite) as folder:
        (folder / "experts").mkdir()
        names = write_experts(folder / "experts", source, dtype)
        save_file(_router_tensors(source), folder / "router.safetensors")
        save_file(_parity(source), folder / "parity.safetensors")
        text = f"Experts: {', '.join(names)}. Routing: `routing.json`; the reader checks it."
        write_card(folder, "Mixture of LoRA experts, for engines", source, [text])
        manifest = {
            "format": "molora-bundle",
            "schema_version": SCHEMA_VERSION,
            "molora_version": __version__,
            "method": source.config.method,
            "base": {
                "name": source.config.base_model_name_or_path,
                "revision": source.config.revision,
                "fingerprint": base_fingerprint(model),
            },
            "dtype": str(dtype or source.dtype).removeprefix("torch."),
            **described,
            "sites": [_site(source, site) for site in source.layers],
            "files": _files(folder),
        }
        (folder / "routing.json").write_text(json.dumps(manifest, indent=2), encoding="utf-8")
    return Path(out_dir)


def _semantics(source: Source) -> dict[str, Any]:
    """The records of router and gate, which are alike at all sites but for sizes."""
    name = source.adapter_name
    deciding = [layer for layer in source.layers.values() if name in layer.molora_router]
    if not deciding:
        raise ValueError(
            f"the adapter {name!r} routes nothing; molora.export_lora writes it exactly."
        )
    return {
        "router": router_record(cast(Router, deciding[0].molora_router[name])),
        "gate": gate_record(cast(Gate, deciding[0].molora_gate[name])),
    }


def _files(folder: Path) -> dict[str, dict[str, Any]]:
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        found[path.relative_to(folder).as_posix()] = {
            "sha256": digest,
            "bytes": path.stat().st_size,
        }
    return found


def _site(source: Source, site: str) -> dict[str, Any]:
    layer = source.layers[site]
    allocation = layer.molora_allocation[source.adapter_name]
    factors = layer.experts_of(source.adapter_name).lora_factors()
    description = {
        "name": site,
        "fused_group": block_of(site),
        "router_site": allocation.router_site,
        "in_features": allocation.site.in_features,
        "out_features": allocation.site.out_features,
        "ranks": list(factors.ranks[: factors.num_routed]),
        "shared_ranks": list(factors.ranks[factors.num_routed :]),
    }
    if source.adapter_name in layer.molora_gate and allocation.top_k is not None:
        description["top_k"] = allocation.top_k
    return description


def _router_tensors(source: Source) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for site, layer in source.layers.items():
        if source.adapter_name not in layer.molora_router:
            continue
        router = cast(LinearRouter, layer.molora_router[source.adapter_name])
        gate = layer.molora_gate[source.adapter_name]
        tensors[f"{site}.weight"] = router.weight
        if router.bias is not None:
            tensors[f"{site}.bias"] = router.bias
        if isinstance(gate, Sigmoid) and gate.bias is not None:
            tensors[f"{site}.selection_bias"] = gate.bias.rate * gate.bias.steps
    return {k: v.detach().to("cpu", torch.float32).contiguous() for k, v in tensors.items()}


@torch.no_grad()
def _parity(source: Source) -> dict[str, Tensor]:
    """A few random tokens for each site, and what the library's own modules make of them."""
    name, tensors = source.adapter_name, {}
    generator = torch.Generator().manual_seed(0)
    with evaluating(source.model):
        for site, layer in source.layers.items():
            experts = layer.experts_of(name)
            allocation = layer.molora_allocation[name]
            x = torch.randn(PARITY_TOKENS, allocation.site.in_features, generator=generator)
            x = x.to(next(experts.parameters()))
            if name in layer.molora_router:
                logits = layer.molora_router[name](SiteInput(x))
                routing: Routing = layer.molora_gate[name](logits, SiteInput(x))
                tensors[f"{site}.logits"], tensors[f"{site}.weights"] = logits, routing.weights
            leader = allocation.router_site
            weights = None if leader is None else tensors[f"{leader}.weights"].to(x.device)
            nothing = x.new_zeros(PARITY_TOKENS, allocation.site.out_features)
            tensors[f"{site}.input"], tensors[f"{site}.output"] = x, experts(x, weights, nothing)
    return {k: v.detach().to("cpu", torch.float32).contiguous() for k, v in tensors.items()}
