"""Several adapters on one model: added, switched, combined, mixed in a batch, merged, removed."""

from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

import molora
from molora.layer import MoloraLayer

IDS = torch.tensor([[5, 9, 33, 12], [44, 3, 17, 8], [8, 8, 50, 31], [60, 2, 7, 7], [1, 40, 6, 30]])
BLOCK: dict[str, Any] = {"router_scope": "block", "target_modules": "all-linear"}


def config(**overrides: Any) -> molora.MoloraConfig:
    fields = {"r": 2, "num_experts": 3, "task_type": "CAUSAL_LM", **BLOCK}
    return molora.MoloraConfig(**{**fields, **overrides})


def plain_lora(**overrides: Any) -> molora.MoloraConfig:
    return config(num_experts=0, num_shared_experts=1, **overrides)


def layers(model: Any) -> list[MoloraLayer]:
    return [m for m in model.modules() if isinstance(m, MoloraLayer)]


@pytest.fixture
def two(tiny_model, randomize) -> Any:
    """A model with the adapters "first" (active) and "second", the second added afterwards."""
    model = get_peft_model(tiny_model("llama"), config(), adapter_name="first")
    model.add_adapter(
        "second", config(num_experts=[4, 2], num_shared_experts=1, router_scope="site")
    )
    return randomize(model).eval()


@pytest.fixture
def logits(logits_of):
    def compute(model: Any, ids: Tensor = IDS, **kwargs: Any) -> Tensor:
        return logits_of(model, {"input_ids": ids}, **kwargs)

    return compute


def test_an_added_adapter_is_not_active(tiny_model, randomize, logits):
    model = randomize(get_peft_model(tiny_model("llama"), config()).eval())
    before = logits(model)
    model.add_adapter("second", config(router_scope="layer"))
    assert torch.equal(logits(model), before)
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trainable and all(".default." in n for n in trainable)
    model.set_adapter("second")
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trainable and all(".second." in n for n in trainable)


def test_switching_equals_having_only_that_adapter(two, tiny_model, tmp_path, logits):
    plain = logits(tiny_model("llama"))
    two.save_pretrained(tmp_path)
    for name in ("second", "first", "second"):
        two.set_adapter(name)
        alone = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / name).eval()
        assert torch.equal(logits(two), logits(alone))
    with two.disable_adapter():
        assert torch.equal(logits(two), plain)
    assert not torch.equal(logits(two), plain)


def test_several_active_adapters_add_up(two, logits_of):
    layer = layers(two)[0]
    x = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))
    updates = []
    for names in (["first"], ["second"], ["first", "second"]):
        two.base_model.set_adapter(names)
        updates.append(logits_of(layer, {"x": x}) - layer.base_layer(x))
    torch.testing.assert_close(updates[2], updates[0] + updates[1])


def test_several_active_adapters_are_recorded_apart_and_both_train(two):
    two.base_model.set_adapter(["first", "second"])
    with molora.observe(two) as records:
        two.train()(input_ids=IDS, labels=IDS).loss.backward()
    site = "model.layers.0.self_attn.q_proj"
    shapes = {name: r.weights.shape for name, r in records.items() if name.startswith(site)}
    assert shapes == {f"{site} (first)": (20, 3), f"{site} (second)": (20, 4)}
    trainable = {n: p for n, p in two.named_parameters() if p.requires_grad}
    assert {n.split(".")[-2] for n in trainable} == {"first", "second"}
    assert all(p.grad is not None for p in trainable.values())


def test_deleting_the_active_adapter_leaves_the_other(two, logits):
    two.set_adapter("second")
    expected = logits(two)
    two.set_adapter("first")
    with pytest.warns(UserWarning, match="Setting active adapter to second"):
        two.delete_adapter("first")
    two.set_adapter("second")
    assert torch.equal(logits(two), expected)


def test_an_adapter_of_the_same_name_is_refused(two):
    with pytest.raises(ValueError, match="first"):
        two.add_adapter("first", config())


def test_a_mixed_batch_equals_each_row_alone(two, logits):
    names = ["first", "__base__", "second", "second", "first"]
    mixed = logits(two, adapter_names=names)
    for i, name in enumerate(names):
        if name == "__base__":
            with two.disable_adapter():
                alone = logits(two, IDS[i : i + 1])
        else:
            two.set_adapter(name)
            alone = logits(two, IDS[i : i + 1])
        torch.testing.assert_close(mixed[i : i + 1], alone, atol=1e-5, rtol=1e-5)


