"""Every kernel in Triton's interpreter against fp64, on NaN-filled memory, in both grid orders."""

import pytest
import torch
import triton.runtime.interpreter as interpreter

from molora_kernels import dense, triton_launch
from molora_kernels.layout import RankLayout

LAYOUTS = {
    "equal": RankLayout((8, 8, 8, 8)),
    "unequal_always_on": RankLayout((3, 9, 1), 2),
    "experts_across_tiles": RankLayout((40, 50), 6),
    "rank_one": RankLayout((1,) * 5),
    "plain": RankLayout((), 10),
    "tied_A": RankLayout((4, 4, 4), 2, "A"),
    "tied_B": RankLayout((4, 4, 4), 2, "B"),
}
# relative Frobenius error; the interpreter truncates fp32 to bf16 where a GPU rounds
TOLERANCE = {
    torch.float64: 1e-14,
    torch.float32: 1e-6,
    torch.float16: 1e-3,
    torch.bfloat16: 1e-2,
}
SHAPES = {"tails": (100, 72, 80), "one_token": (1, 16, 48), "odd": (65, 33, 7)}


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Whatever torch.empty returns is full of NaN: an element that no kernel writes shows."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(1).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def operands(layout, shape, dtype):
    torch.manual_seed(0)
    T, d_in, d_out = shape
    tensors = {
        "dy": torch.randn(T, d_out),
        "x": torch.randn(T, d_in),
        "A": torch.randn(layout.rows_of("A"), d_in) / d_in**0.5,
        "B": torch.randn(d_out, layout.rows_of("B")),
        "gate": torch.rand(T, layout.experts).bernoulli() * torch.rand(T, layout.experts),
        "out": torch.randn(T, d_out),
    }
    tensors = {name: t.to(dtype) for name, t in tensors.items()}
    if not layout.experts:
        tensors["gate"] = None
    return tensors


def run(module, layout, tensors, scale, **options):
    """(Y, dX, dA, dB, dgate)"""
    dy, x, A, B, gate, out = tensors.values()
    u = triton_launch.rank_buffer(x, A.shape[0], A.dtype)
    y = module.forward(x, A, B, gate, scale, out, layout, x.dtype, False, u, **options)
    needs = dense.Needs(True, True, True, gate is not None)
    grads = module.backward(dy, x, A, B, gate, u, scale, layout, needs, x.dtype, **options)
    return [t for t in (y, *grads) if t is not None]


def assert_near_fp64(layout, shape, dtype, scale, precision="ieee"):
    tensors = operands(layout, shape, dtype)
    doubles = {n: None if t is None else t.double() for n, t in tensors.items()}
    got = run(triton_launch, layout, tensors, scale, precision=precision)
    true = run(dense, layout, doubles, scale)
    for a, b in zip(got, true, strict=True):
        assert a.dtype == dtype
        error = (a.double() - b).norm() / b.norm()
        assert error <= TOLERANCE[dtype], f"{error:.1e}"


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_every_kernel(dtype):
    assert_near_fp64(LAYOUTS["equal"], (100, 72, 80), dtype, 0.7)


@pytest.mark.kernels
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("per_column", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", LAYOUTS)
def test_values_and_gradients(name, dtype, per_column, shape):
    layout = LAYOUTS[name]
    scale = torch.linspace(0.5, 2, layout.columns) if per_column else 0.7
    assert_near_fp64(layout, SHAPES[shape], dtype, scale)


@pytest.mark.kernels
@pytest.mark.parametrize("precision", ["tf32", "tf32x3"])
def test_precision_options_run(precision):
    assert_near_fp64(LAYOUTS["equal"], (65, 33, 48), torch.float32, 0.7, precision)


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_model_size_of_576(dtype):
    assert_near_fp64(RankLayout((8,) * 8), (257, 576, 576), dtype, 2.0)


def test_bf16_rows_with_fp32_factors():
    layout = LAYOUTS["equal"]
    tensors = operands(layout, (70, 48, 32), torch.float32)
    doubles = {n: t.double() for n, t in tensors.items()}
    for name in ("dy", "x", "out"):
        tensors[name] = tensors[name].bfloat16()
        doubles[name] = tensors[name].double()
    for a, b in zip(
        run(triton_launch, layout, tensors, 1.0), run(dense, layout, doubles, 1.0), strict=True
    ):
        tolerance = 1e-2 if a.dtype == torch.bfloat16 else 1e-5
        assert (a.double() - b).norm() / b.norm() < tolerance


@pytest.mark.parametrize("name", ["equal", "experts_across_tiles"])
def test_the_order_of_programs_changes_no_bit(name, monkeypatch):
    layout = LAYOUTS[name]
    tensors = operands(layout, (300, 40, 48), torch.float32)
    forwards = run(triton_launch, layout, tensors, 0.7)
    builder = interpreter.interpreter_builder
    seen = []

    def backwards(x, y, z):
        last = builder.grid_dim
        seen.append((x, y, z))
        builder.grid_idx = (last[0] - 1 - x, last[1] - 1 - y, last[2] - 1 - z)

    monkeypatch.setattr(builder, "set_grid_idx", backwards)
    reverse = run(triton_launch, layout, tensors, 0.7)
    assert max(seen) > (0, 0, 0)
    assert all(torch.equal(a, b) for a, b in zip(forwards, reverse, strict=True))


def test_weight_gradients_in_planes_and_in_one_piece_agree(monkeypatch):
    layout = LAYOUTS["equal"]
    tensors = operands(layout, (600, 40, 48), torch.float32)
    counts = []
    kernel = triton_launch.kernels.add_planes

    class Counting:
        def __getitem__(self, grid):
            return lambda *a, **k: counts.append(a[2]) or kernel[grid](*a, **k)

    monkeypatch.setattr(triton_launch.kernels, "add_planes", Counting())
    planes = run(triton_launch, layout, tensors, 0.7)
    assert counts
    assert min(counts) > 1
    monkeypatch.setattr(triton_launch, "ENOUGH_PROGRAMS", 1)
    counts.clear()
    whole = run(triton_launch, layout, tensors, 0.7)
    assert not counts
    for a, b in zip(planes, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


def test_no_tokens():
    layout = LAYOUTS["equal"]
    y, dx, dA, dB, dgate = run(
        triton_launch, layout, operands(layout, (0, 16, 16), torch.float32), 1.0
    )
    assert y.shape == dx.shape == (0, 16)
    assert not dA.any()
    assert not dB.any()
    assert dgate.shape == (0, 4)


def test_rows_of_a_wider_tensor_and_an_expanded_gradient():
    layout = LAYOUTS["equal"]
    tensors = operands(layout, (40, 32, 16), torch.float64)
    tensors["x"] = torch.randn(40, 100, dtype=torch.float64)[:, 3:35]
    tensors["dy"] = torch.ones(1, 1, dtype=torch.float64).expand(40, 16)
    tensors["gate"] = torch.rand(1, 4, dtype=torch.float64).expand(40, 4)
    for a, b in zip(
        run(triton_launch, layout, tensors, 1.0), run(dense, layout, tensors, 1.0), strict=True
    ):
        torch.testing.assert_close(a, b)
