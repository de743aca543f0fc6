"""Checkpoints in the layout of HydraLoRA's and LoRAMoE's repositories, against their formula."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

import molora

EXPERTS, RANK, ALPHA = 3, 2, 7
MODULES = {"up_proj": (32, 48), "down_proj": (48, 32)}
# What their PEFT 0.3 writes.
CONFIG: dict[str, Any] = {
    "bias": "none",
    "blc_alpha": 0.0,
    "blc_weight": 0.0,
    "enable_lora": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "lora_alpha": ALPHA,
    "lora_dropout": 0.05,
    "lora_nums": EXPERTS,
    "merge_weights": False,
    "modules_to_save": None,
    "peft_type": "LORA",
    "r": RANK,
    "target_modules": list(MODULES),
    "task_type": "CAUSAL_LM",
}


def weights(shared: bool) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return 0.4 * torch.randn(*shape, generator=generator, dtype=torch.float64)

    tensors = {}
    for layer in range(2):
        for module, (d_in, d_out) in MODULES.items():
            root = f"base_model.model.model.layers.{layer}.mlp.{module}"
            tensors[f"{root}.lora_route.weight"] = random(EXPERTS, d_in)
            for e in range(1 if shared else EXPERTS):
                tensors[f"{root}.lora_A{'' if shared else e}.weight"] = random(RANK, d_in)
            for e in range(EXPERTS):
                tensors[f"{root}.lora_B{e}.weight"] = random(d_out, RANK)
    return tensors


def by_formula(model: Any, tensors: dict[str, Tensor], batch: dict) -> Tensor:
    """y = W x + sum over e of softmax(W_r x)_e (alpha / r) B_e A_e x, at each module."""
    for layer in range(2):
        for module in MODULES:
            site = f"model.layers.{layer}.mlp.{module}"
            root = f"base_model.model.{site}"

            def add(_: Any, args: tuple, output: Tensor, root: str = root) -> Tensor:
                x = args[0]
                w = (x @ tensors[f"{root}.lora_route.weight"].T).softmax(-1)
                for e in range(EXPERTS):
                    A = tensors.get(
                        f"{root}.lora_A.weight", tensors.get(f"{root}.lora_A{e}.weight")
                    )
                    B = tensors[f"{root}.lora_B{e}.weight"]
                    output = output + w[..., e, None] * (ALPHA / RANK) * (x @ A.T @ B.T)
                return output

            model.get_submodule(site).register_forward_hook(add)
    with torch.no_grad():
        return model(**batch).logits


@pytest.fixture
def written(tiny_model, tmp_path) -> Callable[..., Path]:
    """`written(shared, **fields)`: the checkpoint's folder."""

    def write(shared: bool = True, drop: str = "", diverged: str = "", **fields: Any) -> Path:
        tiny_model("llama").save_pretrained(tmp_path / "base")
        config = {**CONFIG, "base_model_name_or_path": str(tmp_path / "base"), **fields}
        folder = tmp_path / "checkpoint"
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps(config))
        kept = {k: v for k, v in weights(shared).items() if not drop or drop not in k}
        for key in kept:
            if diverged and diverged in key:
                kept[key][0, 0] = torch.nan
        torch.save(kept, folder / "adapter_model.bin")
        return folder

    return write


@pytest.mark.parametrize("shared", [True, False], ids=["hydralora", "loramoe"])
def test_logits_are_the_formulas(shared, written, tiny_model, tiny_batch, tmp_path, logits_of):
    folder = molora.convert(written(shared), tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(
        tiny_model("llama").double(), str(folder), autocast_adapter_dtype=False
    )
    assert loaded.peft_config["default"].method == ("hydralora" if shared else "loramoe")
    batch = {key: tiny_batch("llama")[key] for key in ("input_ids", "attention_mask")}
    expected = by_formula(tiny_model("llama").double(), weights(shared), batch)
    torch.testing.assert_close(logits_of(loaded.eval(), batch), expected, rtol=1e-10, atol=1e-10)
    assert (expected - logits_of(tiny_model("llama").double(), batch)).abs().max() > 1e-2


def test_the_balance_loss_that_is_left_out_is_said(written, tmp_path):
    with pytest.warns(UserWarning, match=r"blc_weight=0\.5"):
        molora.convert(written(blc_weight=0.5, blc_alpha=0.1), tmp_path / "adapter")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bias": "all"}, "bias='all'"),
        ({"modules_to_save": ["embed_tokens"]}, r"modules_to_save=\['embed_tokens'\]"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out=True"),
        ({"use_rslora": True}, "use_rslora=True, a field that this conversion doesn't know"),
        ({"lora_nums": 4}, r"lora_B of .* has experts \[0, 1, 2\]"),
        ({"drop": "lora_route"}, "no lora_route"),
        ({"drop": "layers.1.mlp.up_proj.lora_B1"}, r"has experts \[0, 2\]"),
        ({"drop": "layers.1.mlp.up_proj.lora_A"}, "not one lora_A, which all share, of .*1.mlp.up"),
        ({"drop": "lora_A"}, r"lora_A of .* has experts \[\], and 0 to 2"),
        ({"lora_nums": None}, "lora_nums=None must be a whole number"),
        ({"base_model_name_or_path": ""}, "names no base model"),
        ({"diverged": "1.mlp.up_proj.lora_route"}, "NaN or infinity in .*1.mlp.up_proj.lora_route"),
    ],
)
def test_what_cannot_be_expressed_is_refused_by_name(fields, message, written, tmp_path):
    with pytest.raises(ValueError, match=message):
        molora.convert(written(**fields), tmp_path / "adapter")
