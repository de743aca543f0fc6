"""The custom op: PyTorch's own checks of its registration, and whole compiled graphs."""

import pytest
import torch
from torch.library import opcheck

from molora_kernels import compiled, routed_lora
from molora_kernels.layout import resolve_layout
from molora_kernels.plan import make_plan

CASES = {
    "gate": {"gate": True},
    "always_on": {"gate": True, "always_on": 2},
    "no_gate": {"gate": False},
    "scales": {"gate": True, "scales": True},
    "grouped": {"gate": True, "active": 2, "dispatch": "grouped"},
    "no_out": {"gate": True, "out": False},
}


def operands(gate=True, always_on=0, scales=False, out=True, dtype=torch.float32, **options):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(dtype).requires_grad_()

    columns = 12 + always_on
    tensors = {
        "x": draw(2, 5, 8),
        "A": draw(columns, 8),
        "B": draw(6, columns),
        "gate": draw(2, 5, 4) if gate else None,
        "scale": torch.linspace(0.5, 2, columns) if scales else 0.5,
        "out": draw(2, 5, 6) if out else None,
    }
    return tensors, {"always_on": always_on, **options}


@pytest.mark.parametrize("name", CASES)
def test_opcheck(name):
    tensors, options = operands(**CASES[name])
    x, A, B, gate, scale, out = tensors.values()
    layout = resolve_layout(A, B, gate, None, options["always_on"], None)
    dispatch = options.get("dispatch", "auto")
    plan = make_plan(x, A, B, layout, options.get("active"), "ieee", dispatch, "torch", True)
    either = (1.0, scale) if isinstance(scale, torch.Tensor) else (scale, None)
    arguments = (x, A, B, gate, *either, out, *compiled._flat(plan))
    results = opcheck(compiled.routed_lora_op, arguments)
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("autocast", [False, True])
def test_compiled_graph_equals_eager(name, autocast):
    tensors, options = operands(**CASES[name])

    def function(tensors):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            return routed_lora(**tensors, **options) * 2

    torch._dynamo.reset()
    leaves = [t for t in tensors.values() if isinstance(t, torch.Tensor) and t.requires_grad]
    expected = function(tensors)
    expected_grads = torch.autograd.grad(expected.sum(), leaves)
    got = torch.compile(function, fullgraph=True, backend="aot_eager")(tensors)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    for a, b in zip(torch.autograd.grad(got.sum(), leaves), expected_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


# torch's inductor imports a module of torch.jit that warns about itself
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.slow
def test_inductor():
    tensors, options = operands()
    torch._dynamo.reset()
    got = torch.compile(lambda t: routed_lora(**t, **options) * 2, fullgraph=True)(tensors)
    torch.testing.assert_close(got, routed_lora(**tensors, **options) * 2)


def test_frozen_factors_ask_for_fewer_gradients():
    tensors, options = operands()
    for name in ("A", "B", "gate"):
        tensors[name] = tensors[name].detach()
    torch._dynamo.reset()
    compiled_function = torch.compile(
        lambda t: routed_lora(**t, **options), fullgraph=True, backend="aot_eager"
    )
    leaves = [tensors["x"], tensors["out"]]
    got = torch.autograd.grad(compiled_function(tensors).sum(), leaves)
    expected = torch.autograd.grad(routed_lora(**tensors, **options).sum(), leaves)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)
