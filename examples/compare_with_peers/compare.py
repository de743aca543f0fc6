"""The same weights and the same batch in MoLoRA and in its peers: how far apart are the results?

    python examples/compare_with_peers/compare.py

- moe-peft 2.0.2: MoLA and LoRAMoE, logits and every gradient, on a tiny Llama. It needs an older
  transformers than this library, so it runs as a process of its own in an environment of its own,
  outputs/peers/moe-peft, which is made at the first call (from PyPI; minutes). The two exchange
  safetensors files.
- moe-peft's own checkpoints of all its methods, converted by `molora.convert`: logits, against
  moe-peft and, for MixLoRA, against mixlora 0.2.3, the authors' loader.
- PEFT: HydraLoRA's formula from PEFT's own LoRA layers, because no package on PyPI has the method;
  and X-LoRA, whose classifier decides in PEFT and whose mixture is computed by both.

What is left is rounding: all of it runs in fp32. Where a difference is meant, the method's file
says so under `deviations`. The last line shows one of moe-peft's: its experts' dropout stays on in
evaluation, so the comparison has to switch it off by its rate.
"""

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft_side
import torch
from converted import compare_converted
from peft import get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.utils import logging

import molora
from molora import MoloraConfig
from molora.layer import MoloraLayer

HERE = Path(__file__).resolve().parent
PEERS = HERE.parents[1] / "outputs" / "peers"
PACKAGES = ("moe-peft==2.0.2", "mixlora==0.2.3")
# As moe_peft_side.py has them; without dropout, which is drawn differently.
EXPERTS = 4
FIELDS = {"num_experts": EXPERTS, "r": 3, "lora_alpha": 6, "lora_dropout": 0.0}
Rows = list[tuple[str, str, float, float]]


@molora.register_router("given")
class GivenRouter(molora.Router):
    """Logits that somebody else has computed, for the next pass."""

    given: Tensor

    def reset_parameters(self) -> None:
        pass

    def compute_logits(self, inputs: molora.SiteInput) -> Tensor:
        return self.given


def peer_python(environment: Path) -> Path:
    """The interpreter of moe-peft's environment, which is made where there is none."""
    python = environment / "bin" / "python"
    if not python.exists():
        print(f"installing moe-peft into {environment} ...", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
        install = [str(python), "-m", "pip", "install", "--quiet"]
        subprocess.run([*install, "-r", str(HERE / "requirements.txt")], check=True)
        subprocess.run([*install, "--no-deps", *PACKAGES], check=True)
    return python


def adapter_state(peer: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    """moe-peft's tensors under our names: its experts one by one become blocks of A and B.

    Args:
        peer: the file of a method.
        kind: "weight" or "gradient".
    """
    state = {}
    gates = [key for key in peer if key.startswith(f"{kind} ") and key.endswith("moe_gate.weight")]
    for key in gates:
        theirs = key.removesuffix(".moe_gate.weight")
        _, _, site = theirs.partition(".")
        A, B = (
            [peer[f"{theirs}.experts.{e}.lora_{factor}.weight"] for e in range(EXPERTS)]
            for factor in "AB"
        )
        ours = f"base_model.model.model.{site}."
        state[ours + "molora_experts.A"] = torch.cat(A)
        state[ours + "molora_experts.B"] = torch.cat(B, dim=1)
        state[ours + "molora_router.weight"] = peer[key]
    return state


def largest(ours: Tensor, theirs: Tensor) -> tuple[float, float]:
    """Largest absolute difference, and the largest magnitude it is to be compared with."""
    return (ours - theirs).abs().max().item(), theirs.abs().max().item()


def compare_base(folder: Path) -> Rows:
    """Without experts: what the two versions of transformers make of the same Llama."""
    peer = load_file(folder / "base.safetensors")
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    with torch.no_grad():
        output = model(input_ids=peer["input_ids"], attention_mask=peer["attention_mask"])
    real = peer["attention_mask"].bool()
    return [("no adapter", "logits", *largest(output.logits[real], peer["logits"][real]))]


def compare_with_moe_peft(folder: Path, name: str, **fields: Any) -> Rows:
    """A method of moe-peft: logits, gradients and, where it has one, its balance loss."""
    peer = load_file(folder / f"{name}.safetensors")
    config = MoloraConfig.from_method(name, task_type="CAUSAL_LM", **{**FIELDS, **fields})
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "base"), config)
    weights = adapter_state(peer, "weight")
    assert not set_peft_model_state_dict(model, weights).unexpected_keys
    batch = {key: peer[key] for key in ("input_ids", "attention_mask")}
    with molora.observe(model) as records:
        logits = model(**batch).logits
    (logits * peer["probe"]).sum().backward()
    real = batch["attention_mask"].bool()
    rows = [(name, "logits", *largest(logits[real].detach(), peer["logits"][real]))]
    gradients = adapter_state(peer, "gradient")
    named = dict(model.named_parameters())
    ours, theirs = [], []
    for key, gradient in gradients.items():
        module, _, parameter = key.rpartition(".")
        ours.append(named[f"{module}.default.{parameter}"].grad.flatten())
        theirs.append(gradient.flatten())
    rows.append((name, f"{len(ours)} gradients", *largest(torch.cat(ours), torch.cat(theirs))))
    if "balance loss" in peer:
        loss = pooled_balance(list(records.values()))
        rows.append((name, "its balance loss", *largest(loss, peer["balance loss"])))
    return rows


