"""Where Python may look at a tensor's numbers."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from molora.plain_memory import in_plain_memory


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_numbers_of_the_cpu_may_be_read(dtype):
    assert in_plain_memory(torch.ones(2, dtype=dtype))


@torch.no_grad()
def test_other_tensors_are_left_alone():
    assert not in_plain_memory(torch.ones(2, dtype=torch.bfloat16))
    assert not in_plain_memory(torch.ones(2, device="meta"))
    assert not in_plain_memory(torch.nn.Parameter(torch.ones(2)))
    with FakeTensorMode():
        assert not in_plain_memory(torch.ones(2))


def test_a_graph_is_kept_whole():
    assert not in_plain_memory(torch.ones(2))


@torch.no_grad()
def test_autocast_keeps_its_dtypes():
    with torch.autocast("cpu", torch.bfloat16):
        assert not in_plain_memory(torch.ones(2))


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.torch.jit.trace:DeprecationWarning")
def test_a_trace_records_no_numbers():
    seen = []

    def look(x: torch.Tensor) -> torch.Tensor:
        seen.append(in_plain_memory(x))
        return x + 1

    torch.jit.trace(look, (torch.ones(2),), check_trace=False)
    assert seen == [False]
