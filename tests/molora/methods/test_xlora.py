"""X-LoRA from its formula, every way of decoding, and what it refuses."""

import copy
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor
from transformers import DynamicCache

import molora
from molora import MoloraConfig
from molora.layer import MoloraLayer

from ..test_contract import PROMPTS, collate, gradients


def build(tiny_model, **overrides: Any) -> Any:
    fields = {"task_type": "CAUSAL_LM", "init_lora_weights": False, **overrides}
    torch.manual_seed(0)
    model = get_peft_model(tiny_model("llama"), MoloraConfig.from_method("xlora", **fields))
    for name, parameter in model.named_parameters():
        if "molora_router" in name:  # far from uniform weights
            parameter.data = torch.randn_like(parameter)
    return model.eval()


def formula(base: Any, model: Any, batch: dict[str, Tensor], leaves: dict[str, Tensor]) -> Tensor:
    """The logits: the plain model twice, with hooks that add the experts the second time."""
    with torch.no_grad():
        hidden = base.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    z, depth = hidden.last_hidden_state, len([k for k in leaves if ".weights." in k])
    for i in range(depth):
        (W,), (b,) = ([v for k, v in leaves.items() if k.endswith(f".{kind}.{i}")]
                      for kind in ("weights", "biases"))  # fmt: skip
        z = z @ W.T + b
        z = z.clamp(min=0) if i + 1 < depth else z
    w = z.softmax(-1)
    handles = []
    for site, layer in model.get_base_model().named_modules():
        if isinstance(layer, MoloraLayer):
            allocation = layer.molora_allocation["default"]

            def add(_, inputs, output, site=site, allocation=allocation):
                A, B = (next(v for k, v in leaves.items() if f"{site}.molora_experts" in k
                             and k.endswith(f".{f}")) for f in "AB")  # fmt: skip
                parts = zip(A.split(allocation.ranks), B.split(allocation.ranks, 1), strict=True)
                for e, (a, b) in enumerate(parts):
                    output = output + 2.0 * w[..., e, None] * (inputs[0] @ a.T @ b.T)
                return output

            handles.append(base.get_submodule(site).register_forward_hook(add))
    logits = base(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    for handle in handles:
        handle.remove()
    return logits


@pytest.mark.parametrize("hidden_size", [None, 5])
def test_formula_and_gradients(tiny_model, tiny_batch, hidden_size):
    model = build(tiny_model, router_options={"hidden_size": hidden_size}).double()
    base, batch = tiny_model("llama").double(), tiny_batch("llama")
    named = {k: p for k, p in model.named_parameters() if p.requires_grad}
    leaves = {k: p.detach().clone().requires_grad_() for k, p in named.items()}
    real = batch["attention_mask"].bool()
    expected = formula(base, model, batch, leaves)
    actual = model(**batch).logits
    torch.testing.assert_close(actual[real], expected[real], atol=1e-10, rtol=1e-10)
    actual[real].square().sum().backward()
    expected[real].square().sum().backward()
    for name, leaf in leaves.items():
        torch.testing.assert_close(named[name].grad, leaf.grad, atol=1e-8, rtol=1e-8, msg=name)
    assert sum("molora_router" in name for name in leaves) == (2 if hidden_size is None else 4)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.filterwarnings("ignore:.*use_reentrant:UserWarning")
def test_dropout_in_the_first_pass_leaves_checkpointing_exact(tiny_model, tiny_batch, reentrant):
    config = MoloraConfig.from_method("xlora", task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(tiny_model("llama", attention_dropout=0.3), config).train()
    expected = gradients(model, tiny_batch("llama"))
    model.enable_input_require_grads()
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    for name, grad in gradients(model, tiny_batch("llama")).items():
        torch.testing.assert_close(grad, expected[name], atol=1e-5, rtol=1e-4, msg=name)


@torch.no_grad()
def greedy(model: Any, ids: Tensor, steps: int) -> Tensor:
    """Without a cache: one pass over all for each token."""
    for _ in range(steps):
        ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
    return ids


@pytest.mark.parametrize(
    "options",
    [{}, {"prefill_chunk_size": 3}, {"prompt_lookup_num_tokens": 2}],
    ids=["greedy", "chunks", "lookup"],
)
def test_generating_equals_whole_passes(tiny_model, options):
    model, ids = build(tiny_model), torch.tensor(PROMPTS[:1])
    limits = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    generated = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), **limits, **options
    )
    assert torch.equal(generated, greedy(model, ids, 6))


