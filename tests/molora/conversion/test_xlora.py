"""X-LoRA checkpoints, against PEFT's own X-LoRA model: the one that wrote them."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, XLoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn

import molora

# Unlike ranks, scalings and targets: the second adapts one layer only.
SPECS: list[dict[str, Any]] = [
    {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "up_proj"]},
    {"r": 4, "lora_alpha": 3, "use_rslora": True, "target_modules": ["q_proj"],
     "layers_to_transform": [1]},
    {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "up_proj"]},
]  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature": {"softmax_temperature": 0.5, "global_scaling_weight": 1.5},
    "two layers": {"xlora_depth": 2, "xlora_size": 24, "xlora_dropout_p": 0.0},
    "layerwise": {"layerwise_scalings": True},
    "layerwise, two layers": {
        "layerwise_scalings": True, "xlora_depth": 2, "xlora_size": 24, "xlora_dropout_p": 0.0,
    },
    "top-2": {"top_k_lora": 2},
    "softmax of the top-2": {
        "top_k_lora": 2, "enable_softmax": False, "enable_softmax_topk": True,
        "softmax_temperature": 0.5,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tiny_model) -> Callable[[], Any]:
    return lambda: tiny_model("llama", use_cache=False).double()


@pytest.fixture(scope="module")
def experts(base, save_loras, tmp_path_factory) -> list[str]:
    """Saved LoRA adapters."""
    return save_loras(base, SPECS, tmp_path_factory.mktemp("adapters"))


@pytest.fixture
def xlora(base, experts, tmp_path) -> Callable[..., tuple[PeftModel, Path]]:
    """`xlora(**fields)`: PEFT's X-LoRA with a random classifier, and what PEFT saves of it."""
    base().save_pretrained(tmp_path / "base")

    def make(**fields: Any) -> tuple[PeftModel, Path]:
        named = {str(i): path for i, path in enumerate(experts)}
        config = XLoraConfig(
            task_type="CAUSAL_LM", hidden_size=32, adapters=named,
            **fields,
        )  # fmt: skip
        model = get_peft_model(base(), config, autocast_adapter_dtype=False).eval()
        torch.manual_seed(5)
        for parameter in model.base_model.internal_xlora_classifier.parameters():
            nn.init.normal_(parameter)
        model.save_pretrained(tmp_path / "checkpoint")
        edit(tmp_path / "checkpoint", base_model_name_or_path=str(tmp_path / "base"))
        return model, tmp_path / "checkpoint"

    return make


@pytest.fixture(scope="module")
def batch(tiny_batch) -> dict[str, Tensor]:
    return {key: tiny_batch("llama")[key] for key in ("input_ids", "attention_mask")}


