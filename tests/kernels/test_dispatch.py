"""Grouping tokens by expert is another way to the same numbers, and the rule says when."""

import pytest
import torch

from molora_kernels import grouped, routed_lora, rule
from molora_kernels.layout import RankLayout
from molora_kernels.reference import routed_lora_reference

D_IN, D_OUT = 12, 10
RANKS = [3, 1, 4, 2]


def operands(active, tokens=40, always_on=2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    columns = sum(RANKS) + always_on

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    gate = torch.rand(tokens, len(RANKS), generator=generator, dtype=torch.float64)
    chosen = gate.topk(active, -1).indices
    gate = torch.zeros_like(gate).scatter(-1, chosen, gate.gather(-1, chosen))
    gate[:, 2] = 0  # an expert without tokens
    gate[3] = 0  # a token without experts
    return [
        draw(tokens, D_IN),
        draw(columns, D_IN),
        draw(D_OUT, columns),
        gate.to(dtype),
        draw(tokens, D_OUT),
    ]


def run(function, tensors, scale, **options):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    y = function(*leaves[:4], scale, leaves[4], ranks=RANKS, always_on=2, **options)
    return y, torch.autograd.grad(y.double().pow(2).sum(), leaves)


@pytest.mark.parametrize("dispatch", ["dense", "grouped"])
@pytest.mark.parametrize("active", [1, 2, 4])
@pytest.mark.parametrize("per_column", [False, True])
def test_every_dispatch_computes_the_same(dispatch, active, per_column):
    scale = torch.linspace(0.5, 2, 12, dtype=torch.float64) if per_column else 0.5
    tensors = operands(active)
    y, grads = run(routed_lora, tensors, scale, active=active, dispatch=dispatch)
    y_true, grads_true = run(routed_lora_reference, tensors, scale)
    chosen = tensors[3] != 0
    torch.testing.assert_close(y, y_true)
    for i, (got, true) in enumerate(zip(grads, grads_true, strict=True)):
        torch.testing.assert_close(got, true * chosen if i == 3 else true)
    assert grads_true[3][~chosen].any(), "the case can't tell apart whether zero entries are masked"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_in_low_precision_rounds_once(dtype):
    tensors = operands(2, dtype=dtype)
    y, grads = run(routed_lora, tensors, 1.0, active=2, dispatch="grouped")
    y_true, grads_true = run(routed_lora_reference, [t.double() for t in tensors], 1.0)
    grads_true = list(grads_true)
    grads_true[3] = grads_true[3] * (tensors[3] != 0)
    limit = 1e-5 if dtype == torch.float32 else 1e-2
    for got, true in zip([y, *grads], [y_true, *grads_true], strict=True):
        assert got.dtype == dtype
        assert (got.double() - true).norm() < limit * true.norm()


@pytest.mark.parametrize("wanted", range(5))
def test_a_single_gradient_of_the_grouped_form(wanted):
    tensors = operands(2)
    _, grads_true = run(routed_lora_reference, tensors, 1.0)
    leaves = [t.clone().requires_grad_(i == wanted) for i, t in enumerate(tensors)]
    y = routed_lora(
        *leaves[:4], 1.0, leaves[4], ranks=RANKS, always_on=2, active=2, dispatch="grouped"
    )
    (got,) = torch.autograd.grad(y.pow(2).sum(), [leaves[wanted]])
    true = grads_true[wanted] * (tensors[3] != 0) if wanted == 3 else grads_true[wanted]
    torch.testing.assert_close(got, true)


@pytest.mark.parametrize("out_dtype", [torch.float64, torch.float32])
def test_grouped_overwrites_out_without_gradients(out_dtype):
    x, A, B, gate, out = operands(2)
    expected = routed_lora_reference(x, A, B, gate, 1.0, out, ranks=RANKS, always_on=2)
    base = out.to(out_dtype, copy=True)
    options = {"ranks": RANKS, "always_on": 2, "active": 2, "dispatch": "grouped"}
    with torch.no_grad():
        y = routed_lora(x, A, B, gate, 1.0, base, **options)
    assert y is base
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)


def test_no_tokens():
    tensors = [t[:0] if t.shape[0] == 40 else t for t in operands(1)]
    y, grads = run(routed_lora, tensors, 1.0, active=1, dispatch="grouped")
    assert y.shape == (0, D_OUT)
    assert not grads[1].any()
    assert not grads[2].any()


def test_rule():
    cpu, many = torch.device("cpu"), RankLayout((8,) * 64)
    assert rule.pays(many, 1, cpu, torch.float32)
    assert rule.pays(many, 4, cpu, torch.float32)
    assert not rule.pays(many, 8, cpu, torch.float32)
    assert not rule.pays(many, 1, cpu, torch.bfloat16)
    assert not rule.pays(RankLayout((8,) * 8), 1, cpu, torch.float32)


@pytest.mark.parametrize("active, calls", [(1, 1), (None, 0)])
def test_auto_follows_the_rule(monkeypatch, active, calls):
    seen = []
    forward = grouped.forward
    monkeypatch.setattr(grouped, "forward", lambda *a: seen.append(1) or forward(*a))
    x, A, B = torch.randn(5, 8), torch.randn(128, 8), torch.randn(8, 128)
    gate = torch.zeros(5, 16)
    gate[:, 0] = 1
    routed_lora(x, A, B, gate, active=active)
    assert len(seen) == calls


@pytest.mark.parametrize(
    "options, message",
    [
        ({"ranks": RANKS, "always_on": 2}, "pass active=K"),
        ({"gate": None, "active": 1}, "no routed expert"),
        ({"tied": "B", "active": 1}, "share a factor"),
    ],
)
def test_grouping_that_is_impossible_says_why(options, message):
    x, A, B, gate, _ = operands(1)
    call = {"gate": gate} | options
    if "tied" in options:
        B = B[:, :3]
    with pytest.raises(ValueError, match=message):
        routed_lora(x, A, B, dispatch="grouped", **call)
