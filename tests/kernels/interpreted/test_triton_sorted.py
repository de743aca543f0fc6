"""Tokens sorted by expert on the Triton kernels: values and gradients as the dense form's."""

import pytest
import torch

from molora_kernels import routed_lora, triton_sorted

TOLERANCE = {
    torch.float64: 1e-14,
    torch.float32: 1e-6,
    torch.float16: 1e-3,
    torch.bfloat16: 1e-2,
}


@pytest.fixture(autouse=True)
def poisoned_memory():
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def operands(ranks, K, dtype, T=150, d_in=40, d_out=24):
    torch.manual_seed(0)
    E, R = len(ranks), sum(ranks)
    score = torch.rand(T, E)
    score[:, 0] -= 2  # an expert without tokens
    gate = torch.zeros(T, E).scatter(1, score.topk(K, 1).indices, torch.rand(T, K) + 0.1)
    gate[5] = 0  # a token without experts
    tensors = {
        "x": torch.randn(T, d_in),
        "A": torch.randn(R, d_in) / d_in**0.5,
        "B": torch.randn(d_out, R),
        "gate": gate,
        "out": torch.randn(T, d_out),
    }
    return {n: t.to(dtype).requires_grad_() for n, t in tensors.items()}


def run(tensors, ranks, K, dispatch, backend, scale=0.7):
    y = routed_lora(
        **tensors, scale=scale, ranks=ranks, active=K, dispatch=dispatch, backend=backend
    )
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    return y, *torch.autograd.grad(y, list(tensors.values()), dy)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("ranks, K", [([4] * 5, 1), ([3, 20, 7, 1], 2)])
def test_values_and_gradients(dtype, ranks, K):
    tensors = operands(ranks, K, dtype)
    doubles = {n: t.detach().double().requires_grad_() for n, t in tensors.items()}
    scale = torch.linspace(0.5, 2, sum(ranks)) if K == 2 else 0.7
    got = run(tensors, ranks, K, "grouped", "triton", scale)
    true = run(doubles, ranks, K, "dense", "torch", scale)
    for a, b in zip(got, true, strict=True):
        assert a.dtype == dtype
        assert (a.double() - b).norm() / b.norm() <= TOLERANCE[dtype]


def test_it_is_what_runs(monkeypatch):
    calls = []
    forward = triton_sorted.forward
    monkeypatch.setattr(triton_sorted, "forward", lambda *a: calls.append(1) or forward(*a))
    tensors = operands([4] * 5, 1, torch.float32, T=9)
    run(tensors, [4] * 5, 1, "grouped", "triton")
    assert calls == [1]


@pytest.mark.parametrize("T", [0, 1])
def test_few_tokens(T):
    tensors = operands([4] * 5, 1, torch.float64, T=6)
    tensors = {
        n: (t[:T] if t.shape[0] == 6 else t).detach().requires_grad_() for n, t in tensors.items()
    }
    got = run(tensors, [4] * 5, 1, "grouped", "triton")
    for a, b in zip(got, run(tensors, [4] * 5, 1, "dense", "torch"), strict=True):
        torch.testing.assert_close(a, b)


def test_without_gradients_out_is_overwritten():
    tensors = {n: t.detach() for n, t in operands([4] * 5, 2, torch.float64).items()}
    out = tensors.pop("out")
    expected = routed_lora(**tensors, out=out.clone(), active=2, backend="torch")
    with torch.no_grad():
        y = routed_lora(**tensors, out=out, active=2, dispatch="grouped", backend="triton")
    assert y is out
    torch.testing.assert_close(y, expected)


def test_compiled_graph_equals_eager():
    tensors = operands([4] * 5, 2, torch.float32, T=20)

    def function(tensors):
        return routed_lora(**tensors, active=2, dispatch="grouped", backend="triton") * 2

    got = torch.compile(function, fullgraph=True, backend="aot_eager")(tensors)
    expected = function(tensors)
    leaves = list(tensors.values())
    assert torch.equal(got, expected)
    for a, b in zip(
        torch.autograd.grad(got.sum(), leaves),
        torch.autograd.grad(expected.sum(), leaves),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_layouts_that_do_not_fit_are_named():
    x, A, B, gate = torch.ones(2, 3), torch.ones(5, 3), torch.ones(3, 5), torch.ones(2, 2)
    with pytest.raises(ValueError, match="needs always_on=0"):
        routed_lora(x, A, B, gate, always_on=1, active=1, dispatch="grouped", backend="triton")
