"""The tuner on tiny random models of every kind it supports."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

import molora
from molora.layer import MoloraLayer

DECODERS = ("llama", "qwen3", "gemma", "gpt2", "opt")
TRANSFORMERS = (*DECODERS, "t5", "bert", "vit")
# Linear modules of a layer that "all-linear" finds, over the layers of the model.
ALL_LINEAR = {
    "llama": 2 * 7,
    "qwen3": 2 * 7,
    "gemma": 2 * 7,
    "gpt2": 2 * 4,
    "opt": 2 * 6,
    "t5": 2 * (4 + 3) + 2 * (8 + 3),
    "bert": 2 * 6 + 1,  # and the pooler
    "vit": 2 * 6,
    "mlp": 3,
}
DEFAULT_TARGETS = {
    "llama": {"q_proj", "v_proj"},
    "qwen3": {"q_proj", "v_proj"},
    "gemma": {"q_proj", "v_proj"},
    "gpt2": {"c_attn"},
    "opt": {"q_proj", "v_proj"},
    "t5": {"q", "v"},
    "bert": {"query", "value"},
}
TASKS = {"t5": "SEQ_2_SEQ_LM", "bert": "SEQ_CLS"}


def config(name: str, **overrides: Any) -> molora.MoloraConfig:
    fields: dict[str, Any] = {
        "r": 2,
        "num_experts": 3,
        "losses": {"load_balancing": 0.01, "z_loss": 0.01},
        "target_modules": "all-linear",
    }
    if name in DECODERS:
        fields["task_type"] = "CAUSAL_LM"
    elif name in TASKS:
        fields["task_type"] = TASKS[name]
    if name == "vit":
        fields["modules_to_save"] = ["classifier"]
    if name == "mlp":
        fields["target_modules"] = ["up", "middle", "down"]
    return molora.MoloraConfig(**{**fields, **overrides})


def layers(model: Any) -> dict[str, MoloraLayer]:
    return {n: m for n, m in model.named_modules() if isinstance(m, MoloraLayer)}


def train_a_step(model: Any, batch: dict[str, Any]) -> None:
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    output = model(**batch)
    (output.square().sum() if isinstance(output, torch.Tensor) else output.loss).backward()
    optimizer.step()
    model.eval()


@pytest.mark.parametrize("scope", ["site", "block"])
@pytest.mark.parametrize("name", [*TRANSFORMERS, "mlp"])
def test_train_save_and_load(
    name: str, scope: str, tiny_model, tiny_batch, randomize, logits_of, tmp_path: Path
):
    batch, base = tiny_batch(name), tiny_model(name)
    plain = logits_of(base, batch)
    model = get_peft_model(base, config(name, router_scope=scope)).eval()
    assert len(layers(model)) == ALL_LINEAR[name]
    assert torch.equal(logits_of(model, batch), plain)

    train_a_step(randomize(model), batch)
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert [n for n, p in trainable.items() if p.grad is None] == []
    experts = [p for n, p in trainable.items() if "molora_experts" in n]
    assert all(p.grad.abs().sum() > 0 for p in experts)
    trained = logits_of(model, batch)
    assert not torch.allclose(trained, plain)

    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(name), tmp_path).eval()
    assert torch.equal(logits_of(loaded, batch), trained)
    with loaded.disable_adapter():
        assert torch.equal(logits_of(loaded, batch), plain)


@pytest.mark.parametrize("name", DEFAULT_TARGETS)
def test_default_targets_are_those_of_lora(name: str, tiny_model):
    model = get_peft_model(tiny_model(name), config(name, target_modules=None))
    assert {site.rpartition(".")[2] for site in layers(model)} == DEFAULT_TARGETS[name]


@pytest.mark.parametrize("name", [*DECODERS, "t5"])
@pytest.mark.parametrize("scope", ["site", "block"])
def test_generation_with_a_cache_equals_without(
    name: str, scope: str, tiny_model, tiny_batch, randomize
):
    model = randomize(get_peft_model(tiny_model(name), config(name, router_scope=scope))).eval()
    batch = {k: v for k, v in tiny_batch(name).items() if k != "labels"}
    if name != "t5":  # generation continues at the right end: pad on the left
        batch = {k: v.flip(-1) for k, v in batch.items()}
    generate = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    with molora.observe(model) as records:
        cached = model.generate(**batch, **generate, use_cache=True)
    whole = model.generate(**batch, **generate, use_cache=False)
    assert torch.equal(cached, whole)
    assert len(records) == len(layers(model))
    for routing in records.values():
        assert routing.mask is None or routing.mask.shape == routing.weights.shape[:1]


@pytest.mark.parametrize("name", ["gpt2", "opt", "t5", "bert", "vit"])
def test_layer_scope_on_other_architectures(name: str, tiny_model, tiny_batch, randomize):
    fields: dict[str, Any] = {}
    if name == "bert":  # the pooler is in no layer
        fields["exclude_modules"] = ["pooler.dense", "classifier"]
    model = get_peft_model(tiny_model(name), config(name, router_scope="layer", **fields)).eval()
    with torch.no_grad(), molora.observe(randomize(model)) as records:
        model(**tiny_batch(name))
    routers = [m for m in model.modules() if isinstance(m, molora.Router)]
    # keys and values of T5's cross-attention read the encoder's tokens: two more decisions
    assert len(routers) == (6 if name == "t5" else 2)
    assert len(records) == len(layers(model))


def test_conv1d_sites_are_read_in_their_own_layout(tiny_model, tiny_batch, randomize):
    model = randomize(get_peft_model(tiny_model("gpt2"), config("gpt2"))).eval()
    name, layer = next(iter(layers(model).items()))
    assert name.endswith("c_attn") and isinstance(layer.base_layer, Conv1D)
    experts = layer.molora_experts["default"]
    assert (experts.A.shape, experts.B.shape) == ((6, 32), (96, 6))


def test_encoder_decoder_masks_reach_the_sites_they_describe(tiny_model, tiny_batch, randomize):
    model = randomize(get_peft_model(tiny_model("t5"), config("t5"))).eval()
    batch = tiny_batch("t5")
    with torch.no_grad(), molora.observe(model) as records:
        model(**batch)
    encoder = batch["attention_mask"].bool().flatten()
    decoder = (batch["labels"] != -100).flatten()
    expected = {
        "encoder.block.0.layer.0.SelfAttention.q": encoder,
        "encoder.block.1.layer.1.DenseReluDense.wo": encoder,
        "decoder.block.0.layer.0.SelfAttention.k": decoder,
        "decoder.block.0.layer.1.EncDecAttention.q": decoder,
        "decoder.block.0.layer.1.EncDecAttention.k": encoder,
        "decoder.block.1.layer.1.EncDecAttention.v": encoder,
        "decoder.block.1.layer.1.EncDecAttention.o": decoder,
        "decoder.block.1.layer.2.DenseReluDense.wi_0": decoder,
    }
    for site, mask in expected.items():
        assert torch.equal(records[site].mask, mask), site


def test_a_label_of_the_encoders_tokens_is_not_cut_to_the_decoders(tiny_model, tiny_batch):
    model = get_peft_model(tiny_model("t5"), config("t5", router="modality_bias")).eval()
    batch = tiny_batch("t5")
    modality = torch.zeros_like(batch["input_ids"])
    with pytest.raises(ValueError, match="modality_ids has the shape"):
        model(**batch, modality_ids=modality)


@pytest.mark.parametrize(
    ("router", "label", "message"),
    [
        ("modality_bias", "modality_ids", r"modality_ids has the shape \(2, 7\), but .* reads 1 "),
        ("prompt_mean", "prompt_mask", "nothing says what is their prompt"),
        ("instruction", "prompt_mask", "nothing says what is their embedding"),
    ],
)
def test_a_pooled_vector_has_no_label_of_a_token(
    router: str, label: str, message: str, tiny_model, tiny_batch
):
    batch = tiny_batch("bert")
    batch[label] = batch["attention_mask"]
    fields = {"router": router, "target_modules": ["query", "pooler.dense"]}
    model = get_peft_model(tiny_model("bert"), config("bert", **fields)).eval()
    with pytest.raises(ValueError, match=rf"{message}.*exclude_modules") as raised:
        model(**batch)
    assert "'bert.pooler.dense'" in str(raised.value)
    fields["exclude_modules"] = ["pooler.dense"]
    get_peft_model(tiny_model("bert"), config("bert", **fields)).eval()(**batch)


def test_a_pooled_vector_is_all_that_it_knows_of_its_sequence(
    tiny_model, tiny_batch, randomize, logits_of
):
    fields = {"router": "prompt_mean", "router_options": {"pool": "sequence"}}
    model = randomize(get_peft_model(tiny_model("bert"), config("bert", **fields))).eval()
    batch = tiny_batch("bert")
    short = {name: batch[name][1:, :5] for name in ("input_ids", "attention_mask")}
    expected = logits_of(model, short)
    torch.testing.assert_close(logits_of(model, batch)[1:], expected)


@pytest.mark.parametrize("scope", ["site", "model"])
def test_the_encoders_ids_and_embeddings_are_not_the_decoders(scope: str, tiny_model, tiny_batch):
    batch = tiny_batch("t5")
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    for router in ("token_mask", "instruction"):
        if (router, scope) == ("token_mask", "model"):
            continue  # it reads the site
        options = {"pool": "sequence"} if router == "instruction" else {"frequent": 2}
        fields = {"router": router, "router_options": options, "router_scope": scope}
        model = get_peft_model(tiny_model("t5"), config("t5", target_modules=["q"], **fields))
        with pytest.raises(ValueError, match="'decoder.block.0.layer.0.SelfAttention.q' reads"):
            model(**batch)
        fields["target_modules"] = r"encoder\..*\.q"
        get_peft_model(tiny_model("t5"), config("t5", **fields))(**batch)


def test_masks_of_an_earlier_batch_are_forgotten(tiny_model, tiny_batch, randomize, logits_of):
    model = randomize(get_peft_model(tiny_model("t5"), config("t5"))).eval()
    prompt = torch.tensor([[7, 8, 9, 10]])
    fresh = model.generate(input_ids=prompt, max_new_tokens=3)
    logits_of(model, tiny_batch("t5"))
    with molora.observe(model) as records:  # generate runs the encoder without the model around it
        again = model.generate(input_ids=prompt, max_new_tokens=3)
    assert torch.equal(again, fresh)
    assert all(r.mask is None or r.mask.all() for r in records.values())


def test_classification_trains_and_saves_its_head(tiny_model, tiny_batch, logits_of, tmp_path):
    model = get_peft_model(tiny_model("bert"), config("bert"))
    batch = tiny_batch("bert")
    train_a_step(model, batch)
    trained = logits_of(model, batch)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model("bert", seed=0), tmp_path).eval()
    assert torch.equal(logits_of(loaded, batch), trained)
    head = loaded.base_model.model.classifier
    assert not torch.equal(head.modules_to_save["default"].weight, head.original_module.weight)


def test_a_plain_module_without_names_that_peft_knows(randomize):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Sequential(nn.Linear(8, 8), nn.Tanh()))
    fields = {"target_modules": ["0"], "num_experts": [2, 4]}
    model = randomize(get_peft_model(base, molora.MoloraConfig(**fields)))
    assert [len(s.molora_allocation["default"].ranks) for s in layers(model).values()] == [2, 4]
    model(torch.randn(3, 5, 4)).sum().backward()
