"""The operator against fp64 and against its own autograd twin, over layouts, dtypes and shapes."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from molora_kernels import dense, plan, rankspace, routed_lora
from molora_kernels.reference import routed_lora_reference

D_IN, D_OUT = 12, 10
LAYOUTS = {
    "equal": {"ranks": [3, 3, 3]},
    "unequal": {"ranks": [1, 4, 2]},
    "always_on": {"ranks": [2, 2], "always_on": 3},
    "unequal_always_on": {"ranks": [2, 5], "always_on": 1},
    "tied_A": {"ranks": [4, 4, 4], "tied": "A"},
    "tied_B": {"ranks": [4, 4, 4], "tied": "B"},
    "tied_A_always_on": {"ranks": [2, 2], "tied": "A", "always_on": 2},
    "tied_B_always_on": {"ranks": [2, 2], "tied": "B", "always_on": 2},
    "one_expert": {"ranks": [5]},
    "plain": {"ranks": None, "always_on": 6},
    "rank_one": {"ranks": [1] * 7},
}


def operands(layout, lead=(6,), dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ranks, always_on, tied = (
        layout.get("ranks") or [],
        layout.get("always_on", 0),
        layout.get("tied"),
    )
    columns = sum(ranks) + always_on
    one = (ranks[0] if ranks else 0) + always_on

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    x, out = draw(*lead, D_IN), draw(*lead, D_OUT)
    A = draw(one if tied == "A" else columns, D_IN)
    B = draw(D_OUT, one if tied == "B" else columns)
    gate = draw(*lead, len(ranks)).relu() if ranks else None
    return [x, A, B, gate, out]


def with_grad(tensors):
    return [None if t is None else t.detach().clone().requires_grad_() for t in tensors]


def run(function, tensors, scale, layout, seed=1):
    x, A, B, gate, out = leaves = with_grad(tensors)
    y = function(x, A, B, gate, scale, out, **layout)
    weight = torch.randn(
        y.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    wanted = [t for t in leaves if t is not None]
    return y, torch.autograd.grad((y.double() * weight).sum(), wanted)


def relative(got, true):
    return ((got.double() - true).norm() / true.norm().clamp_min(1e-300)).item()


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("scale", ["float", "per_column"])
def test_values_and_gradients_equal_the_reference(name, scale):
    layout = LAYOUTS[name]
    columns = sum(layout["ranks"] or []) + layout.get("always_on", 0)
    scale = 0.7 if scale == "float" else torch.linspace(0.5, 2.0, columns, dtype=torch.float64)
    tensors = operands(layout, lead=(2, 5))
    y, grads = run(routed_lora, tensors, scale, layout)
    y_true, grads_true = run(routed_lora_reference, tensors, scale, layout)
    torch.testing.assert_close(y, y_true, rtol=1e-12, atol=1e-12)
    for got, true in zip(grads, grads_true, strict=True):
        torch.testing.assert_close(got, true, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", LAYOUTS)
def test_gradcheck(name):
    layout = LAYOUTS[name]
    x, A, B, gate, out = with_grad(operands(layout, lead=(3,)))

    def f(*leaves):
        x, A, B, out = leaves[:4]
        return routed_lora(x, A, B, leaves[4] if gate is not None else None, 0.5, out, **layout)

    assert torch.autograd.gradcheck(
        f, (x, A, B, out) + (() if gate is None else (gate,)), fast_mode=True
    )


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 1e-2)]
)
@pytest.mark.parametrize("name", ["equal", "unequal", "tied_A", "tied_B_always_on", "plain"])
def test_low_precision_stays_near_fp64(dtype, tolerance, name):
    layout = LAYOUTS[name]
    tensors = operands(layout, lead=(33,), dtype=dtype)
    y, grads = run(routed_lora, tensors, 0.5, layout)
    doubles = [None if t is None else t.double() for t in tensors]
    y_true, grads_true = run(routed_lora_reference, doubles, 0.5, layout)
    assert y.dtype == dtype
    assert relative(y, y_true) < tolerance
    for got, true in zip(grads, grads_true, strict=True):
        assert got.dtype == dtype
        assert relative(got, true) < tolerance


def test_bf16_model_with_fp32_adapter():
    layout = LAYOUTS["equal"]
    x, A, B, gate, out = operands(layout, lead=(9,))
    tensors = [x.bfloat16(), A.float(), B.float(), gate.float(), out.bfloat16()]
    y, grads = run(routed_lora, tensors, 1.0, layout)
    y_true, grads_true = run(routed_lora_reference, [t.double() for t in tensors], 1.0, layout)
    assert y.dtype == torch.bfloat16
    assert relative(y, y_true) < 4e-3
    for tensor, got, true in zip(tensors, grads, grads_true, strict=True):
        assert got.dtype == tensor.dtype
        assert relative(got, true) < (4e-3 if got.dtype == torch.bfloat16 else 5e-3)


def test_autocast_sets_the_product_dtype_and_x_is_saved_as_it_came():
    layout = LAYOUTS["equal"]
    tensors = operands(layout, lead=(9,), dtype=torch.float32)
    leaves = with_grad(tensors)
    saved = []
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
    ):
        y = routed_lora(*leaves[:4], 1.0, leaves[4], **layout)
    assert y.dtype == torch.float32
    assert any(t.data_ptr() == leaves[0].data_ptr() for t in saved)
    assert all(t.shape[-1] != D_IN or t.dtype == torch.float32 for t in saved)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # a backward in autocast computes the same
        y.sum().backward()
    twin = with_grad([t.double() for t in tensors])
    y_true = routed_lora_reference(*twin[:4], 1.0, twin[4], **layout)
    y_true.sum().backward()
    assert relative(y, y_true) < 1e-2
    for leaf, true in zip(leaves, twin, strict=True):
        assert leaf.grad.dtype == torch.float32
        assert relative(leaf.grad, true.grad) < 1e-2


@pytest.mark.parametrize("block", [7, 1 << 30])
@pytest.mark.parametrize("native", [False, True])
def test_products_of_16_bit_operands_in_either_dtype_and_block_size(monkeypatch, block, native):
    """A CPU with and one without bf16 arithmetic, rows cast and gated in blocks and at once."""
    monkeypatch.setattr(dense, "CAST_BLOCK_ELEMENTS", block)
    monkeypatch.setattr(dense, "EMULATED_BLOCK_ELEMENTS", block)
    monkeypatch.setattr(rankspace, "PIECE_ELEMENTS", block)
    monkeypatch.setattr(
        plan, "product_dtype", lambda dtype, device: dtype if native else torch.float32
    )
    layout = LAYOUTS["unequal_always_on"]
    tensors = operands(layout, lead=(150,), dtype=torch.bfloat16)
    y, grads = run(routed_lora, tensors, 0.5, layout)
    y_true, grads_true = run(routed_lora_reference, [t.double() for t in tensors], 0.5, layout)
    assert relative(y, y_true) < 1e-2
    for got, true in zip(grads, grads_true, strict=True):
        assert relative(got, true) < 1e-2


def test_x_is_not_kept_for_a_frozen_A():
    layout = LAYOUTS["equal"]
    x, A, B, gate, out = operands(layout)
    x, B = x.requires_grad_(), B.requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        routed_lora(x, A, B, gate, 1.0, out, **layout).sum()
    assert x.data_ptr() not in {t.data_ptr() for t in saved}


def test_saved_for_backward_is_u_and_the_gate():
    layout = LAYOUTS["equal"]
    leaves = with_grad(operands(layout, lead=(50,)))
    known = {t.data_ptr() for t in leaves}
    extra = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: extra.append(t) or t, lambda t: t):
        routed_lora(*leaves[:4], 1.0, leaves[4], **layout)
    assert [tuple(t.shape) for t in extra if t.data_ptr() not in known] == [(50, 9)]


@pytest.mark.parametrize("wanted", range(5))
def test_a_single_gradient(wanted):
    layout = LAYOUTS["unequal_always_on"]
    tensors = operands(layout, lead=(7,))
    _, grads_true = run(routed_lora_reference, tensors, 0.5, layout)
    leaves = [t.requires_grad_(i == wanted) for i, t in enumerate(tensors)]
    y = routed_lora(*leaves[:4], 0.5, leaves[4], **layout)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (got,) = torch.autograd.grad((y * weight).sum(), [leaves[wanted]])
    torch.testing.assert_close(got, grads_true[wanted], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_changes_nothing(use_reentrant):
    layout = LAYOUTS["always_on"]
    tensors = operands(layout, lead=(2, 4))

    def checkpointed(x, A, B, gate, scale, out, **kwargs):
        def body(x, A, B, gate, out):
            return routed_lora(x, A, B, gate, scale, out * 1.0, **kwargs)

        return checkpoint(body, x, A, B, gate, out, use_reentrant=use_reentrant)

    # reentrant checkpointing works with backward() only
    def grads(function):
        leaves = with_grad(tensors)
        y = function(*leaves[:4], 1.0, leaves[4], **layout)
        y.pow(2).sum().backward()
        return y, [t.grad for t in leaves]

    y, got = grads(checkpointed)
    y_true, true = grads(routed_lora)
    assert torch.equal(y, y_true)
    assert all(torch.equal(a, b) for a, b in zip(got, true, strict=True))


@pytest.mark.parametrize("lead", [(0,), (1,), (2, 0)])
def test_few_or_no_tokens(lead):
    layout = LAYOUTS["equal"]
    y, grads = run(routed_lora, operands(layout, lead=lead), 1.0, layout)
    assert y.shape == (*lead, D_OUT)
    y_true, grads_true = run(routed_lora_reference, operands(layout, lead=lead), 1.0, layout)
    torch.testing.assert_close(y, y_true)
    for got, true in zip(grads, grads_true, strict=True):
        torch.testing.assert_close(got, true)


def test_non_contiguous_x_and_out():
    layout = LAYOUTS["equal"]
    x, A, B, gate, out = operands(layout, lead=(4, 6))
    x, gate, out = (t.transpose(0, 1) for t in (x, gate, out))
    expected = routed_lora_reference(x, A, B, gate, 1.0, out, **layout)
    torch.testing.assert_close(routed_lora(x, A, B, gate, 1.0, out, **layout), expected)


def test_gradients_lie_in_memory_like_their_parameters():
    for name in ("equal", "tied_B"):
        leaves = with_grad(operands(LAYOUTS[name]))
        routed_lora(*leaves[:4], 1.0, leaves[4], **LAYOUTS[name]).sum().backward()
        assert all(leaf.grad.stride() == leaf.stride() for leaf in leaves[:4])


def test_zero_gate_rows_leave_the_base_result():
    layout = LAYOUTS["equal"]
    x, A, B, gate, out = operands(layout)
    gate[::2] = 0
    y = routed_lora(x, A, B, gate, 1.0, out.clone(), **layout)
    assert torch.equal(y[::2], out[::2])
    assert not torch.equal(y[1::2], out[1::2])


def test_gate_broadcasts_over_tokens():
    layout = LAYOUTS["equal"]
    x, A, B, gate, out = operands(layout, lead=(2, 5))
    per_sequence = gate[:, :1].clone()
    y, grads = run(routed_lora, [x, A, B, per_sequence, out], 1.0, layout)
    y_true, grads_true = run(routed_lora_reference, [x, A, B, per_sequence, out], 1.0, layout)
    torch.testing.assert_close(y, y_true)
    assert grads[3].shape == per_sequence.shape
    torch.testing.assert_close(grads[3], grads_true[3])


@pytest.mark.parametrize("lead", [(), (2, 5), (1, 2, 3)])
def test_a_gate_may_have_a_row_for_each_token(lead):
    layout = LAYOUTS["equal"]
    x, A, B, gate, out = operands(layout, lead=lead)
    flat = gate.reshape(-1, gate.shape[-1])
    y, grads = run(routed_lora, [x, A, B, flat, out], 1.0, layout)
    y_true, grads_true = run(routed_lora_reference, [x, A, B, gate, out], 1.0, layout)
    torch.testing.assert_close(y, y_true)
    torch.testing.assert_close(grads[3].view(gate.shape), grads_true[3])


def test_gate_per_rank_column():
    x, A, B, _, out = operands(LAYOUTS["unequal"])
    gate = torch.rand(6, 7, dtype=torch.float64)
    expected = out + (x @ A.T * gate) @ B.T
    torch.testing.assert_close(
        routed_lora(x, A, B, gate, 1.0, out.clone(), ranks=[1, 4, 2]), expected
    )


def test_out_is_overwritten_only_without_gradients_and_only_if_it_owns_its_memory():
    tokens = 40  # fewer aren't worth it
    layout = LAYOUTS["equal"]
    x, A, B, gate, out = operands(layout, lead=(tokens,))
    with torch.no_grad():
        base = out.clone()
        assert routed_lora(x, A, B, gate, 1.0, base, **layout) is base
        for kept in (out.clone()[:], out.clone().t().contiguous().t()):
            before = kept.clone()
            routed_lora(x, A, B, gate, 1.0, kept, **layout)
            assert torch.equal(kept, before)
        square = torch.randn(tokens, D_IN, dtype=torch.float64)
        before = square.clone()
        routed_lora(
            square, A, torch.randn(D_IN, 9, dtype=torch.float64), gate, 1.0, square, **layout
        )
        assert torch.equal(square, before)
    before = out.clone()
    routed_lora(x, A.requires_grad_(), B, gate, 1.0, out, **layout)
    assert torch.equal(out, before)


@pytest.mark.parametrize("dispatch", ["dense", "grouped"])
def test_out_that_is_the_callers_own_is_overwritten_with_the_same_gradients(dispatch):
    layout = {**LAYOUTS["equal"], "active": 3, "dispatch": dispatch}
    tensors = operands(layout, lead=(40,))
    y, grads = run(routed_lora, tensors, 0.5, layout)
    given = []

    def own(x, A, B, gate, scale, out, **options):
        given.append(out * 1.0)
        result = routed_lora(x, A, B, gate, scale, given[0], overwrite=True, **options)
        assert result is given[0]
        return result

    y_own, grads_own = run(own, tensors, 0.5, layout)
    assert torch.equal(y_own, y)
    for got, true in zip(grads_own, grads, strict=True):
        assert torch.equal(got, true)


def test_a_leaf_or_a_view_is_not_overwritten():
    layout = LAYOUTS["equal"]
    x, A, B, gate, out = operands(layout, lead=(40,))
    for kept in (out.clone().requires_grad_(), out.clone()[:]):
        before = kept.detach().clone()
        routed_lora(x, A.requires_grad_(), B, gate, 1.0, kept, overwrite=True, **layout)
        assert torch.equal(kept, before)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"tied": "C"}, "unknown tied 'C'"),
        ({"ranks": [3, 3]}, "add up to 6"),
        ({"ranks": [9, 0]}, "ranks must be positive"),
        ({"ranks": [4, 5]}, "gate has 3 columns, expected 2"),
        ({"always_on": 10}, "always_on is 10"),
        ({"always_on": 1}, "can't be split equally"),
        ({"precision": "fp8"}, "unknown precision 'fp8'; known values: ieee"),
        ({"dispatch": "sparse"}, "unknown dispatch 'sparse'"),
        ({"backend": "jax"}, "unknown backend 'jax'"),
        ({"gate": torch.ones(5, 3).double()}, "gate has shape"),
        ({"x": torch.ones(6, 5).double()}, "x has shape"),
        ({"out": torch.ones(6, 5).double()}, "out has shape"),
        ({"scale": torch.ones(4).double()}, "scale has shape"),
        ({"A": torch.ones(9).double()}, "A must have two dimensions"),
        ({"B": torch.ones(10, 8).double()}, "has 8 rank columns, expected 9"),
        ({"tied": "A"}, "no multiple of"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    x, A, B, gate, out = operands(LAYOUTS["equal"])
    call = {"x": x, "A": A, "B": B, "gate": gate, "scale": 1.0, "out": out} | change
    if change == {"tied": "A"}:
        call["A"] = A[:2]
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        routed_lora(**call)


def test_dtypes_that_do_not_fit_are_named():
    x, A, B, gate, _ = operands(LAYOUTS["equal"])
    with pytest.raises(TypeError, match="both factors need one dtype"):
        routed_lora(x, A, B.float(), gate)
    with pytest.raises(TypeError, match="gate is torch.int64"):
        routed_lora(x, A, B, gate.long())
