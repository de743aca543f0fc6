"""MixLoRA from its formula, its three strategies, and a Mixtral block with the same weights."""

from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

import molora
from molora import MoloraConfig

EXPERTS = {"(gate|up|down)_proj": 4, ".*": 0}
TARGETS = ["o_proj", "gate_proj", "up_proj", "down_proj"]


def config(name: str, **overrides: Any) -> MoloraConfig:
    small = {"num_experts": EXPERTS, "target_modules": TARGETS, "r": 2, "lora_dropout": 0.0}
    return MoloraConfig.from_method(name, **{**small, **overrides})


def attention(site) -> Tensor:
    assert site.ranks == () and len(site.shared_ranks) == 1
    return site.base() + site.outputs()[0]


def probabilities(site) -> Tensor:
    return (site.x @ site.p["router.weight"].T).softmax(-1)


def balance(site, probs: Tensor, used: Tensor) -> Tensor:
    share = site.token_mean(used.double())
    return probs.shape[1] / share.sum() * (share * site.token_mean(probs)).sum()


def top_two(site):
    if not site.parts:
        return attention(site)
    probs = probabilities(site)
    used = torch.zeros_like(probs)
    for t, row in enumerate(probs.tolist()):
        used[t, sorted(range(4), key=lambda e: -row[e])[:2]] = 1
    weights = probs * used / (probs * used).sum(-1, keepdim=True)
    return site.mix_networks(weights), {"load_balancing": balance(site, probs, used)}


def prefix(site):
    if not site.parts:
        return attention(site)
    probs = probabilities(site)
    used = torch.zeros_like(probs)
    for t, row in enumerate(probs.tolist()):
        mass = 0.0
        for e in sorted(range(4), key=lambda e: -row[e]):
            used[t, e], mass = 1, mass + row[e]
            if mass >= 0.8:
                break
    return site.mix_networks(probs * used), {"load_balancing": balance(site, probs, used)}


def first_come(capacity: int):
    def formula(site):
        if not site.parts:
            return attention(site)
        logits = site.x @ site.p["router.weight"].T
        probs, used, row = logits.softmax(-1), torch.zeros_like(logits), -1
        for t, expert in enumerate(logits.argmax(-1).tolist()):
            if t // site.shape[1] != row:  # every row of the batch starts with empty experts
                row, taken = t // site.shape[1], [0] * 4
            taken[expert] += int(site.mask[t])
            used[t, expert] = not site.training or taken[expert] <= capacity
        return site.mix_networks(probs * used), {
            "load_balancing": balance(site, probs, used),
            "z_loss": site.token_mean(logits.logsumexp(-1) ** 2),
        }

    return formula


def test_top_k(fidelity):
    case = fidelity(config("mixlora"))
    case.check(top_two)
    case.check(top_two, train=False)


def test_dynamic(fidelity):
    case = fidelity(config("mixlora-dynamic"))
    case.check(prefix)
    case.check(prefix, train=False)


@pytest.mark.parametrize("capacity", [1, 2])
def test_switch(fidelity, capacity: int):
    still = {"init_std": 1.0}  # jitter is drawn
    gate = {"capacity": capacity}
    case = fidelity(config("mixlora-switch", gate_options=gate, router_options=still))
    case.check(first_come(capacity))
    case.check(first_come(capacity), train=False)


def test_a_full_expert_leaves_the_base_network(tiny_model):
    """In training: the second token of a sequence that chooses an expert of capacity 1."""
    fields = {"gate_options": {"capacity": 1}, "router_options": {"init_std": 1.0}}
    settings = config("mixlora-switch", target_modules="all-linear", **fields)
    model = get_peft_model(tiny_model("llama"), settings).train()
    ids = torch.tensor([[9, 9, 9, 9], [9, 9, 9, 9]])
    with molora.observe(model) as records, torch.no_grad():
        model(input_ids=ids, attention_mask=torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]]))
    used = records["model.layers.0.mlp"].selected.any(-1).view(2, 4)
    # The same token four times goes to the same expert; what pads the second row takes no place.
    assert used[0].tolist() == [True, False, False, False]
    assert used[1, 2:].tolist() == [True, False]


@torch.no_grad()
def test_it_equals_a_mixtral_block_of_merged_experts(tiny_model, randomize):
    model = tiny_model("llama")
    names = {"num_experts": {".*": 8}, "num_shared_experts": 0, "r": 4}
    targets = ["gate_proj", "up_proj", "down_proj"]
    randomize(get_peft_model(model, config("mixlora", target_modules=targets, **names)))
    layer = model.model.layers[0].mlp
    mixtral = MixtralConfig(
        hidden_size=32, intermediate_size=48, num_local_experts=8, num_experts_per_tok=2
    )
    mixtral._experts_implementation = "eager"
    block = MixtralSparseMoeBlock(mixtral)
    experts, base = layer.molora_experts["default"], layer.base_layer
    merged = {}
    for name in targets:
        A, B = (getattr(experts.linears[name], factor) for factor in "AB")
        B.mul_(0.1)  # so that outputs are near 1, where 1e-5 is a tolerance for fp32
        merged[name] = torch.stack(
            [
                getattr(base, name).weight + 32 / 4 * B[:, e * 4 : e * 4 + 4] @ A[e * 4 : e * 4 + 4]
                for e in range(8)
            ]
        )
    block.gate.weight.copy_(layer.molora_router["default"].weight)
    block.experts.gate_up_proj.copy_(torch.cat([merged["gate_proj"], merged["up_proj"]], 1))
    block.experts.down_proj.copy_(merged["down_proj"])
    x = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(layer(x), block(x), atol=1e-5, rtol=1e-5)
    assert (layer(x) - base(x)).abs().max() > 0.1
