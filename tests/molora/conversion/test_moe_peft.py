"""Checkpoints in moe-peft's layout, against the methods' formulas written out expert by expert.

examples/compare_with_peers does the same with moe-peft itself, in an environment of its own.
"""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor

import molora
from molora.conversion import plan_conversion

EXPERTS, RANK, ALPHA = 3, 2, 5
ATTENTION = {"q_proj": (32, 32), "v_proj": (32, 16)}
NETWORK = {"gate_proj": (32, 48), "up_proj": (32, 48), "down_proj": (48, 32)}
COMMON = {
    "bias": "none",
    "r": RANK,
    "lora_alpha": ALPHA,
    "lora_dropout": 0.05,
    "num_experts": EXPERTS,
    "task_type": "CAUSAL_LM",
}
MIXLORA = {**COMMON, "peft_type": "MIXLORA", "act_fn": "silu"}
TOP_2 = {**MIXLORA, "routing_strategy": "mixlora", "top_k": 2}
CASES: dict[str, dict[str, Any]] = {
    "mixlora": TOP_2,
    "mixlora, expert_lora": {
        **TOP_2, "expert_lora": {"r": 4, "lora_alpha": 3, "use_rslora": True, "bias": "none"},
    },
    "mixlora-dynamic": {
        **MIXLORA, "routing_strategy": "mixlora-dynamic", "top_p": 0.7, "temperature": 0.0,
    },
    "mixlora-switch": {**MIXLORA, "routing_strategy": "mixlora-switch", "expert_capacity": 4},
    "mola": {**COMMON, "peft_type": "MOLA", "routing_strategy": "mola", "top_k": 2},
    "mola, rslora": {**COMMON, "peft_type": "MOLA", "top_k": 3, "use_rslora": True},
    "loramoe": {**COMMON, "peft_type": "LORAMOE", "routing_strategy": "loramoe"},
}  # fmt: skip


def checkpoint(name: str, attention: bool = True) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and random weights of a two-layer Llama's adapter, as moe-peft names them."""
    config = dict(CASES[name])
    prefix = config["peft_type"].lower()
    expert_rank = config.get("expert_lora", config)["r"]
    generator = torch.Generator().manual_seed(3)
    tensors: dict[str, Tensor] = {}

    def fill(key: str, *shape: int) -> None:
        tensors[key] = 0.4 * torch.randn(*shape, generator=generator, dtype=torch.float64)

    for layer in range(2):
        root = f"{prefix}.layers.{layer}"
        if prefix == "mixlora":
            fill(f"{root}.mlp.moe_gate.weight", EXPERTS, 32)
        modules = {f"mlp.{module}": sizes for module, sizes in NETWORK.items()}
        if attention:
            modules |= {f"self_attn.{module}": sizes for module, sizes in ATTENTION.items()}
        for module, (d_in, d_out) in modules.items():
            routed = module.startswith("mlp") or prefix == "mola"
            if routed and prefix != "mixlora":
                fill(f"{root}.{module}.moe_gate.weight", EXPERTS, d_in)
            for e in range(EXPERTS if routed else 1):
                key = f"{root}.{module}" + (f".experts.{e}" if routed else "")
                rank = expert_rank if routed else RANK
                fill(f"{key}.lora_A.weight", rank, d_in)
                fill(f"{key}.lora_B.weight", d_out, rank)
    config["target_modules"] = sorted({key.split(".")[4] for key in tensors if "lora_" in key})
    return config, tensors


def scaling(fields: dict[str, Any]) -> float:
    root = math.sqrt(fields["r"]) if fields.get("use_rslora") else fields["r"]
    return fields["lora_alpha"] / root


