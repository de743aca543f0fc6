"""An adapter that grows: what it knew is kept and frozen, what is new trains, both are saved."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

import molora
from molora import MoloraConfig
from molora.layer import MoloraLayer

FIELDS = {"r": 3, "top_k": 3, "target_modules": ["o_proj", "up_proj"], "lora_dropout": 0.0}


def factors(model: Any) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    return {
        name: module.molora_experts["default"].factors()
        for name, module in model.named_modules()
        if isinstance(module, MoloraLayer)
    }


def train(model: Any, batch: dict[str, torch.Tensor]) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        model.train()(**batch).loss.backward()
        optimizer.step()


@pytest.fixture
def tasks(tiny_model, tiny_batch, tmp_path: Path):
    """Three tasks learned one after the other; the models, each as it was saved."""
    batch, models = tiny_batch("llama"), []
    torch.manual_seed(0)
    config = MoloraConfig.from_method("mora", **FIELDS, task_type="CAUSAL_LM")
    model = get_peft_model(tiny_model("llama"), config)
    for task in range(3):
        if task:
            molora.grow(tmp_path / str(task - 1), tmp_path / str(task), num_experts=task)
            model = PeftModel.from_pretrained(
                tiny_model("llama"), tmp_path / str(task), is_trainable=True
            )
        train(model, batch)
        model.save_pretrained(tmp_path / str(task))
        models.append(model)
    return models


def test_old_experts_stay_and_new_ones_learn(tasks):
    for before, after in zip(tasks, tasks[1:], strict=False):
        old, new = factors(before), factors(after)
        for site, (A, B) in old.items():
            rank = len(A)
            assert torch.equal(new[site][0][:rank], A) and torch.equal(new[site][1][:, :rank], B)
            assert len(new[site][0]) > rank and new[site][1][:, rank:].abs().sum() > 0
    assert [len(next(iter(factors(model).values()))[0]) for model in tasks] == [3, 6, 12]


def test_a_grown_adapter_saves_and_loads(tasks, tmp_path: Path, tiny_model, tiny_batch, logits_of):
    loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "2")
    batch = tiny_batch("llama")
    assert torch.equal(logits_of(loaded, batch), logits_of(tasks[2].eval(), batch))
    config = loaded.peft_config["default"]
    assert (config.method, config.num_experts, config.expert_options) == ("mora", 4, {"frozen": 6})


def test_a_new_expert_starts_as_lora_does(tasks, tmp_path: Path):
    molora.grow(tmp_path / "0", tmp_path / "fresh")
    state = load_file(tmp_path / "fresh" / "adapter_model.safetensors")
    downs = [value for key, value in state.items() if key.endswith("experts.A")]
    ups = [value for key, value in state.items() if key.endswith("experts.B")]
    assert downs and all(len(down) == 3 for down in downs)
    for down in downs:  # kaiming-uniform with a = sqrt(5): U(-1, 1) / sqrt(d_in)
        bound = down.shape[1] ** -0.5
        assert 0.5 * bound < down.abs().max() <= bound
    assert all(up.abs().sum() == 0 for up in ups)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"router": "linear", "gate": "dense", "top_k": None}, "router='linear' and gate='dense'"),
        ({"r": [3, 4]}, r"r=\[3, 4\]"),
        ({"rank_pattern": {"up_proj": 4}}, "rank_pattern={'up_proj': 4}"),
        ({"num_shared_experts": 1}, "num_shared_experts=1"),
        ({"mixing": "feed_forward", "router": "linear"}, "mixing='feed_forward' can't be grown"),
        ({"experts": "frozen_lora"}, "all experts are frozen"),
    ],
)
def test_what_can_not_grow(tiny_model, tmp_path: Path, fields, message):
    settings = {**FIELDS, "num_experts": 2, "rank_wise": True, "router": "activation", **fields}
    settings["router_options"] = {"score": "signed"} if settings["router"] == "activation" else {}
    get_peft_model(tiny_model("llama"), MoloraConfig(**settings)).save_pretrained(tmp_path / "a")
    with pytest.raises(ValueError, match=message):
        molora.grow(tmp_path / "a", tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_sizes_and_folders_that_are_wrong(tasks, tmp_path: Path):
    with pytest.raises(ValueError, match="num_experts=0 to add must be at least 1"):
        molora.grow(tmp_path / "0", tmp_path / "x", num_experts=0)
    with pytest.raises(ValueError, match="is the adapter itself"):
        molora.grow(tmp_path / "0", tmp_path / "0")
