"""Inference: the layer's formula, and the general way wherever that has more to do."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from molora import MoloraConfig, inference, observe
from molora.experts import Experts
from molora.experts.lora import LoraExperts
from molora.feedforward_experts import FeedForwardExperts
from molora.gates import Gate
from molora.gates.top_k import TopK
from molora.layer import adapted_layers
from molora.routers import Router
from molora.routers.linear import LinearRouter
from molora.routing import Routing, SiteInput

D_IN, D_OUT = 6, 5


@pytest.fixture
def ways(monkeypatch) -> list[str]:
    """How the site's tokens went, call by call: "alone", by Python's numbers, "short", or "general"
    where the short way was asked and declined."""
    seen: list[str] = []
    by_numbers: list[bool] = []
    add_token, add_experts = inference.add_token, inference.add_experts

    def watched_token(*arguments: Any) -> Tensor | None:
        result = add_token(*arguments)
        by_numbers.append(result is not None)
        return result

    def watched(*arguments: Any) -> Tensor | None:
        by_numbers.clear()
        result = add_experts(*arguments)
        seen.append("general" if result is None else "alone" if any(by_numbers) else "short")
        return result

    monkeypatch.setattr(inference, "add_token", watched_token)
    monkeypatch.setattr(inference, "add_experts", watched)
    return seen


@pytest.fixture
def build(randomize):
    """`build(**fields)`: a linear layer with a random adapter, in fp64, and its site."""

    def make(dtype: torch.dtype = torch.float64, **fields: Any) -> SimpleNamespace:
        torch.manual_seed(0)
        fields = {"num_experts": 4, "top_k": 2, "r": 2, "lora_alpha": 3, **fields}
        config = MoloraConfig(target_modules=["0"], **fields)
        base = nn.Sequential(nn.Linear(D_IN, D_OUT)).to(dtype)
        model = randomize(get_peft_model(base, config)).eval()
        (layer,) = adapted_layers(model).values()
        parts = (layer.molora_router, layer.molora_gate, layer.molora_experts)
        router, gate, experts = (part["default"] for part in parts)
        x = torch.randn(1, D_IN, dtype=dtype)
        return SimpleNamespace(
            model=model, base=layer.base_layer, router=router, gate=gate, experts=experts, x=x
        )

    return make


def factors_of_each(experts: Any) -> list[tuple[Tensor, Tensor]]:
    """A_e and B_e of the routed, then the shared experts."""
    pairs = []
    a = b = 0
    for number, rank in enumerate(experts.ranks + experts.shared_ranks):
        routed = number < len(experts.ranks)
        if routed and experts.tied:
            a, b = (0 if experts.tied == f else number * rank for f in ("A", "B"))
        pairs.append((experts.A[a : a + rank], experts.B[:, b : b + rank]))
        a, b = a + rank, b + rank
    return pairs


def formula(site: SimpleNamespace, k: int, normalized: bool, temperature: float = 1.0) -> Tensor:
    """y = W x + b + sum of w_e s_e B_e A_e x, in fp64."""
    x = site.x[0].double()
    z = site.router.weight.double() @ x
    if site.router.bias is not None:
        z = z + site.router.bias.double()
    z = (z / temperature).tolist()
    best = sorted(range(len(z)), key=lambda e: -z[e])[:k]
    total = sum(math.exp(z[e]) for e in (best if normalized else range(len(z))))
    weights = {e: math.exp(z[e]) / total for e in best}
    weights.update({len(z) + s: 1.0 for s in range(len(site.experts.shared_ranks))})
    y = site.base.weight.double() @ x + site.base.bias.double()
    for e, (A, B) in enumerate(factors_of_each(site.experts)):
        y = y + weights.get(e, 0.0) * site.experts.scaling[e] * (B.double() @ (A.double() @ x))
    return y[None]


@torch.no_grad()
@pytest.mark.parametrize(
    ("fields", "k", "normalized"),
    [
        ({}, 2, True),
        ({"top_k": 3, "r": [[1, 3, 2, 4]]}, 3, True),
        ({"num_shared_experts": 2, "shared_expert_rank": 3}, 2, True),
        ({"experts": "shared_a", "num_shared_experts": 1}, 2, True),
        ({"experts": "shared_b", "num_shared_experts": 2}, 2, True),
        ({"rank_wise": True, "num_experts": 2, "r": 3, "top_k": 4}, 4, True),
        ({"gate": "top_k_unnormalized", "router_options": {"bias": True}}, 2, False),
        ({"gate": "switch", "top_k": 1}, 1, False),
        ({"gate": "gshard"}, 2, True),
    ],
    ids=str,
)
def test_a_token_gets_the_formula(build, ways, fields, k, normalized):
    site = build(**fields)
    torch.testing.assert_close(site.model(site.x), formula(site, k, normalized))
    assert ways == ["alone"]


def general(site: SimpleNamespace, x: Tensor) -> Tensor:
    """What the site makes of x the general way, which it goes where somebody listens."""
    hook = site.router.register_forward_hook(lambda *_: None)
    result: Tensor = site.model(x)
    hook.remove()
    return result


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("fields", "k", "normalized"),
    [
        ({"r": [[1, 3, 2, 4]], "num_shared_experts": 1}, 2, True),
        ({"gate": "top_k_unnormalized", "router_options": {"bias": True}}, 2, False),
        ({"gate": "switch", "top_k": 1, "router_options": {"temperature": 0.3}}, 1, False),
    ],
    ids=str,
)
def test_several_tokens_get_the_formula_and_the_general_way_s_bits(
    build, ways, fields, k, normalized, dtype
):
    site = build(dtype, **fields)
    x = torch.randn(2, 3, D_IN, dtype=dtype)
    result = site.model(x)
    assert torch.equal(result, general(site, x))
    assert ways == ["short", "general"]
    if dtype == torch.float64:
        for token, found in zip(x.view(-1, 1, D_IN), result.view(-1, 1, D_OUT), strict=True):
            site.x = token
            temperature = site.router.temperature
            torch.testing.assert_close(found, formula(site, k, normalized, temperature))


@torch.no_grad()
def test_the_temperature_divides_the_logits(build, ways):
    site = build(router_options={"temperature": 0.3})
    expected = formula(site, 2, normalized=True, temperature=0.3)
    torch.testing.assert_close(site.model(site.x), expected)
    assert ways == ["alone"]


@torch.no_grad()
def test_a_half_precision_model_rounds_once(build, ways):
    site = build(torch.bfloat16)
    assert site.experts.A.dtype == torch.float32
    result = site.model(site.x)
    added = formula(site, 2, normalized=True) - (
        site.base.weight.double() @ site.x[0].double() + site.base.bias.double()
    )
    assert result.dtype == torch.bfloat16
    assert torch.equal(result, (site.base(site.x).double() + added).bfloat16())
    assert ways == ["alone"]


@torch.no_grad()
def test_the_base_layer_keeps_its_output(build):
    site = build()
    outputs = []
    site.base.register_forward_hook(lambda module, args, output: outputs.append(output))
    site.model(site.x)
    assert torch.equal(outputs[0], site.base(site.x))


class Doubled(LinearRouter):
    """Says nothing new of one token, and something else of many."""

    def compute_logits(self, inputs: SiteInput) -> Tensor:
        return 2 * super().compute_logits(inputs)


class Reversed(TopK):
    def forward(self, logits: Tensor, inputs: SiteInput) -> Routing:
        return super().forward(-logits, inputs)


class Negated(LoraExperts):
    def forward(self, hidden: Tensor, weights: Tensor | None, result: Tensor) -> Tensor:
        return 2 * result - super().forward(hidden, weights, result)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "subclass"), [("router", Doubled), ("gate", Reversed), ("experts", Negated)]
)
def test_a_subclass_that_changes_what_many_tokens_get_is_asked(build, ways, name, subclass):
    site = build()
    getattr(site, name).__class__ = subclass
    among = site.model(torch.cat([site.x, site.x]))
    torch.testing.assert_close(site.model(site.x), among[:1])
    assert ways == ["general", "general"]


def test_a_subclass_that_speaks_of_one_token_too_is_believed():
    class Both(Doubled):
        def logits_of_token(self, hidden: Tensor) -> list[float] | None:
            return None

    assert inference._says_the_same(Router, Both)
    assert not inference._says_the_same(Router, Doubled)
    assert not inference._says_the_same(Gate, Reversed)
    assert not inference._says_the_same(Experts, Negated)


def test_a_class_that_says_nothing_is_not_asked():
    """The network's experts have no `forward`, and are run by the layer around the network."""
    assert not inference._says_the_same(Experts, FeedForwardExperts)