def routing(name: str, config: dict[str, Any], logits: Tensor) -> Tensor:
    """Weights (T, E), token by token."""
    rows = []
    for p in logits.softmax(-1):
        w = torch.zeros_like(p)
        order = sorted(range(EXPERTS), key=lambda e: -p[e])
        if name == "loramoe":
            w = p
        elif name == "mixlora-switch":
            w[order[0]] = p[order[0]]
        elif name == "mixlora-dynamic":
            total = 0.0
            for e in order:
                w[e] = p[e]
                total += float(p[e])
                if total > config["top_p"]:
                    break
        else:
            best = order[: config["top_k"]]
            w[best] = p[best] / p[best].sum()
        rows.append(w)
    return torch.stack(rows)


def by_formula(model: Any, name: str, config: dict[str, Any], tensors: dict, batch: dict) -> Tensor:
    """Logits of the base model with the adapter computed as the methods define it."""
    prefix = config["peft_type"].lower()
    experts = {**config, **config.get("expert_lora", {})}

    def delta(key: str, fields: dict[str, Any], x: Tensor) -> Tensor:
        A, B = (tensors[f"{key}.lora_{factor}.weight"] for factor in "AB")
        return scaling(fields) * x @ A.T @ B.T

    def per_module(key: str) -> Callable:
        def add(module: Any, args: tuple, output: Tensor) -> Tensor:
            x = args[0].flatten(0, 1)
            if f"{key}.moe_gate.weight" not in tensors:
                return output + delta(key, config, x).view_as(output)
            w = routing(prefix, config, x @ tensors[f"{key}.moe_gate.weight"].T)
            parts = [w[:, e, None] * delta(f"{key}.experts.{e}", config, x) for e in range(EXPERTS)]
            return output + sum(parts).view_as(output)

        return add

    def network(root: str) -> Callable:
        def run(mlp: Any, args: tuple, output: Tensor) -> Tensor:
            x = args[0].flatten(0, 1)
            w = routing(
                config["routing_strategy"], config, x @ tensors[f"{root}.moe_gate.weight"].T
            )
            y = torch.zeros_like(x)
            for e in range(EXPERTS):
                gate, up = (
                    x @ getattr(mlp, module).weight.T
                    + delta(f"{root}.{module}.experts.{e}", experts, x)
                    for module in ("gate_proj", "up_proj")
                )
                h = F.silu(gate) * up
                down = h @ mlp.down_proj.weight.T
                y += w[:, e, None] * (down + delta(f"{root}.down_proj.experts.{e}", experts, h))
            return y.view_as(output)

        return run

    for i, layer in enumerate(model.model.layers):
        for module in (*ATTENTION, *NETWORK):
            block = "mlp" if module in NETWORK else "self_attn"
            key = f"{prefix}.layers.{i}.{block}.{module}"
            if any(k.startswith(f"{key}.") for k in tensors) and not (
                prefix == "mixlora" and block == "mlp"
            ):
                layer.get_submodule(f"{block}.{module}").register_forward_hook(per_module(key))
        if prefix == "mixlora":
            layer.mlp.register_forward_hook(network(f"{prefix}.layers.{i}.mlp"))
    with torch.no_grad():
        return model(**batch).logits


@pytest.fixture(scope="module")
def base(tiny_model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny_model("llama").save_pretrained(folder)
    return folder


@pytest.fixture
def written(base, tmp_path) -> Callable[..., Path]:
    """`written(name, **fields)`: the checkpoint's folder, as moe-peft writes it."""

    def write(name: str, attention: bool = True, drop: str = "", **fields: Any) -> Path:
        config, tensors = checkpoint(name, attention)
        config |= {"base_model_name_or_path": str(base), **fields}
        folder = tmp_path / "checkpoint"
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps(config))
        kept = {key: value for key, value in tensors.items() if not drop or drop not in key}
        torch.save(kept, folder / "adapter_model.bin")
        return folder

    return write


@pytest.fixture(scope="module")
def batch(tiny_batch) -> dict[str, Tensor]:
    return {key: tiny_batch("llama")[key] for key in ("input_ids", "attention_mask")}


