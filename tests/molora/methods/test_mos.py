"""MoS from its formula: every factor is put together, shard by shard, from the pools."""

import pytest
import torch
from peft import PeftModel, get_peft_model

from molora import MoloraConfig

OPTIONS = {"pool_rank": 2, "shards": 2, "private_rank": 1}


def factor(pool, places):
    return torch.stack([torch.cat([pool[k] for k in row]) for row in places.tolist()])


def formula(site):
    pools = site.memory.setdefault("pools", {})
    module = site.name.rpartition(".")[2]
    if "experts.pool.A" in site.p:
        pools[module] = site.p["experts.pool.A"], site.p["experts.pool.B"]
    A = factor(pools[module][0], site.buffers["experts.places_A"])
    B = factor(pools[module][1], site.buffers["experts.places_B"]).T
    if not site.ranks:
        return site.base() + site.scaling[0] * site.x @ A.T @ B.T
    p = (site.x @ site.p["router.weight"].T).softmax(-1)
    outputs = [
        s * site.x @ a.T @ b.T
        for s, a, b in zip(site.scaling, A.split(site.ranks), B.split(site.ranks, 1), strict=True)
    ]
    return site.base() + sum(p[:, e, None] * output for e, output in enumerate(outputs))


def test_formula(fidelity):
    config = MoloraConfig.from_method("mos", r=3, lora_dropout=0.0, expert_options=OPTIONS)
    fidelity(config).check(formula)


def test_routed_experts_may_be_made_of_shards(fidelity):
    config = MoloraConfig(
        r=1, num_experts=3, gate="dense", target_modules=["up_proj", "down_proj"],
        experts="shards", expert_options=OPTIONS,
    )  # fmt: skip
    fidelity(config).check(formula)


@pytest.fixture
def model(tiny_model, randomize):
    config = MoloraConfig.from_method("mos", r=5, expert_options={**OPTIONS, "pool_rank": 3})
    return randomize(get_peft_model(tiny_model("llama"), config)).eval()


def places(model, module: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    found = []
    for name, layer in model.named_modules():
        if name.endswith(module) and hasattr(layer, "molora_experts"):
            experts = layer.molora_experts["default"]
            found.append((experts.places_A, experts.places_B))
    return found


def test_sites_draw_apart_and_keep_some_shards_to_themselves(model):
    """Pools for rank 3 of two layers, 12 shards; of each 5 ranks, 1 is private."""
    one, two = places(model, "up_proj")
    for first, second in zip(one, two, strict=True):
        common = 2 * 2 * 2  # (pool_rank - private_rank) ranks, 2 layers, 2 shards
        assert first.shape == (5, 2) and (first[:4] < common).all()
        assert first.unique().numel() == 10  # without replacement
        assert first[4].tolist() == [8, 9] and second[4].tolist() == [10, 11]
        assert not torch.equal(first, second)
    assert not torch.equal(one[0][:4], one[1][:4])


def test_the_pools_have_the_parameters_of_their_rank(model):
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert all("layers.0" in name for name in trainable)
    features = {
        "q": 64,
        "k": 48,
        "v": 48,
        "o": 64,
        "gate": 80,
        "up": 80,
        "down": 80,
    }  # d_in + d_out
    assert sum(p.numel() for p in trainable.values()) == 3 * 2 * sum(features.values())


def test_it_merges_like_lora(model, tiny_batch, logits_of, tiny_model, tmp_path):
    batch = tiny_batch("llama")
    expected = logits_of(model, batch)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path).eval()
    assert torch.equal(logits_of(loaded, batch), expected)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(logits_of(merged, batch), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shards": 5}, "shards=5 must divide the 32 input and 32 output"),
        ({"shards": 0}, "shards=0 must be at least 1"),
        ({"private_rank": 3}, "pool_rank=2, private_rank=3"),
        ({"pool_rank": 1, "private_rank": 0}, "share pools for 2 ranks .* each needs 3"),
    ],
)
def test_what_the_pools_cannot_give_is_refused(tiny_model, options, message):
    with pytest.raises(ValueError, match=message):
        fields = {"r": 3, "expert_options": {**OPTIONS, **options}}
        get_peft_model(tiny_model("llama"), MoloraConfig.from_method("mos", **fields))