def edit(folder: Path, **fields: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def store_classifier(model: PeftModel, folder: Path) -> None:
    """Write it as PEFT before 0.21 did: by its own names, beside the configuration."""
    found = {k: v for k, v in model.state_dict().items() if "internal_xlora_classifier" in k}
    save_file(found, folder / "adapter_model.safetensors")
    for sub in folder.iterdir():
        if sub.is_dir():
            (sub / "adapter_model.safetensors").unlink()
            (sub / "adapter_config.json").unlink()
            sub.rmdir()


@pytest.mark.parametrize("layout", ["as PEFT writes it", "by name"])
@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_pefts_model(name, layout, xlora, base, batch, tmp_path, logits_of):
    theirs, checkpoint = xlora(**CASES[name])
    if layout == "by name":
        store_classifier(theirs, checkpoint)
    folder = molora.convert(checkpoint, tmp_path / "adapter")
    ours = PeftModel.from_pretrained(base(), str(folder), autocast_adapter_dtype=False).eval()
    real = batch["attention_mask"].bool()
    expected = logits_of(theirs, batch)[real]
    torch.testing.assert_close(logits_of(ours, batch)[real], expected, rtol=1e-9, atol=1e-9)
    scalings = theirs.base_model.get_latest_scalings()[real]
    assert scalings.std(0).max() > 0.05  # the tokens are weighed differently
    assert (expected - logits_of(base(), batch)[real]).abs().max() > 1e-2


def test_the_experts_are_frozen_and_the_router_trains(xlora, base, tmp_path):
    folder = molora.convert(xlora()[1], tmp_path / "adapter")
    model = PeftModel.from_pretrained(base(), str(folder), is_trainable=True)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained and all(".molora_router." in name for name in trained)


def test_the_folders_may_be_given(xlora, experts, base, batch, tmp_path, logits_of):
    theirs, checkpoint = xlora(use_trainable_adapters=True)
    with pytest.raises(ValueError, match=r"use_trainable_adapters=True.*adapters="):
        molora.convert(checkpoint, tmp_path / "adapter")
    edit(checkpoint, adapters={"sql": "nowhere", "chat": "nowhere", "maths": "nowhere"})
    folder = molora.convert(checkpoint, tmp_path / "adapter", adapters=experts)
    ours = PeftModel.from_pretrained(
        base(), str(folder), is_trainable=True, autocast_adapter_dtype=False
    ).eval()
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(logits_of(ours, batch)[real], logits_of(theirs, batch)[real])
    assert any(".molora_experts." in n and p.requires_grad for n, p in ours.named_parameters())


def test_no_folders_are_not_those_of_the_checkpoint(xlora, tmp_path):
    with pytest.raises(ValueError, match="adapters is empty"):
        molora.convert(xlora()[1], tmp_path / "adapter", adapters=[])


def test_the_classifiers_dropout_is_said(xlora, tmp_path):
    _, checkpoint = xlora(xlora_depth=2, xlora_size=24)
    with pytest.warns(UserWarning, match="xlora_dropout_p=0.2"):
        molora.convert(checkpoint, tmp_path / "adapter")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scaling_pass_value": 0.5}, "scaling_pass_value=0.5"),
        ({"xlora_depth": 3}, "xlora_depth=3"),
        ({"enable_softmax": False}, "enable_softmax=False and enable_softmax_topk=False"),
        ({"enable_softmax_topk": True}, "enable_softmax=True and enable_softmax_topk=True"),
        ({"adapters": {"sql": "a", "chat": "b"}}, "of the names '0', '1'"),
        ({"layerwise_scalings": True}, "has 3 outputs; 3 experts on 6 modules need 18"),
        ({"xlora_depth": 2}, "holds 1 of the 2 linear modules"),
        ({"global_scaling_weight": "2"}, "global_scaling_weight='2' must be a finite number"),
        ({"softmax_temperature": "hot"}, "option temperature='hot' must be a finite number"),
        ({"adapters": 3}, "adapters=3, but PEFT runs adapters of the names"),
    ],
)
def test_what_cannot_be_expressed_is_refused_by_name(fields, message, xlora, tmp_path):
    _, checkpoint = xlora()
    edit(checkpoint, **fields)
    with pytest.raises(ValueError, match=re.escape(message)):
        molora.convert(checkpoint, tmp_path / "adapter")


def test_layerwise_scalings_need_inputs_as_wide_as_the_model(base, tmp_path, xlora):
    config = LoraConfig(r=2, target_modules=["down_proj"], task_type="CAUSAL_LM")
    get_peft_model(base(), config).save_pretrained(tmp_path / "down")
    _, checkpoint = xlora()
    edit(checkpoint, adapters={"0": str(tmp_path / "down")})
    with pytest.raises(ValueError, match="has 3 outputs; 1 experts on 1 modules"):
        molora.convert(checkpoint, tmp_path / "adapter")
    edit(checkpoint, adapters={str(i): str(tmp_path / "down") for i in range(3)})
    with pytest.raises(ValueError, match=r"down_proj', which decides, has 48 inputs.*width 32"):
        molora.convert(checkpoint, tmp_path / "adapter")
