"""HotMoE from its formula: attention among experts below, by tokens above, and its loss."""

import math

import pytest
import torch
from peft import get_peft_model
from torch import Tensor

import molora
from molora import MoloraConfig
from molora.layer import adapted_layers
from molora.routers import ROUTERS

SMALL = {"vector_dim": 5, "attention_dim": 6, "inner": 3}


def normalized(vectors: Tensor, p: dict[str, Tensor]) -> Tensor:
    """Of one (E, m) matrix."""
    spread = (vectors - vectors.mean()) / (vectors.var(unbiased=False) + 1e-5).sqrt()
    return spread * p["router.norm_weight"] + p["router.norm_bias"]


def probabilities(site) -> Tensor:
    p, rows = site.p, []
    experts = normalized(p["router.vectors"], p)
    keys = experts @ p["router.key"].T
    for x in site.x:
        asking = experts
        if site.layer == 1:  # of two
            inner = torch.relu(p["router.down"] @ x + p["router.down_bias"])
            asking = normalized(
                torch.einsum("emj,j->em", p["router.up"], inner) + p["router.up_bias"], p
            )
        scores = asking @ p["router.query"].T @ keys.T / math.sqrt(6)
        values = p["router.value"] @ x + p["router.value_bias"]
        rows.append((scores.softmax(-1) @ values).softmax(-1))
    return torch.stack(rows)


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b) / (a @ a * (b @ b)).sqrt()


def formula(site):
    p = probabilities(site)
    w = torch.zeros_like(p)
    for t, row in enumerate(p.tolist()):
        best = sorted(range(len(row)), key=lambda e: -row[e])[:2]
        w[t, best] = (p[t, best] / 0.1).softmax(-1)
    E = p.shape[1]
    mean = w[site.mask].mean(0)
    between = -(mean * (mean + 1e-9).log()).sum()
    within = -(w[site.mask] * (w[site.mask] + 1e-9).log()).sum(-1).mean()
    loss = torch.relu(math.log(E) - (between - within)) / math.log(E)
    real = site.mask.view(site.shape)
    inputs = [x[r].mean(0).detach() for x, r in zip(site.x.view(*site.shape, -1), real)]  # noqa: B905
    used = [x[r].mean(0) for x, r in zip(w.view(*site.shape, -1), real)]  # noqa: B905
    for i in range(len(real)):
        for j in range(len(real)):
            c, s = cosine(inputs[i], inputs[j]), cosine(used[i], used[j])
            loss = loss + ((1 - s) * c + 1.5 * s * (1 - c)) / len(real) ** 2
    return site.mix(w), {"similarity_guided": loss}


def config(**fields) -> MoloraConfig:
    return MoloraConfig.from_method("hotmoe", lora_dropout=0.0, router_options=SMALL, **fields)


def test_formula(fidelity):
    case = fidelity(config(num_experts=[4, 3], r=[2, 3]), spread=0.6)
    case.check(formula)
    case.check(formula, train=False)


def test_tokens_ask_in_the_upper_half(tiny_model):
    model = get_peft_model(tiny_model("llama", num_hidden_layers=5), config())
    asks = {
        int(site.split(".")[2]): layer.molora_router["default"].tokens_ask
        for site, layer in adapted_layers(model).items()
    }
    # the shares are 1/5, 2/5, 3/5, ...
    assert asks == {0: False, 1: False, 2: True, 3: True, 4: True}


def test_a_batch_of_one_sequence_has_no_pairs_to_learn_from(tiny_model):
    model = get_peft_model(tiny_model("llama"), config()).train()
    ids = torch.tensor([[5, 9, 33, 12]])
    model(input_ids=ids, labels=ids).loss.backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(grad is not None and grad.isfinite().all() for grad in grads)


def test_what_does_not_fit():
    for options in ({"vector_dim": 0}, {"inner": 0}, {"tokens_from": 2}):
        with pytest.raises(ValueError, match="router option"):
            ROUTERS.build("expert_attention", options, in_features=2, num_experts=2)
    with pytest.raises(ValueError, match="sharpness=0"):
        MoloraConfig(gate="sharpened_top_k", gate_options={"sharpness": 0})
    with pytest.raises(ValueError, match="unlike=-1"):
        molora.losses.LOSSES.build("similarity_guided", {"unlike": -1})
