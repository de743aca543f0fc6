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


@torch.no_grad()
@pytest.mark.parametrize("name", COMPOSERS.names())
def test_padding_batch_mates_and_a_cache_change_nothing(base, folders, name):
    model = molora.compose(base(), folders, name, **options_of(name, folders))
    ids = torch.tensor([[5, 9, 33, 12, 8, 40], [7, 21, 3, 0, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
    prompt = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]])
    both = model(ids, attention_mask=mask, prompt_mask=prompt, **LABELS).logits
    for row, length in ((0, 6), (1, 3)):
        own = {key: label[row : row + 1] for key, label in LABELS.items()}
        alone = ids[row : row + 1, :length]
        logits = model(alone, prompt_mask=prompt[row : row + 1, :length], **own).logits
        torch.testing.assert_close(logits[0], both[row, :length], atol=1e-9, rtol=1e-9)
        given = int(prompt[row].sum())
        start = model(alone[:, :given], use_cache=True, **own)
        cache = start.past_key_values
        for t in range(given, length):
            step = model(alone[:, t : t + 1], past_key_values=cache, use_cache=True, **own)
            torch.testing.assert_close(step.logits[0, 0], both[row, t], atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(base, folders, batch, name, reentrant):
    found = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model = molora.compose(base(), folders, name).train()
        if checkpointed:
            model.enable_input_require_grads()
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
        model(**batch, labels=batch["input_ids"]).loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    torch.testing.assert_close(found[1], found[0], atol=1e-12, rtol=1e-9)
    assert all(gradient.abs().sum() > 0 for gradient in found[0].values())


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
