"""The bank of low-rank experts against the sum over experts, written out."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from molora.experts import EXPERTS, LoraExperts, SiteSpec

D_IN, D_OUT = 5, 4
BANKS = [
    {"ranks": (2, 2, 2), "shared_ranks": ()},
    {"ranks": (1, 3, 2), "shared_ranks": ()},
    {"ranks": (2, 2), "shared_ranks": (2,)},
    {"ranks": (3, 1), "shared_ranks": (2, 4)},
    {"ranks": (1,) * 6, "shared_ranks": ()},
    {"ranks": (), "shared_ranks": (3,)},
    {"ranks": (), "shared_ranks": (3, 1)},
]
every_bank = pytest.mark.parametrize("bank", BANKS, ids=str)


def build(bank: dict[str, Any], scaling: tuple[float, ...] | None = None, **fields: Any) -> Any:
    torch.manual_seed(0)
    count = len(bank["ranks"]) + len(bank["shared_ranks"])
    if scaling is None:
        scaling = tuple(0.5 + 0.25 * e for e in range(count))
    experts = LoraExperts(SiteSpec(D_IN, D_OUT, scaling=scaling, **bank), **fields)
    experts.reset_parameters(False, base)
    return experts


def base() -> Tensor:
    raise AssertionError("the initialisation needs no base weight")


def blocks(experts: LoraExperts) -> list[Tensor]:
    """B_e A_e of each expert, the shared ones last."""
    products, start = [], 0
    for rank in experts.ranks + experts.shared_ranks:
        rows = slice(start, start + rank)
        products.append(experts.B[:, rows] @ experts.A[rows])
        start += rank
    return products


def expected(experts: Any, hidden: Tensor, weights: Tensor | None, result: Tensor) -> Tensor:
    tokens, rows = hidden.reshape(-1, D_IN), []
    for t, x in enumerate(tokens):
        y = result.reshape(-1, D_OUT)[t]
        for e, product in enumerate(blocks(experts)):
            routed = e < len(experts.ranks)
            weight = weights[t, e] if routed and weights is not None else 1.0
            y = y + weight * experts.scaling[e] * (product @ x)
        rows.append(y)
    return torch.stack(rows).reshape(result.shape)


def inputs(experts: Any, lead: tuple[int, ...] = (2, 3)) -> tuple[Tensor, Tensor | None, Tensor]:
    tokens, count = math.prod(lead), len(experts.ranks)
    hidden = torch.randn(*lead, D_IN, dtype=torch.float64)
    weights = torch.rand(tokens, count, dtype=torch.float64) if count else None
    if weights is not None:
        weights[0] = 0.0  # a token that no expert takes
    return hidden, weights, torch.randn(*lead, D_OUT, dtype=torch.float64)


@every_bank
@pytest.mark.parametrize("scaling", ["equal", "different"])
def test_the_output_is_the_sum_over_experts(bank, scaling):
    count = len(bank["ranks"]) + len(bank["shared_ranks"])
    experts = build(bank, (1.5,) * count if scaling == "equal" else None).double()
    hidden, weights, result = inputs(experts)
    torch.testing.assert_close(
        experts(hidden, weights, result.clone()), expected(experts, hidden, weights, result)
    )


@every_bank
@pytest.mark.parametrize("lead", [(), (1,), (4,), (2, 1, 3), (0,), (2, 0)], ids=str)
def test_any_leading_shape(bank, lead):
    experts = build(bank).double()
    hidden, weights, result = torch.randn(*lead, D_IN).double(), None, torch.randn(*lead, D_OUT)
    if bank["ranks"]:
        weights = torch.rand(math.prod(lead), len(bank["ranks"]))
    output = experts(hidden, weights, result.double())
    assert output.shape == (*lead, D_OUT)
    if 0 not in lead:
        reference = expected(experts, hidden, weights, result.double())
        torch.testing.assert_close(output, reference, rtol=1e-6, atol=1e-6)


@every_bank
def test_every_expert_gets_the_gradient_of_the_sum(bank):
    experts = build(bank).double()
    hidden, weights, result = inputs(experts)
    leaves = [hidden, experts.A, experts.B] + ([] if weights is None else [weights])
    for leaf in leaves:
        leaf.requires_grad_()
    upstream = torch.randn_like(result)
    direct = torch.autograd.grad(experts(hidden, weights, result), leaves, upstream)
    written = torch.autograd.grad(expected(experts, hidden, weights, result), leaves, upstream)
    for ours, reference in zip(direct, written, strict=True):
        torch.testing.assert_close(ours, reference)


@every_bank
@pytest.mark.parametrize("init", [True, "gaussian"])
def test_at_initialisation_the_base_output_is_unchanged_to_the_bit(bank, init):
    experts = build(bank)
    experts.reset_parameters(init, base)
    hidden, weights, result = (None if t is None else t.float() for t in inputs(experts))
    assert torch.equal(experts(hidden, weights, result.clone()), result)
    assert (experts.A.abs().sum(1) > 0).all()


def test_false_gives_an_adapter_that_does_something():
    experts = build(BANKS[0])
    hidden, weights, result = (t.float() for t in inputs(experts))
    assert not torch.allclose(experts(hidden, weights, result.clone()), result)


def test_each_expert_is_initialised_as_a_matrix_of_its_own():
    torch.manual_seed(0)
    experts = LoraExperts(SiteSpec(400, 8, (16,) * 8, (), (1.0,) * 8))
    experts.reset_parameters(True, base)
    bound = 1 / math.sqrt(400)  # kaiming with a = sqrt(5): of d_in, not of the stacked rank
    for block in experts.A.detach().split(16):
        assert block.abs().max() <= bound
        assert block.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03)
    experts = LoraExperts(SiteSpec(400, 8, (4, 64), (16,), (1.0,) * 3))
    experts.reset_parameters("gaussian", base)
    for block in experts.A.detach().split((4, 64, 16)):
        assert block.std().item() == pytest.approx(1 / len(block), rel=0.05)


def test_init_std():
    torch.manual_seed(0)
    experts = LoraExperts(SiteSpec(400, 8, (16,) * 4, (), (1.0,) * 4), init_std=0.02)
    experts.reset_parameters(True, base)
    assert experts.A.std().item() == pytest.approx(0.02, rel=0.03)
    assert not experts.B.any()
    with pytest.raises(ValueError, match="expert option init_std=0 must be above 0"):
        LoraExperts(SiteSpec(4, 4, (1,), (), (1.0,)), init_std=0)


@every_bank
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_delta_weight_is_what_the_layer_adds_with_those_weights(bank, dtype):
    experts = build(bank).to(dtype)
    held = torch.rand(len(bank["ranks"]), dtype=dtype) if bank["ranks"] else None
    delta = experts.delta_weight(held)
    assert delta.shape == (D_OUT, D_IN) and delta.dtype == dtype
    reference = torch.zeros(D_OUT, D_IN, dtype=torch.float64)
    for e, product in enumerate(blocks(experts.double())):
        weight = held[e].item() if held is not None and e < len(held) else 1.0
        reference += weight * experts.scaling[e] * product
    tolerance = 1e-6 if dtype == torch.float32 else 1e-13
    torch.testing.assert_close(delta.double(), reference, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("bank", [bank for bank in BANKS if bank["ranks"]], ids=str)
def test_outputs_are_the_routed_experts_one_by_one(bank):
    experts = build(bank).double()
    tokens = torch.randn(3, D_IN, dtype=torch.float64)
    singles = experts.outputs(tokens)
    assert singles.shape == (3, len(bank["ranks"]), D_OUT)
    for e in range(len(bank["ranks"])):
        reference = experts.scaling[e] * tokens @ blocks(experts)[e].mT
        torch.testing.assert_close(singles[:, e], reference)


def test_outputs_in_bf16_of_experts_of_unlike_scaling():
    bank = {"ranks": (1, 3), "shared_ranks": ()}
    experts, tokens = build(bank), torch.randn(3, D_IN)
    expected = experts.outputs(tokens)
    actual = experts.bfloat16().outputs(tokens.bfloat16())
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual.float(), expected, atol=0.05, rtol=0.05)


def test_dropout_drops_input_features_in_training_only():
    experts = LoraExperts(SiteSpec(1000, 1, (1,), (), (1.0,), dropout=0.25))
    with torch.no_grad():
        experts.A.fill_(1.0)
        experts.B.fill_(1.0)
    hidden, weights, result = torch.ones(1, 1000), torch.ones(1, 1), torch.zeros(1, 1)
    assert experts.eval()(hidden, weights, result.clone()).item() == 1000.0
    torch.manual_seed(0)
    kept = experts.train()(hidden, weights, result.clone()).item() * 0.75
    # 1000 draws: a standard error of 14
    assert kept != 1000 and abs(kept - 750) < 60


@pytest.mark.parametrize("bank", [BANKS[1], BANKS[3]], ids=str)
def test_experts_used_under_inference_mode_can_be_trained_afterwards(bank):
    experts = build(bank)
    hidden, weights, result = (t.float() for t in inputs(experts))
    with torch.inference_mode():
        experts(hidden, weights, result.clone())
    experts(hidden, weights, result).sum().backward()
    assert experts.A.grad.any() and experts.B.grad.any()


def test_a_bank_moves_between_dtypes():
    experts = build(BANKS[1])
    hidden, weights, result = inputs(experts)
    single = experts(hidden.float(), weights.float(), result.float())
    double = experts.double()(hidden, weights, result.clone())
    torch.testing.assert_close(single.double(), double, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(double, expected(experts, hidden, weights, result))


def test_it_is_the_one_called_lora():
    assert EXPERTS.get("lora") is LoraExperts