def test_a_mixed_batch_of_adapters_that_save_other_modules(tiny_model, randomize, logits):
    model = get_peft_model(tiny_model("llama"), config(), adapter_name="first").eval()
    model.add_adapter("second", config(modules_to_save=["lm_head"]))
    randomize(model)
    model.get_base_model().lm_head.modules_to_save["second"].weight.data.mul_(2)
    names = ["first", "second"]
    mixed = logits(model, IDS[:2], adapter_names=names)
    for row, name in enumerate(names):
        model.set_adapter(name)
        alone = logits(model, IDS[row : row + 1])
        torch.testing.assert_close(mixed[row : row + 1], alone, atol=1e-5, rtol=1e-5)


def test_a_mixed_batch_can_be_observed(two, logits):
    names = ["first", "__base__", "second", "second", "first"]
    with molora.observe(two) as records:
        logits(two, adapter_names=names, attention_mask=torch.ones_like(IDS))
    site = "model.layers.0.self_attn.q_proj"
    assert records[f"{site} (first)"].weights.shape == (8, 3)
    assert records[f"{site} (second)"].weights.shape == (8, 4)


def test_a_mixed_batch_generates(two):
    names = ["first", "__base__", "second", "second", "first"]
    generate = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    mixed = two.generate(input_ids=IDS, adapter_names=names, **generate)
    two.set_adapter("second")
    assert torch.equal(two.generate(input_ids=IDS, **generate)[2:4], mixed[2:4])
    beams = two.generate(input_ids=IDS, adapter_names=names, num_beams=2, **generate)
    assert beams.shape == mixed.shape


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["first"], "1 entries for a batch of 5"),
        (["first", "third", "first", "first", "first"], r"\['third'\].*\['first', 'second'\]"),
    ],
)
def test_wrong_adapter_names_are_named(two, logits, names: list[str], message: str):
    with pytest.raises(ValueError, match=message):
        logits(two, adapter_names=names)


def test_a_mixed_batch_is_for_inference(two, logits):
    with pytest.raises(ValueError, match=r"call model\.eval\(\)"):
        logits(two.train(), adapter_names=["first"] * 5)


def test_modules_to_save_follow_the_adapter(tiny_model, randomize, logits, tmp_path):
    model = get_peft_model(tiny_model("llama"), config(modules_to_save=["lm_head"]), "first")
    model.add_adapter("second", config(modules_to_save=["lm_head"]))
    head = model.base_model.model.lm_head.modules_to_save
    assert head["first"].weight.requires_grad and not head["second"].weight.requires_grad
    nn.init.normal_(head["first"].weight)
    randomize(model).eval()
    first = logits(model)
    mixed = logits(model, adapter_names=["first", "second", "__base__", "first", "second"])
    torch.testing.assert_close(mixed[[0, 3]], first[[0, 3]], atol=1e-5, rtol=1e-5)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "first").eval()
    assert torch.equal(logits(loaded), first)


def test_trainable_tokens_are_trained_and_saved(tiny_model, randomize, logits, tmp_path):
    fields = {"trainable_token_indices": [5, 33], "target_modules": ["q_proj"]}
    model = randomize(get_peft_model(tiny_model("llama"), config(**fields)))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    expected = logits(model.eval())
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path).eval()
    assert torch.equal(logits(loaded), expected)
    rows = loaded.base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta
    assert rows["default"].shape == (2, 32)


@pytest.mark.parametrize("bias", ["all", "molora_only"])
def test_biases_are_trained_and_saved(bias: str, tiny_model, randomize, logits, tmp_path):
    fields = {"bias": bias, "target_modules": ["c_attn"], "router_scope": "site"}
    model = randomize(get_peft_model(tiny_model("gpt2"), config(**fields)))
    trained = {n for n, p in model.named_parameters() if p.requires_grad and n.endswith(".bias")}
    assert all("c_attn" in n for n in trained) == (bias == "molora_only") and trained
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    expected = logits(model.eval())
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model("gpt2"), tmp_path).eval()
    assert torch.equal(logits(loaded), expected)