@torch.no_grad()
@pytest.mark.parametrize("name", ["router", "gate", "experts"])
def test_who_listens_to_a_part_hears_of_every_token(build, ways, name):
    site = build()
    heard = []
    hooks = [
        getattr(site, name).register_forward_hook(lambda *_: heard.append("after")),
        getattr(site, name).register_forward_pre_hook(lambda *_: heard.append("before")),
    ]
    site.model(site.x)
    hooks.pop().remove()
    site.model(site.x)
    assert heard == ["before", "after", "after"]
    hooks.pop().remove()
    site.model(site.x)
    assert ways == ["general", "general", "alone"]


@torch.no_grad()
@pytest.mark.parametrize("name", ["router", "gate", "experts"])
def test_a_forward_put_in_place_of_a_part_s_own_is_called(build, ways, name):
    """As accelerate does to fetch weights from where they were offloaded to."""
    site = build()
    part = getattr(site, name)
    called = []

    def forward(*arguments: Any) -> Any:
        called.append(name)
        return type(part).forward(part, *arguments)

    part.forward = forward
    site.model(site.x)
    assert called == [name]
    assert ways == ["general"]


@torch.no_grad()
def test_observing_records_every_token(build, ways):
    site = build()
    with observe(site.model) as records:
        site.model(site.x)
        site.model(site.x)
    assert records["0"].weights.shape == (2, 4)
    assert ways == []