@pytest.mark.parametrize("attention", [True, False], ids=["attention too", "networks only"])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore:molora. Outside training moe-peft:UserWarning")
def test_logits_are_the_formulas(name, attention, written, tiny_model, tmp_path, batch, logits_of):
    folder = molora.convert(written(name, attention), tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(
        tiny_model("llama").double(), str(folder), autocast_adapter_dtype=False
    )
    ours = logits_of(loaded.eval(), batch)
    expected = by_formula(tiny_model("llama").double(), name, *checkpoint(name, attention), batch)
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)
    plain = logits_of(tiny_model("llama").double(), batch)
    assert (expected - plain).abs().max() > 1e-2


def test_the_dry_run_names_format_method_and_sites(written):
    said = plan_conversion(written("mixlora")).describe()
    assert "moe-peft" in said and "becomes mixlora" in said
    assert "mlp" in said and "q_proj" in said


def test_an_attention_dropout_of_its_own_is_said(written, tmp_path):
    override = {"r": 2, "lora_alpha": 5, "lora_dropout": 0.2}
    source = written("mixlora", expert_lora=override)
    with pytest.warns(UserWarning, match=r"lora_dropout=0\.05.*experts, 0\.2"):
        molora.convert(source, tmp_path / "adapter")
    assert "lora_dropout=0.05" in (tmp_path / "adapter" / "README.md").read_text()


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("mixlora", {"use_dora": True}, "use_dora=True"),
        ("mixlora", {"act_fn": "gelu_new"}, "act_fn='gelu_new'.*'silu'"),
        ("mixlora", {"top_k": 1}, "top_k=1"),
        ("mixlora", {"capacity_factor": 2}, "capacity_factor=2.*known: .*top_p"),
        ("mixlora", {"routing_strategy": "mixtral"}, "routing_strategy='mixtral'.*legacy"),
        ("mixlora", {"expert_lora": {"use_dora": True}}, "use_dora=True"),
        ("mixlora", {"expert_lora": ["q"]}, r"expert_lora=\['q'\], which is no mapping"),
        ("mixlora", {"lora_alpha": "16"}, "lora_alpha='16' must be a finite number"),
        ("mixlora", {"r": 2.5}, "r=2.5 must be a whole number"),
        ("mixlora-dynamic", {"temperature": 0.5}, "temperature=0.5.*only 0 or 1"),
        ("mola", {"r": 4}, r"doesn't fit.*would be \(6, 32\).*\(12, 32\)"),
        ("loramoe", {"num_experts": 4}, r"has experts \[0, 1, 2\], and 0 to 3"),
        ("loramoe", {"task_type": "SEQ_CLS"}, "task_type='SEQ_CLS'"),
        ("loramoe", {"base_model_name_or_path": None}, "names no base model"),
    ],
)
def test_what_cannot_be_expressed_is_refused_by_name(name, fields, message, written, tmp_path):
    with pytest.raises(ValueError, match=message):
        molora.convert(written(name, **fields), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize(
    ("drop", "message"),
    [
        ("layers.1.mlp.moe_gate", "lacks 1 of the .*molora_router"),
        ("layers.1.mlp.up_proj.experts.2", r"linears.up_proj has experts \[0, 1\]"),
        ("layers.1.self_attn.q_proj", "lacks 2 of the .*q_proj"),
    ],
)
def test_missing_tensors_are_named(drop, message, written, tmp_path):
    with pytest.raises(ValueError, match=message):
        molora.convert(written("mixlora", drop=drop), tmp_path / "adapter")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"peft_type": "LORAMOE", "routing_strategy": "loramoe"},
            "holds mola.layers.0.* a tensor of mola, but its .* of loramoe",
        ),
        ({"routing_strategy": "mixlora"}, "peft_type='MOLA' and routing_strategy='mixlora', which"),
        ({"peft_type": ["MOLA"]}, r"unknown format \(peft_type=\['MOLA'\]\)"),
        ({"num_experts": "four"}, "num_experts='four' must be a whole number of at least 1"),
    ],
)
def test_a_mislabelled_file_is_refused(fields, message, written, tmp_path):
    path = written("mola") / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    with pytest.raises(ValueError, match=message):
        molora.convert(path.parent, tmp_path / "adapter")


