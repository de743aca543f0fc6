"""Logits and rank columns from one pass over x, against the two operators one after the other."""

import pytest
import torch

from molora_kernels import routed_lora_with_router, triton_launch

TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 2e-2}


def operands(dtype, ranks=(4, 3, 5), always_on=2):
    torch.manual_seed(0)
    columns, E = sum(ranks) + always_on, len(ranks)
    adapter = torch.float64 if dtype == torch.float64 else torch.float32
    shapes = {"x": (2, 35, 40), "A": (columns, 40), "B": (24, columns)}
    tensors = {n: torch.randn(s).to(dtype) for n, s in shapes.items()}
    tensors["A"] = tensors["A"] / 6
    tensors["router_weight"] = torch.randn(E, 40, dtype=adapter) / 6
    tensors["router_bias"] = torch.randn(E, dtype=adapter)
    tensors["out"] = torch.randn(2, 35, 24).to(dtype)
    return {n: t.requires_grad_() for n, t in tensors.items()}


def gate(logits):
    weights, chosen = logits.softmax(-1).topk(2)
    return torch.zeros_like(logits).scatter(-1, chosen, weights)


def run(tensors, backend, **options):
    y, logits = routed_lora_with_router(
        **tensors, make_gate=gate, ranks=[4, 3, 5], always_on=2, backend=backend, **options
    )
    loss = y.double().pow(2).mean() + logits.double().pow(2).sum()
    return y, logits, *torch.autograd.grad(loss, list(tensors.values()))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("per_column", [False, True])
def test_equals_the_separate_operators(dtype, per_column):
    tensors = operands(dtype)
    options = {"scale": torch.linspace(0.5, 2, 14) if per_column else 0.7, "active": 2}
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    try:
        got = run(tensors, "triton", **options)
    finally:
        torch.use_deterministic_algorithms(False)
    expected = run(tensors, "torch", **options)
    assert got[1].dtype == expected[1].dtype
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype
        assert (a.double() - b.double()).norm() / b.double().norm() < TOLERANCE[dtype]


def test_the_pass_is_shared(monkeypatch):
    calls = []
    fused = triton_launch.shrink_route
    monkeypatch.setattr(triton_launch, "shrink_route", lambda *a: calls.append(1) or fused(*a))
    run(operands(torch.float32), "triton")
    assert calls == [1]


def test_no_tokens():
    tensors = operands(torch.float32)
    for name in ("x", "out"):
        tensors[name] = tensors[name].detach()[:, :0].requires_grad_()
    y, logits, *grads = run(tensors, "triton")
    assert y.shape == (2, 0, 24)
    assert logits.shape == (2, 0, 3)
    assert all(not grad.isnan().any() for grad in grads[1:])
