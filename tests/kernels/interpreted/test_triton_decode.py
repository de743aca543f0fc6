"""Generation on the Triton kernels: chosen experts only, values as the dense form's."""

import pytest
import torch

from molora_kernels import routed_lora, triton_decode
from molora_kernels.reference import routed_lora_reference

TOLERANCE = {
    torch.float64: 1e-14,
    torch.float32: 1e-6,
    torch.float16: 1e-3,
    torch.bfloat16: 1e-2,
}


@pytest.fixture
def launched(monkeypatch):
    """The tokens of each call of the decode path."""
    calls = []
    forward = triton_decode.forward
    monkeypatch.setattr(
        triton_decode, "forward", lambda x, *rest: calls.append(len(x)) or forward(x, *rest)
    )
    return calls


def operands(T, d_in, d_out, E, r, K, dtype):
    torch.manual_seed(0)
    gate = torch.zeros(T, E).scatter(1, torch.rand(T, E).topk(K, 1).indices, torch.rand(T, K))
    if T > 1:
        gate[0] = 0  # a token without experts
    tensors = {
        "x": torch.randn(T, d_in),
        "A": torch.randn(E * r, d_in) / d_in**0.5,
        "B": torch.randn(d_out, E * r),
        "gate": gate,
        "out": torch.randn(T, d_out),
    }
    return {name: t.to(dtype) for name, t in tensors.items()}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    "T, d_in, d_out, E, r, K", [(3, 300, 70, 16, 3, 2), (1, 2100, 16, 4, 8, 1)]
)
def test_values(launched, dtype, T, d_in, d_out, E, r, K):
    tensors = operands(T, d_in, d_out, E, r, K, dtype)
    doubles = {name: t.double() for name, t in tensors.items()}
    expected = routed_lora_reference(**doubles, scale=0.7)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    try:
        y = routed_lora(**tensors, scale=0.7, active=K, backend="triton")
        out = tensors.pop("out")
        delta = routed_lora(**tensors, scale=0.7, active=K, backend="triton")
    finally:
        torch.use_deterministic_algorithms(False)
    assert launched == [T, T]
    for got, true in ((y, expected), (delta, expected - doubles["out"])):
        assert got.dtype == dtype
        assert (got.double() - true).norm() / true.norm() < TOLERANCE[dtype]
    assert torch.equal(y[0], out[0]) or T == 1


def test_only_few_tokens_without_gradients_decode(launched):
    tensors = operands(4, 32, 16, 16, 4, 2, torch.float32)
    routed_lora(**tensors, active=2, backend="triton")
    assert launched == [4]
    routed_lora(**tensors, active=4, backend="triton")  # 4 tokens of 4 experts: half of 16 is less
    routed_lora(**tensors, active=2, backend="triton", dispatch="dense")
    routed_lora(**tensors, backend="triton")
    tensors["A"].requires_grad_()
    routed_lora(**tensors, active=2, backend="triton")
    assert launched == [4]


def test_traffic_is_that_of_the_chosen_experts():
    """Factors of experts that no token chose hold NaN, which would show."""
    tensors = operands(2, 64, 32, 16, 4, 2, torch.float32)
    expected = routed_lora(**tensors, active=2, backend="triton")
    unchosen = ~tensors["gate"].bool().any(0).repeat_interleave(4)
    tensors["A"][unchosen] = float("nan")
    tensors["B"][:, unchosen] = float("nan")
    assert unchosen.any()
    got = routed_lora(**tensors, active=2, backend="triton")
    assert torch.equal(got[1], expected[1])