def pooled_balance(records: list[molora.Routing]) -> Tensor:
    """moe-peft's balance loss of our decisions: one product for the whole model, K at balance.

    Ours is a product per site, divided by K, and the mean of those: 1 at balance.
    """
    weights = torch.cat([record.weights[record.mask] for record in records])
    probs = torch.cat([record.probs[record.mask] for record in records])
    return EXPERTS * ((weights > 0).float().mean(0) * probs.mean(0)).sum()


def compare_hydralora() -> Rows:
    """Against PEFT's LoRA layers, mixed by the published formula."""
    peer = peft_side.hydralora()
    linear = nn.Linear(peer["weight"].shape[1], peer["weight"].shape[0])
    linear.load_state_dict({"weight": peer["weight"], "bias": peer["bias"]})
    base = nn.Sequential()
    base.add_module("up", linear)
    fields = {**FIELDS, "lora_alpha": peft_side.ALPHA, "target_modules": ["up"]}
    model = get_peft_model(base, MoloraConfig.from_method("hydralora", **fields))
    state = {"experts.A": peer["A"], "experts.B": torch.cat(list(peer["B"]), dim=1)}
    state["router.weight"] = peer["W_r"]
    named = {f"base_model.model.up.molora_{key}": value for key, value in state.items()}
    assert not set_peft_model_state_dict(model, named).unexpected_keys
    with torch.no_grad():
        return [("hydralora", "output", *largest(model(peer["x"]), peer["output"]))]


@torch.no_grad()
def compare_xlora(base: Path, folder: Path, batch: dict[str, Tensor]) -> Rows:
    """PEFT's X-LoRA decides; both mix LoRA experts of unequal ranks by those weights.

    Args:
        base: folder of a Llama.
        folder: where the experts are written.
        batch: input_ids and attention_mask.
    """
    adapters = peft_side.write_loras(base, folder)
    logits, weights, factors = peft_side.xlora(base, adapters, batch)
    config = MoloraConfig(
        task_type="CAUSAL_LM",
        num_experts=len(adapters),
        r={".*": list(peft_side.RANKS)},
        lora_alpha=peft_side.ALPHA,
        target_modules=peft_side.TARGETS,
        gate="dense",
        router="given",
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    for layer in model.modules():
        if isinstance(layer, MoloraLayer):
            site = layer.molora_allocation["default"].site.name
            layer.molora_router["default"].given = weights[site].log()
            layer.molora_experts["default"].A.copy_(factors[site][0])
            layer.molora_experts["default"].B.copy_(factors[site][1])
    real = batch["attention_mask"].bool()
    return [("x-lora", "logits", *largest(model(**batch).logits[real], logits[real]))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=PEERS / "exchange")
    parser.add_argument("--environment", type=Path, default=PEERS / "moe-peft")
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    folder = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    python = peer_python(arguments.environment)
    for script in ("moe_peft_side.py", "moe_peft_checkpoints.py"):
        side = [str(python), str(HERE / script), str(folder)]
        done = subprocess.run(side, capture_output=True, text=True)
        if done.returncode != 0:
            raise SystemExit(f"moe-peft's process failed:\n{done.stderr[-4000:]}")
    peer = load_file(folder / "base.safetensors")
    batch = {key: peer[key] for key in ("input_ids", "attention_mask")}
    rows = [
        *compare_base(folder),
        *compare_with_moe_peft(folder, "mola"),
        *compare_with_moe_peft(folder, "loramoe"),
        *compare_converted(folder),
        *compare_hydralora(),
        *compare_xlora(folder / "base", folder / "loras", batch),
    ]
    print(f"{'method':<19} {'compared':<17} {'max |ours - theirs|':>19} {'max |theirs|':>13}")
    for method, what, difference, size in rows:
        print(f"{method:<19} {what:<17} {difference:19.1e} {size:13.2f}")
    drift = load_file(folder / "dropout.safetensors")["difference"].item()
    print(f"moe-peft, dropout 0.5, two passes after eval(): logits differ by {drift:.2f}")


if __name__ == "__main__":
    main()
