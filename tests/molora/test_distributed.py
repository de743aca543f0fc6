"""Two processes: the auxiliary gradient is the mean over micro-batches and over processes.

Every parameter has a gradient there, which DDP without `find_unused_parameters` needs.
"""

from pathlib import Path

import pytest
import torch

from .routed_twin import Twin, check_difference, routed_llama
from .trainer_runs import BOTH
from .two_processes import run_two_processes


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with what both processes left."""
    folder = tmp_path_factory.mktemp("processes")
    run_two_processes("tests.molora.distributed_worker", folder)
    return folder


@pytest.mark.parametrize("name", ["plain", "reentrant", "non-reentrant", "fsdp2"])
def test_the_gradient_is_the_mean_over_processes(results: Path, name: str):
    ranks = [torch.load(results / f"{name}-{rank}.pt") for rank in range(2)]
    calls = [call for rank in ranks for call in rank["calls"]]
    assert not torch.equal(ranks[0]["calls"][0]["input_ids"], ranks[1]["calls"][0]["input_ids"])
    expected = Twin(routed_llama()).gradient(calls, BOTH)
    for rank in ranks:
        check_difference(rank["with"], rank["without"], expected)
