"""The short way of generation: the same results, and everything else goes the general way."""

import pytest
import torch

from molora_kernels import add_blocks, few_tokens, routed_lora, widened


def operands(tokens, always_on=0, dtype=torch.float64):
    torch.manual_seed(0)
    x = torch.randn(2, tokens, 6, dtype=dtype)
    A = torch.randn(3 * 2 + always_on, 6, dtype=dtype)
    B = torch.randn(5, 3 * 2 + always_on, dtype=dtype)
    gate = torch.rand(2, tokens, 3, dtype=dtype)
    return x, A, B, gate, torch.randn(2, tokens, 5, dtype=dtype)


@pytest.fixture
def taken(monkeypatch):
    """Whether the last call went the short way."""
    seen = []
    real = few_tokens.forward

    def forward(*arguments):
        result = real(*arguments)
        seen.append(result is not None)
        return result

    monkeypatch.setattr(few_tokens, "forward", forward)
    return seen


@pytest.mark.parametrize("always_on", [0, 3])
@pytest.mark.parametrize("tokens", [1, 4])
def test_it_equals_the_sum_over_experts(taken, tokens, always_on):
    x, A, B, gate, out = operands(tokens, always_on)
    expected = out.clone()
    for e in range(3):
        rows = slice(2 * e, 2 * e + 2)
        expected = expected + 0.7 * gate[..., e, None] * (x @ A[rows].T @ B[:, rows].T)
    expected = expected + 0.7 * (x @ A[6:].T @ B[:, 6:].T)
    before = out.clone()
    with torch.no_grad():
        result = routed_lora(x, A, B, gate, 0.7, out, ranks=(2, 2, 2), always_on=always_on)
    assert taken == [True]
    assert torch.equal(out, before)
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize(
    "change",
    [
        {"tokens": few_tokens.MOST_TOKENS},  # of each of two sequences
        {"out": None},
        {"precision": "tf32"},
    ],
    ids=str,
)
def test_anything_else_goes_the_general_way(taken, change):
    x, A, B, gate, out = operands(change.pop("tokens", 2))
    settings = {"scale": 1.0, "out": out, "ranks": (2, 2, 2), **change}
    with torch.no_grad():
        routed_lora(x, A, B, gate, **settings)
    assert taken in ([], [False])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_gives_the_bits_of_the_general_way(taken, dtype):
    """A reentrant checkpoint takes one way first and the other when it repeats the pass."""
    x, A, B, gate, out = operands(4, dtype=dtype)
    ranks, scale = (1, 2, 3), torch.rand(6, dtype=dtype)
    general = routed_lora(x, A.requires_grad_(), B, gate, scale, out, ranks=ranks)
    with torch.no_grad():
        quick = routed_lora(x, A, B, gate, scale, out, ranks=ranks)
    assert taken == [True]
    assert torch.equal(quick, general)


@pytest.mark.parametrize("flat", [True, False])
def test_a_half_precision_model_with_wide_factors(taken, flat):
    """As PEFT trains adapters of such models."""
    x, A, B, gate, out = operands(4, dtype=torch.float32)
    x, out = x.bfloat16(), out.bfloat16()
    general = routed_lora(x, A.requires_grad_(), B, gate, 0.7, out, ranks=(2, 2, 2))
    with torch.no_grad():
        given = gate.reshape(8, 3) if flat else gate
        quick = routed_lora(x, A, B, given, 0.7, out, ranks=(2, 2, 2))
    assert taken == [True]
    assert torch.equal(quick, general)


def test_what_is_wrong_is_still_said():
    x, A, B, gate, out = operands(2)
    with torch.no_grad(), pytest.raises(ValueError, match="out has shape"):
        routed_lora(x, A, B, gate, 1.0, out[..., :4], ranks=(2, 2, 2))


def test_a_few_16_bit_tokens_are_widened():
    x = torch.randn(2, 3, 6).bfloat16()
    with torch.no_grad():
        wide = widened(x)
    assert wide.dtype == torch.float32
    assert torch.equal(wide.bfloat16(), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wide_tokens_stay_as_they_are(dtype):
    x = torch.randn(2, 3, 6, dtype=dtype)
    with torch.no_grad():
        assert widened(x) is x


def test_many_tokens_or_tokens_with_gradients_are_not_copied():
    many = torch.randn(few_tokens.MOST_TOKENS + 1, 6).bfloat16()
    few = many[:2]
    assert widened(few) is few
    with torch.no_grad():
        assert widened(many) is many
        with torch.autocast("cpu", torch.bfloat16):
            assert widened(few) is few


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_blocks_are_added_and_rounded_once(dtype):
    torch.manual_seed(0)
    wide = torch.promote_types(dtype, torch.float32)
    x, A, B = (torch.randn(*shape, dtype=wide) for shape in ((6,), (5, 6), (4, 5)))
    out = torch.randn(1, 1, 4, dtype=dtype)
    before = out.clone()
    expected = out.double()
    for row, column, rank, factor in (blocks := [(0, 3, 2, 0.5), (2, 0, 3, -1.5)]):
        up, down = B[:, column : column + rank].double(), A[row : row + rank].double()
        expected = expected + factor * (up @ (down @ x.double()))
    result = add_blocks(x, A, B, blocks, out)
    assert result.dtype == dtype
    assert torch.equal(out, before)
    if dtype == torch.bfloat16:
        assert torch.equal(result, expected.bfloat16())
    else:
        torch.testing.assert_close(result, expected.to(dtype))


def test_no_blocks_leave_a_copy():
    out = torch.randn(1, 4)
    result = add_blocks(torch.randn(6), torch.randn(5, 6), torch.randn(4, 5), [], out)
    assert torch.equal(result, out)
    assert result.data_ptr() != out.data_ptr()