def test_layers_to_transform(tiny_model):
    fields = {"layers_to_transform": [1], "target_modules": ["q_proj", "up_proj"]}
    model = get_peft_model(tiny_model("llama"), config(**fields))
    names = [layer.molora_allocation["default"].site.name for layer in layers(model)]
    assert names == ["model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj"]


def test_a_second_adapter_with_other_targets(tiny_model, randomize, logits):
    first = config(target_modules=["q_proj"])
    model = randomize(get_peft_model(tiny_model("llama"), first).eval())
    expected = logits(model)
    model.add_adapter("second", config(target_modules="all-linear"))
    assert [len(layers(model)), torch.equal(logits(model), expected)] == [14, True]
    counts = [
        sum(name in m.molora_experts for m in layers(model)) for name in ("default", "second")
    ]
    assert counts == [2, 14]


def test_unloading_gives_the_base_model_back(two, tiny_model, logits):
    base = two.unload()
    plain = tiny_model("llama")
    assert torch.equal(logits(base), logits(plain))
    assert layers(base) == [] and not base._forward_pre_hooks
    assert base.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize("method", ["merge_adapter", "merge_and_unload"])
def test_merging_routed_experts_is_refused_and_says_what_to_do(two, logits, method: str):
    before = logits(two)
    with pytest.raises(ValueError, match=r"'first' routes its experts by token.*save_pretrained"):
        getattr(two, method)()
    assert torch.equal(logits(two), before)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("safe", [False, True])
def test_unrouted_experts_merge_and_unmerge(
    name: str, safe: bool, tiny_model, randomize, logits_of
):
    batch = {"input_ids": IDS}
    model = randomize(get_peft_model(tiny_model(name), plain_lora()).eval())
    adapted = logits_of(model, batch)
    weights = {n: p.clone() for n, p in model.named_parameters() if "base_layer" in n}
    model.merge_adapter(safe_merge=safe)
    torch.testing.assert_close(logits_of(model, batch), adapted, atol=1e-5, rtol=1e-5)
    model.unmerge_adapter()
    after = dict(model.named_parameters())
    assert all(torch.equal(after[n], weight) for n, weight in weights.items())
    assert torch.equal(logits_of(model, batch), adapted)
    merged = model.merge_and_unload(safe_merge=safe)
    torch.testing.assert_close(logits_of(merged, batch), adapted, atol=1e-5, rtol=1e-5)
    assert layers(merged) == [] and not merged._forward_pre_hooks


def test_two_merged_adapters_come_out_again(tiny_model, randomize, logits):
    model = get_peft_model(tiny_model("llama"), plain_lora(), "first")
    model.add_adapter("second", config(num_experts=1, target_modules=["q_proj", "down_proj"]))
    randomize(model).eval()
    model.base_model.set_adapter(["first", "second"])
    both = logits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), both, atol=1e-5, rtol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(logits(model), both)


def test_merging_a_broken_adapter_safely_is_refused(tiny_model, logits):
    model = get_peft_model(tiny_model("llama"), plain_lora()).eval()
    before = [layer.base_layer.weight.clone() for layer in layers(model)]
    layers(model)[3].molora_experts["default"].B.data[0, 0] = torch.inf
    with pytest.raises(ValueError, match="not finite"):
        model.merge_adapter(safe_merge=True)
    model.unmerge_adapter()
    weights = [layer.base_layer.weight for layer in layers(model)]
    assert all(torch.equal(a, b) for a, b in zip(weights, before, strict=True))


def test_unmerging_follows_a_change_of_dtype(tiny_model, randomize):
    model = randomize(get_peft_model(tiny_model("llama"), plain_lora()))
    model.merge_adapter()
    model.double().unmerge_adapter()
    assert {layer.base_layer.weight.dtype for layer in layers(model)} == {torch.float64}


def test_merging_in_fp64_is_exact_to_fp64(tiny_model, randomize, logits):
    base = tiny_model("llama").double()
    model = randomize(get_peft_model(base, plain_lora()).eval())
    layer = layers(model)[0]
    A, B = (getattr(layer.molora_experts["default"], n) for n in "AB")
    torch.testing.assert_close(layer.get_delta_weight("default"), 16 / 2 * B @ A)
