"""Which path a call takes, told without the devices themselves."""

import warnings
from types import SimpleNamespace

import pytest
import torch

from molora_kernels import plan, routed_lora, rule
from molora_kernels.layout import RankLayout


def on_gpu(*shape):
    return SimpleNamespace(shape=shape, device=torch.device("cuda", 0))


@pytest.fixture(autouse=True)
def fresh_warnings():
    plan._say_once.cache_clear()
    yield
    plan._say_once.cache_clear()


@pytest.mark.parametrize(
    "d_in, d_out, dtype, preferred",
    [
        (64, 32, torch.bfloat16, True),
        (64, 32, torch.float32, True),
        (64, 32, torch.float64, False),
        (40, 32, torch.float32, False),
        (64, 33, torch.float32, False),
    ],
)
def test_a_gpu_takes_the_kernels_if_rows_are_aligned(monkeypatch, d_in, d_out, dtype, preferred):
    monkeypatch.setattr(plan, "triton_missing", lambda *device: None)
    assert plan.prefers_triton(on_gpu(5, d_in), on_gpu(d_out, 8), dtype) is preferred


def test_a_missing_triton_is_said_once(monkeypatch):
    monkeypatch.setattr(plan, "triton_missing", lambda *device: "triton is not installed")
    with pytest.warns(UserWarning, match="triton is not installed") as seen:
        for _ in range(2):
            assert not plan.prefers_triton(on_gpu(5, 64), on_gpu(32, 8), torch.float32)
    assert len(seen) == 1


def test_a_cpu_says_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not plan.prefers_triton(torch.ones(5, 64), torch.ones(32, 8), torch.float32)


def test_forcing_triton_on_a_cpu_says_how():
    if plan.triton_missing("cpu", None) is None:
        pytest.skip("Triton interprets kernels in this process")
    with pytest.raises(ValueError, match="backend='triton' can't be used: triton"):
        routed_lora(torch.ones(2, 3), torch.ones(4, 3), torch.ones(3, 4), None, backend="triton")


@pytest.mark.parametrize(
    "ranks, always_on, active, path",
    [
        ((8,) * 38, 0, 1, "sorted"),
        ((8,) * 37, 0, 1, "triton"),
        ((8,) * 38, 0, 2, "triton"),
        ((8,) * 38, 0, None, "triton"),
        ((8,) * 38, 8, 1, "triton"),
        ((128,) * 3, 0, 1, "triton"),
    ],
)
def test_when_a_gpu_sorts_tokens(monkeypatch, ranks, always_on, active, path):
    monkeypatch.setattr(plan, "triton_missing", lambda *device: None)
    x, B = on_gpu(4096, 64), on_gpu(32, 8)
    layout, bf16 = RankLayout(ranks, always_on), torch.bfloat16
    assert plan._path(x, B, layout, bf16, bf16, active, "auto", "auto") == path


@pytest.mark.parametrize(
    "ranks, always_on, tied, active, tokens, expected",
    [
        ((8,) * 64, 0, None, 2, 16, True),
        ((8,) * 64, 0, None, 2, 17, False),
        ((8,) * 64, 0, None, 2, 0, False),
        ((8,) * 64, 0, None, None, 1, False),
        ((8,) * 64, 4, None, 2, 1, False),
        ((8,) * 64, 0, "A", 2, 1, False),
        ((8, 4) * 32, 0, None, 2, 1, False),
    ],
)
def test_when_generation_reads_chosen_experts_only(
    ranks, always_on, tied, active, tokens, expected
):
    assert rule.decodes(RankLayout(ranks, always_on, tied), active, tokens) is expected
