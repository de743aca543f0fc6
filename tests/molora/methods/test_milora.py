"""MiLoRA from its formula: the modules of a layer are the experts of its prompts."""

import pytest
import torch
from torch.nn.functional import gelu

from molora import MoloraConfig
from molora.routers import ROUTERS

from .test_sequence_methods import for_each_token

MODULES = ["o_proj", "gate_proj", "up_proj", "down_proj"]


def decide(site):
    """(batch, 4) of the layer's first module, from its input."""
    rows = []
    for x, prompt in zip(site.x.unflatten(0, site.shape), site.labels["prompt_mask"], strict=True):
        a = (x[prompt] @ site.p["router.attention"][0]).softmax(0)
        h = (a[:, None] * x[prompt]).sum(0)
        powers = h ** torch.arange(7.0)[:, None]
        above = (site.p["router.numerator"][:, None] * powers).sum(0)
        below = 1 + (site.p["router.denominator"][:, None] * powers[1:6]).sum(0).abs()
        rows.append((site.p["router.weight"] @ (above / below)).softmax(-1))
    return torch.stack(rows)


def formula(site):
    first = site.name.endswith("o_proj")
    if first:
        site.memory[site.layer] = decide(site)
    p = site.memory[site.layer]
    third = p.sort(-1, descending=True).values[:, 1:2]
    R = for_each_token(site, p * (p >= third))
    place = MODULES.index(site.name.split(".")[-1])
    x, A, B = site.x, site.p["experts.A"], site.p["experts.B"]
    y = site.base() + R[:, place, None] * (x @ A.T @ B.T)
    if not first:
        return y
    counted = for_each_token(site, p)[site.mask]
    share = torch.nn.functional.one_hot(counted.argmax(-1), 4).double().mean(0)
    return y, {"load_balancing": 4 * (share * counted.mean(0)).sum()}


@pytest.mark.parametrize("train", [True, False])
def test_formula(fidelity, train: bool):
    config = MoloraConfig.from_method(
        "milora", target_modules=MODULES, expert_options={"modules": MODULES}, num_experts=4,
        top_k=2, r=2, lora_alpha=2,
    )  # fmt: skip
    case = fidelity(config)
    evaluated = formula if train else lambda site: _output(formula(site))
    case.check(evaluated, train=train)
    holders = {name for name in case.layers() if "router.weight" in case.tensors(name)}
    assert holders == {"layers.0.o_proj", "layers.1.o_proj"}


def _output(result):
    return result[0] if isinstance(result, tuple) else result


def test_the_activation_starts_as_gelu():
    router = ROUTERS.build("prompt_attention", {}, in_features=4, num_experts=2)
    router.reset_parameters()
    values = torch.linspace(-4, 4, 1001, dtype=torch.float64)
    assert (router._activation(values) - gelu(values)).abs().max() < 0.0016
