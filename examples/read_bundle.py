"""Read what `molora.export_bundle` wrote, with torch and safetensors alone, and check it.

    python examples/read_bundle.py FOLDER

It is what a serving engine has to do: checksums, the router, the gate, the experts; then its own
arithmetic against the test vectors in the bundle.
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor


def read_manifest(folder: Path) -> dict[str, Any]:
    """routing.json, once every file that it names has the content that it says."""
    manifest = json.loads((folder / "routing.json").read_text())
    if manifest.get("format") != "molora-bundle" or manifest["schema_version"] != 1:
        raise ValueError(f"{folder} is not a molora bundle of schema 1.")
    for name, expected in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"the bundle is incomplete: {name} is missing.")
        if hashlib.sha256(path.read_bytes()).hexdigest() != expected["sha256"]:
            raise ValueError(f"{name} is not the file that was written: its checksum differs.")
    return manifest


def route(logits: Tensor, gate: dict[str, Any], top_k: int | None, bias: Tensor | None) -> Tensor:
    """(T, E) routing weights from (T, E) logits, as the record of the gate says."""
    scores = logits.softmax(-1) if gate["scores"] == "softmax" else logits.sigmoid()
    ranked = logits if bias is None else scores + bias
    order = ranked.sort(dim=-1, descending=True, stable=True).indices  # ties: smallest index
    selected = torch.ones_like(scores, dtype=torch.bool)
    if gate["select"] == "top_k":
        selected = torch.zeros_like(selected).scatter(-1, order[:, :top_k], True)
    elif gate["select"] == "top_p":
        largest = scores.gather(-1, order)
        before = largest.cumsum(-1) - largest
        selected = torch.zeros_like(selected).scatter(-1, order, before < gate["p"])
    elif gate["select"] == "threshold" and gate["threshold"] is None:
        most = scores == scores.amax(-1, keepdim=True)
        selected = (scores * scores.shape[-1] >= 1) | most
    elif gate["select"] == "threshold":
        selected = scores >= gate["threshold"]
    weights = scores * selected
    if gate["renormalize"]:
        weights = weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo().tiny)
    return gate["scale"] * weights


def check(folder: Path) -> int:
    """Recompute every test vector; returns the number of sites."""
    manifest = read_manifest(folder)
    router, parity = (load_file(folder / f"{n}.safetensors") for n in ("router", "parity"))
    experts = {
        path.parent.name: load_file(path)
        for path in folder.glob("experts/*/adapter_model.safetensors")
    }
    tolerance = 1e-4 if manifest["dtype"] in ("float32", "float64") else 5e-2
    close = {"rtol": tolerance, "atol": tolerance}
    decided: dict[str | None, Tensor] = {}
    for site in manifest["sites"]:
        name = site["name"]
        x, expected = parity[f"{name}.input"], parity[f"{name}.output"]
        if site["router_site"] == name:
            logits = x @ router[f"{name}.weight"].T + router.get(f"{name}.bias", torch.zeros(()))
            logits = logits / manifest["router"]["temperature"]
            torch.testing.assert_close(logits, parity[f"{name}.logits"], **close)
            bias = router.get(f"{name}.selection_bias")
            decided[name] = route(logits, manifest["gate"], site.get("top_k"), bias)
            torch.testing.assert_close(decided[name], parity[f"{name}.weights"], **close)
        output = torch.zeros_like(expected)
        folders = [f"e{e}" for e in range(len(site["ranks"]))]
        folders += [f"shared{e}" for e in range(len(site["shared_ranks"]))]
        ranks = site["ranks"] + site["shared_ranks"]
        for e, folder_name in enumerate(folders):
            if ranks[e] == 0:  # the expert has no part in this module
                continue
            key = f"base_model.model.{name}.lora_"
            A, B = (experts[folder_name][f"{key}{f}.weight"].float() for f in "AB")
            routed = e < len(site["ranks"])
            weight = decided[site["router_site"]][:, e, None] if routed else 1.0
            output = output + weight * (x @ A.T @ B.T)
        torch.testing.assert_close(output, expected, **close)
    return len(manifest["sites"])


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python examples/read_bundle.py FOLDER")
    print(f"{check(Path(sys.argv[1]))} sites compute what the bundle says")
