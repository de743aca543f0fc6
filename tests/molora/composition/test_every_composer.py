"""What holds of every way to compose: it saves, loads, and trains nothing but what it says."""

from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

import molora
from molora.composition import COMPOSERS

from ..trainer_runs import QUIET, tokenizer
from .dense_mixture import random_gates

LABELS = {"expert_prior": torch.tensor([[0.9, 0.1, 0.3], [0.2, 0.4, 0.5]])}
TRAINED = [name for name in COMPOSERS.names() if COMPOSERS.get(name).needs_training]


def options_of(name: str, folders: list[str]) -> dict[str, Any]:
    """What a router can't do without."""
    gates = random_gates(folders)
    if name == "dume":
        return {"gates": [{s: torch.cat([v, v[:1]]) for s, v in g.items()} for g in gates]}
    if name == "ttmm":
        return {"centroids": torch.randn(3, 32, generator=torch.Generator().manual_seed(0))}
    return {"gates": gates} if name in ("glider", "phatgoose") else {}


@torch.no_grad()
def outputs(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    prompt = batch["attention_mask"] * (torch.arange(batch["input_ids"].shape[1]) < 4)
    return model.eval()(**batch, **LABELS, prompt_mask=prompt).logits


@pytest.mark.parametrize("name", COMPOSERS.names())
def test_it_saves_and_loads(base, folders, batch, tmp_path, name):
    model = molora.compose(base(), folders, name, **options_of(name, folders))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(), tmp_path, autocast_adapter_dtype=False)
    assert torch.equal(outputs(loaded, batch), outputs(model, batch))
    assert (outputs(model, batch) - outputs(base_with_labels(base()), batch)).abs().max() > 1e-3
    trainable = PeftModel.from_pretrained(base(), tmp_path, is_trainable=True)
    names = {n for n, p in trainable.named_parameters() if p.requires_grad}
    assert bool(names) == (name in TRAINED)
    assert all("molora_router" in n for n in names)


def base_with_labels(model: nn.Module) -> nn.Module:
    """The base model, which ignores what only routers read."""
    forward = model.forward
    names = {"input_ids", "attention_mask"}
    model.forward = lambda **kw: forward(**{k: v for k, v in kw.items() if k in names})
    return model


def rows() -> Dataset:
    generator = torch.Generator().manual_seed(11)
    return Dataset.from_dict(
        {"input_ids": torch.randint(3, 64, (16, 6), generator=generator).tolist()}
    )


def transformers_trainer(model: nn.Module, folder: Any) -> Trainer:
    return Trainer(
        model,
        TrainingArguments(folder, **{**QUIET, "max_steps": 3, "learning_rate": 1e-2}),
        train_dataset=rows(),
        data_collator=DataCollatorForLanguageModeling(tokenizer(), mlm=False),
    )


def sft_trainer(model: nn.Module, folder: Any) -> SFTTrainer:
    return SFTTrainer(
        model,
        SFTConfig(folder, **{**QUIET, "max_steps": 3, "learning_rate": 1e-2}),
        train_dataset=rows(),
        processing_class=tokenizer(),
    )


@pytest.mark.parametrize("build", [transformers_trainer, sft_trainer])
@pytest.mark.parametrize("name", TRAINED)
def test_its_router_trains_and_its_experts_do_not(base, folders, tmp_path, name, build):
    model = molora.compose(base().float(), folders, name)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    build(model, tmp_path).train()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {n for n in before if "molora_router" in n}
