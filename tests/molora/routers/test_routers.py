"""Every router against its formula in fp64, and what the base class gives all of them."""

import math

import pytest
import torch
from torch import Tensor, nn

from molora.routers import ROUTERS, Router
from molora.routing import SiteInput

NAMES = ["linear", "mlp"]
every_router = pytest.mark.parametrize("name", NAMES)


def build(name: str, in_features: int = 6, num_experts: int = 3, **options: object) -> Router:
    torch.manual_seed(0)
    router = ROUTERS.build(name, options, in_features=in_features, num_experts=num_experts)
    router.reset_parameters()
    return router


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def affine(x: list[float], weight: Tensor, bias: Tensor | None) -> list[float]:
    shift = [0.0] * len(weight) if bias is None else bias.tolist()
    return [dot(x, row) + b for row, b in zip(weight.tolist(), shift, strict=True)]


def formula(name: str, router: Router, x: list[float]) -> list[float]:
    if name == "linear":
        return affine(x, router.weight, router.bias)
    inner = [z / (1 + math.exp(-z)) for z in affine(x, router.weight_1, router.bias_1)]
    return affine(inner, router.weight_2, router.bias_2)


def logits(router: Router, hidden: Tensor) -> Tensor:
    return router(SiteInput(hidden=hidden))


@pytest.mark.parametrize(
    ("name", "options"),
    [("linear", {}), ("linear", {"bias": True}), ("mlp", {}), ("mlp", {"hidden_size": 5})],
    ids=str,
)
@pytest.mark.parametrize("temperature", [1.0, 0.25, 3])
def test_logits_are_the_formula_over_the_temperature(name, options, temperature):
    router = build(name, temperature=temperature, **options).double()
    for parameter in router.parameters():  # biases too, which start at zero
        nn.init.normal_(parameter)
    hidden = torch.randn(4, 6, dtype=torch.float64)
    expected = [[z / temperature for z in formula(name, router, x)] for x in hidden.tolist()]
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(logits(router, hidden), expected, rtol=1e-12, atol=1e-12)


@every_router
def test_all_parameters_and_the_input_get_gradients(name):
    router = build(name).double()
    hidden = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda h, *_: logits(router, h), (hidden, *router.parameters()))


@every_router
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_are_formed_in_fp32_whatever_the_dtype_and_autocast(name, dtype):
    router = build(name, in_features=64).to(dtype)
    hidden = torch.randn(5, 64).to(dtype)
    exact = torch.tensor([formula(name, router, x) for x in hidden.double().tolist()])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = logits(router, hidden)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, exact, rtol=1e-5, atol=1e-5)


@every_router
def test_noise_is_gaussian_of_that_deviation_and_in_training_only(name):
    router = build(name, noise=0.5)
    hidden = torch.randn(2000, 6)
    router.eval()
    clean = logits(router, hidden)
    assert torch.equal(logits(router, hidden), clean)
    router.train()
    noise = logits(router, hidden) - clean
    # 6000 draws: the mean's standard error is 0.0065, the deviation's 0.0046
    assert abs(noise.mean().item()) < 0.03
    assert noise.std().item() == pytest.approx(0.5, abs=0.02)
    assert not torch.equal(logits(router, hidden), logits(router, hidden))


@every_router
def test_without_noise_training_draws_no_random_numbers(name):
    router = build(name).train()
    state = torch.get_rng_state()
    logits(router, torch.randn(3, 6, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.get_rng_state(), state)


@every_router
def test_experts_start_different(name):
    # equal routing weights and B = 0 would keep them equal for ever
    router = build(name, in_features=16, num_experts=8)
    rows = logits(router, torch.randn(4, 16))
    assert (rows.std(-1) > 0).all()


def test_the_linear_router_starts_as_nn_linear_does_or_normal():
    bound = 1 / math.sqrt(256)
    weight = build("linear", in_features=256, num_experts=64).weight
    assert weight.abs().max() <= bound
    assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    router = build("linear", in_features=256, num_experts=64, init_std=0.02, bias=True)
    assert router.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert not router.bias.any()


@every_router
def test_no_tokens(name):
    assert logits(build(name), torch.zeros(0, 6)).shape == (0, 3)


@every_router
@pytest.mark.parametrize(
    ("option", "value", "rule"),
    [
        ("temperature", 0, "must be above 0"),
        ("temperature", -1.0, "must be above 0"),
        ("temperature", math.nan, "must be a finite number"),
        ("noise", -0.1, "must not be negative"),
        ("noise", math.nan, "must be a finite number"),
    ],
)
def test_a_bad_option_is_named(name, option, value, rule):
    with pytest.raises(ValueError) as caught:
        build(name, **{option: value})
    assert f"option {option}={value!r} {rule}" in str(caught.value)
