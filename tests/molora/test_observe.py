"""What molora.observe records, against a twin model."""

import pytest
import torch
from torch import Tensor
from torch.optim import SGD

import molora

from .routed_twin import (
    LEADERS,
    NUM_EXPERTS,
    TOP_K,
    Twin,
    checkpoint,
    ragged_batch,
    routed_llama,
    tiny_llama,
    token_batch,
)

MODULES = {
    "self_attn": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "mlp": ["gate_proj", "up_proj", "down_proj"],
}
SITES = {
    f"model.layers.{layer}.{parent}.{child}": f"{layer}.{child}"
    for layer in range(2)
    for parent, children in MODULES.items()
    for child in children
}
FIRST = "model.layers.0.self_attn.q_proj"


def leader(site: str, scope: str) -> str:
    """The twin's name of the site that decides for this one."""
    layer, child = SITES[site].split(".")
    return f"{layer}.{LEADERS[scope].get(child, child)}"


@pytest.mark.parametrize("scope", list(LEADERS))
def test_every_site_with_the_decision_it_follows(scope: str):
    model, batch = routed_llama(router_scope=scope), ragged_batch()
    twin = Twin(model, scope)
    with molora.observe(model) as records:
        model(**batch)
    assert set(records) == set(SITES) and len(records) == 14
    with torch.no_grad():
        twin.run(batch)
    for site, routing in records.items():
        logits, probs, weights = twin.decisions[leader(site, scope)]
        assert routing.weights.shape == (21, NUM_EXPERTS)
        torch.testing.assert_close(routing.logits, logits, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(routing.probs, probs, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(routing.weights, weights, rtol=1e-5, atol=1e-6)
        assert torch.equal(routing.mask, batch["attention_mask"].flatten().bool())
        assert not any(t.requires_grad for t in (routing.weights, routing.logits, routing.probs))


def test_several_passes_stand_one_after_the_other():
    model, batches = routed_llama().eval(), [ragged_batch(), token_batch(rows=2, length=5)]
    single = []
    for batch in batches:
        with molora.observe(model) as records:
            model(**batch)
        single.append(records[FIRST])
    with molora.observe(model) as records:
        for batch in batches:
            model(**batch)
    both = records[FIRST]
    assert both.weights.shape == (21 + 10, NUM_EXPERTS)
    for name in ("weights", "logits", "probs", "mask"):
        parts: list[Tensor] = [getattr(routing, name) for routing in single]
        assert torch.equal(getattr(both, name), torch.cat(parts))


def test_passes_with_and_without_a_mask():
    model, batch = routed_llama().eval(), ragged_batch()
    with molora.observe(model) as records:
        model(input_ids=batch["input_ids"])
        assert records[FIRST].mask is None
        model(**batch)
    real = batch["attention_mask"].flatten().bool()
    assert torch.equal(records[FIRST].mask, torch.cat([torch.ones(21, dtype=torch.bool), real]))


def test_generation_with_the_cache_records_each_token_once():
    model = routed_llama().eval()
    batch = token_batch(rows=2, length=4)
    batch["attention_mask"][1, :2] = 0  # padded on the left
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with molora.observe(model) as records:
        tokens = model.generate(
            **inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0
        )
    routing = records[FIRST]
    assert tokens.shape == (2, 7)
    assert routing.weights.shape == (2 * 4 + 2 + 2, NUM_EXPERTS)  # the prompt, then two steps
    assert torch.equal(routing.mask[:8], inputs["attention_mask"].flatten().bool())
    assert routing.mask[8:].all()
    # the same tokens in one pass without a cache are routed alike
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 2, dtype=torch.long)], 1)
    with molora.observe(model) as records, torch.no_grad():
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        model(input_ids=tokens[:, :6], attention_mask=mask, position_ids=positions)
    whole = records[FIRST].weights.unflatten(0, (2, 6))
    torch.testing.assert_close(routing.weights[:8].unflatten(0, (2, 4)), whole[:, :4])
    torch.testing.assert_close(routing.weights[8:10], whole[:, 4])
    torch.testing.assert_close(routing.weights[10:], whole[:, 5])


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_recomputation_is_not_recorded(reentrant: bool):
    model, batch = routed_llama(), ragged_batch()
    checkpoint(model, reentrant)
    with molora.observe(model) as records:
        model(**batch).loss.backward()
    assert {routing.weights.shape[0] for routing in records.values()} == {21}


def test_nested_blocks():
    model, batch = routed_llama().eval(), token_batch()
    with molora.observe(model) as outer:
        model(**batch)
        with molora.observe(model) as inner:
            model(**batch)
        model(**batch)
    model(**batch)
    assert inner[FIRST].weights.shape[0] == 21
    assert outer[FIRST].weights.shape[0] == 3 * 21


def test_a_block_ends_with_an_error_too():
    model, batch = routed_llama().eval(), token_batch()
    with pytest.raises(KeyError, match="nothing"), molora.observe(model) as records:
        model(**batch)
        raise KeyError("nothing")
    model(**batch)
    assert records[FIRST].weights.shape[0] == 21


def test_observing_changes_nothing():
    batch = ragged_batch()

    def step(observed: bool) -> dict[str, Tensor]:
        model = routed_llama({"load_balancing": 1.0})
        optimizer = SGD(model.parameters(), lr=0.1)
        if observed:
            with molora.observe(model):
                model(**batch).loss.backward()
        else:
            model(**batch).loss.backward()
        optimizer.step()
        return dict(model.named_parameters())

    watched = step(True)
    for name, parameter in step(False).items():
        assert torch.equal(parameter, watched[name])


def test_weights_of_a_token_sum_to_one_over_its_experts():
    model = routed_llama().eval()
    with molora.observe(model) as records:
        model(**token_batch())
    for routing in records.values():
        torch.testing.assert_close(routing.weights.sum(-1), torch.ones(21, dtype=torch.float64))
        assert routing.selected.sum(-1).tolist() == [TOP_K] * 21


def test_sites_without_a_router_do_not_appear():
    model = routed_llama(num_experts=[1, NUM_EXPERTS], top_k=[1, TOP_K]).eval()
    with molora.observe(model) as records:
        model(**token_batch())
    assert set(records) == {site for site in SITES if site.startswith("model.layers.1.")}


def test_a_model_without_experts_is_refused():
    with pytest.raises(ValueError, match="no MoLoRA layer"), molora.observe(tiny_llama()):
        pass
    with pytest.raises(ValueError, match="no MoLoRA layer"):
        molora.after_step(tiny_llama())