def test_beams_and_padding(tiny_model):
    model, batch = build(tiny_model), collate(PROMPTS, "left", 9)
    del batch["position_ids"]
    limits = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    beams = {**limits, "num_beams": 3, "num_return_sequences": 2}
    with_cache = model.generate(**batch, **beams)
    assert torch.equal(with_cache, model.generate(**batch, **beams, use_cache=False))
    assert not torch.equal(with_cache[::2], model.generate(**batch, **limits))  # beams did branch


@torch.no_grad()
def test_two_continuations_of_copies_of_a_cache(tiny_model):
    model, ids = build(tiny_model), torch.tensor(PROMPTS[:1])
    cache = model(input_ids=ids, use_cache=True).past_key_values
    ends = torch.tensor([[[11, 13, 17]], [[40, 41, 42]]])
    caches = [copy.deepcopy(cache) for _ in ends]
    for end, own in zip(ends, caches, strict=True):
        steps = [model(input_ids=t, past_key_values=own, use_cache=True) for t in end.split(1, 1)]
        logits = torch.cat([step.logits for step in steps], 1)
        expected = model(input_ids=torch.cat([ids, end], 1)).logits[:, -3:]
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    own = caches[0]
    own.batch_repeat_interleave(3)
    own.batch_select_indices(torch.tensor([0, 2]))
    own.crop(-3)
    again = model(input_ids=ends[:, 0, :1], past_key_values=own, use_cache=True).logits
    whole = torch.cat([ids.expand(2, -1), ends[:, 0, :1]], 1)
    torch.testing.assert_close(again, model(input_ids=whole).logits[:, -1:], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_without_the_adapter_there_is_no_first_pass(tiny_model, tiny_batch, logits_of):
    model, batch = build(tiny_model), tiny_batch("llama")
    passes: list[int] = []
    model.get_base_model().model.norm.register_forward_hook(lambda *_: passes.append(1))
    logits_of(model, batch)
    assert len(passes) == 2
    with model.disable_adapter():
        off = logits_of(model, batch)
    assert len(passes) == 3 and torch.equal(off, logits_of(tiny_model("llama"), batch))


@torch.no_grad()
def test_tokens_that_train_are_in_the_first_pass_too(tiny_model, tiny_batch, logits_of):
    batch = tiny_batch("llama")
    trained = batch["input_ids"].unique()[:4].tolist()
    model = build(tiny_model, trainable_token_indices=trained)
    for name, parameter in model.named_parameters():
        if "trainable_tokens_delta" in name:
            parameter.normal_()
    expected = logits_of(model, batch)
    embeddings = model.get_input_embeddings()(batch.pop("input_ids"))
    torch.testing.assert_close(logits_of(model, {"inputs_embeds": embeddings, **batch}), expected)


@torch.no_grad()
def test_what_it_cannot_follow_is_refused(tiny_model):
    model, ids = build(tiny_model), torch.tensor(PROMPTS[:1])
    with model.disable_adapter():
        cache = model(input_ids=ids, use_cache=True).past_key_values
    with pytest.raises(RuntimeError, match="has not followed"):
        model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)
    assert isinstance(cache, DynamicCache)
    sites = build(tiny_model, router_scope="site", target_modules=["q_proj", "v_proj"])
    assert sites(input_ids=ids).logits.isfinite().all()
    narrow = build(tiny_model, target_modules=["down_proj"])
    with pytest.raises(ValueError, match="which decides, has inputs of width 48"):
        narrow(input_ids=ids)
    router = model.get_base_model().model.layers[0].self_attn.q_proj.molora_router["default"]
    with pytest.raises(RuntimeError, match="the first pass none"):
        router(molora.SiteInput(torch.zeros(1, 32), site="q_proj"))
    with pytest.raises(ValueError, match="hidden_size=0"):
        MoloraConfig(router="first_pass", router_options={"hidden_size": 0})


def test_a_model_that_has_no_hidden_states_is_named(tiny_model):
    config = MoloraConfig(router="first_pass", router_scope="model", target_modules=["q", "v"],
                          num_experts=2)  # fmt: skip
    model = get_peft_model(tiny_model("t5"), config)
    ids = torch.tensor([[3, 4]])
    with pytest.raises(ValueError, match="isn't one. Use another router"):
        model(input_ids=ids, decoder_input_ids=ids)
