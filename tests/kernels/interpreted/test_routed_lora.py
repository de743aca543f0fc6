"""The public operator on the Triton kernels: autograd, the custom op, compiled graphs."""

import pytest
import torch
from torch.library import opcheck

from molora_kernels import compiled, plan, routed_lora
from molora_kernels.layout import resolve_layout


def operands(dtype=torch.float64):
    torch.manual_seed(0)
    shapes = {"x": (2, 3, 8), "A": (7, 8), "B": (6, 7), "gate": (2, 3, 2), "out": (2, 3, 6)}
    return {n: torch.randn(s, dtype=dtype, requires_grad=True) for n, s in shapes.items()}


OPTIONS = {"ranks": [2, 4], "always_on": 1, "backend": "triton"}


def test_gradcheck():
    tensors = operands()

    def function(x, A, B, gate, out):
        return routed_lora(x, A, B, gate, 0.5, out, **OPTIONS)

    assert torch.autograd.gradcheck(function, tuple(tensors.values()), fast_mode=True)


@pytest.mark.kernels
def test_gradcheck_of_every_element():
    tensors = operands()

    def function(x, A, B, gate, out):
        return routed_lora(x, A, B, gate, 0.5, out, **OPTIONS)

    assert torch.autograd.gradcheck(function, tuple(tensors.values()))


@pytest.mark.parametrize("wanted", range(5))
def test_a_single_gradient(wanted):
    leaves = [t.detach().requires_grad_(i == wanted) for i, t in enumerate(operands().values())]
    got, true = (
        torch.autograd.grad(
            routed_lora(*leaves[:4], 0.5, leaves[4], **OPTIONS | {"backend": backend}).pow(2).sum(),
            leaves[wanted],
        )[0]
        for backend in ("triton", "torch")
    )
    torch.testing.assert_close(got, true)


def test_out_is_overwritten_without_gradients():
    tensors = {n: t.detach() for n, t in operands().items()}
    out = tensors.pop("out")
    expected = routed_lora(**tensors, out=out.clone(), **OPTIONS | {"backend": "torch"})
    with torch.no_grad():
        assert routed_lora(**tensors, out=out, **OPTIONS) is out
    torch.testing.assert_close(out, expected)


def test_unchosen_experts_get_no_gradient():
    tensors = operands()
    with torch.no_grad():
        tensors["gate"][..., 0] = 0
    y = routed_lora(**tensors, active=1, **OPTIONS)
    (dgate,) = torch.autograd.grad(y.pow(2).sum(), [tensors["gate"]])
    assert not dgate[..., 0].any()
    assert dgate[..., 1].all()


def test_opcheck():
    x, A, B, gate, out = operands(torch.float32).values()
    layout = resolve_layout(A, B, gate, [2, 4], 1, None)
    chosen = plan.make_plan(x, A, B, layout, None, "ieee", "auto", "triton", True)
    arguments = (x, A, B, gate, 0.5, None, out, *compiled._flat(chosen))
    assert set(opcheck(compiled.routed_lora_op, arguments).values()) == {"SUCCESS"}


def test_compiled_graph_equals_eager():
    tensors = operands(torch.float32)
    leaves = list(tensors.values())

    def function(tensors):
        return routed_lora(**tensors, **OPTIONS) * 2

    got = torch.compile(function, fullgraph=True, backend="aot_eager")(tensors)
    expected = function(tensors)
    assert torch.equal(got, expected)
    grads, expected_grads = (torch.autograd.grad(y.sum(), leaves) for y in (got, expected))
    assert all(torch.equal(a, b) for a, b in zip(grads, expected_grads, strict=True))