def test_a_token_with_gradients_keeps_its_graph(build, ways):
    site = build()
    site.model(site.x).sum().backward()
    assert site.router.weight.grad is not None
    assert ways == ["general"]


@torch.no_grad()
@pytest.mark.parametrize("part", ["router", "gate", "experts"])
def test_a_part_in_training_is_asked(build, ways, part):
    site = build(lora_dropout=0.5)
    getattr(site, part).train()
    site.model(site.x)
    assert ways == ["general"]


@torch.no_grad()
@pytest.mark.parametrize(
    "fields",
    [
        {"gate": "dense", "top_k": None},
        {"router": "cosine"},
        {"router": "output"},
        {"experts": "rank_pairs", "r": 1},
    ],
    ids=str,
)
def test_parts_that_say_nothing_of_one_token_go_the_general_way(build, ways, fields):
    site = build(**fields)
    among = site.model(torch.cat([site.x, 2 * site.x]))
    torch.testing.assert_close(site.model(site.x), among[:1])
    assert ways == ["general", "general"]


@torch.no_grad()
def test_autocast_reads_no_numbers(build, ways):
    site = build(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(site.model(site.x), general(site, site.x))
    assert ways == ["short", "general"]


@torch.no_grad()
def test_narrow_factors_are_multiplied_together(build, ways):
    site = build(torch.bfloat16)
    site.model.to(torch.bfloat16)
    among = site.model(torch.cat([site.x, 2 * site.x]))
    torch.testing.assert_close(site.model(site.x), among[:1])
    assert ways == ["short", "short"]


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.torch.jit.trace:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_tracing_records_no_numbers(build):
    """What is traced with one token routes another one by its own logits."""
    site = build()
    other = torch.randn(1, D_IN, dtype=torch.float64)
    traced = torch.jit.trace(site.model, (site.x,), check_trace=False)
    torch.testing.assert_close(traced(other), site.model(other))


@torch.no_grad()
def test_logits_that_are_not_finite_are_not_hidden(build):
    site = build()
    site.router.weight.data[1, 0] = math.nan
    assert site.model(site.x).isnan().any()