@pytest.mark.parametrize("shape", [(), (RANK, 16)])
def test_experts_of_unlike_shapes_are_named(shape, written, tmp_path):
    path = written("mola") / "adapter_model.bin"
    tensors = torch.load(path)
    tensors["mola.layers.1.mlp.up_proj.experts.1.lora_A.weight"] = torch.zeros(shape)
    torch.save(tensors, path)
    with pytest.raises(ValueError, match=r"layers.1.mlp.up_proj.*\.A has experts of unlike shapes"):
        molora.convert(path.parent, tmp_path / "adapter")


def test_a_tensor_that_is_neither_expert_nor_router_is_refused(written, tmp_path):
    source = written("loramoe")
    path = source / "adapter_model.bin"
    torch.save({**torch.load(path), "classifier": torch.zeros(2, 32)}, path)
    with pytest.raises(ValueError, match=re.escape("classifier (2, 32)")):
        molora.convert(source, tmp_path / "adapter")


class Payload:
    """What unpickling would run."""

    def __reduce__(self) -> tuple:
        return pytest.fail, ("unpickled",)


def test_pickled_code_does_not_run(written, tmp_path):
    source = written("mola")
    torch.save({"x": Payload()}, source / "adapter_model.bin")
    with pytest.raises(ValueError, match="can't be read as tensors alone"):
        molora.convert(source, tmp_path / "adapter")


def test_safetensors_are_read_too_and_a_broken_one_is_an_error(written, tmp_path):
    source = written("mola")
    tensors = torch.load(source / "adapter_model.bin")
    (source / "adapter_model.bin").unlink()
    save_file(tensors, source / "adapter_model.safetensors")
    molora.convert(source, tmp_path / "adapter")
    path = source / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="corrupted or incomplete"):
        molora.convert(source, tmp_path / "again")
    path.unlink()
    with pytest.raises(ValueError, match="has none of adapter_model.safetensors, adapter_model.b"):
        molora.convert(source, tmp_path / "again")


@pytest.mark.parametrize(("text", "message"), [("{", "isn't JSON"), ("[1]", "holds a list")])
def test_a_configuration_that_is_none_is_an_error(text, message, written, tmp_path):
    source = written("mola")
    (source / "adapter_config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        molora.convert(source, tmp_path / "adapter")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "VERA"}, r"unknown format \(peft_type='VERA'\); known: moe-peft"),
        ({"peft_type": "LORA"}, "molora.compose makes a mixture"),
        ({"peft_type": "MOLORA"}, "already"),
    ],
)
def test_an_unknown_format_lists_the_known_ones(config, message, written, tmp_path):
    source = written("mola")
    (source / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        molora.convert(source, tmp_path / "adapter")


@pytest.mark.parametrize("content", ["truncated", "empty", "text"])
def test_a_broken_file_is_an_error(content, written, tmp_path):
    path = written("mola") / "adapter_model.bin"
    others = {"truncated": path.read_bytes()[:1000], "empty": b"", "text": b"hello world"}
    path.write_bytes(others[content])
    with pytest.raises(ValueError, match="can't be read as tensors alone; it is broken"):
        molora.convert(path.parent, tmp_path / "adapter")


def test_a_folder_without_an_adapter_is_named(tmp_path):
    with pytest.raises(ValueError, match="no adapter_config.json"):
        molora.convert(tmp_path, tmp_path / "adapter")
    with pytest.raises(ValueError, match="there is no folder"):
        molora.convert(tmp_path / "nowhere", tmp_path / "adapter")
