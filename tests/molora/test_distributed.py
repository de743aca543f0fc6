"""Two processes: the auxiliary gradient is the mean over micro-batches and over processes.

Every parameter has a gradient there, which DDP without `find_unused_parameters` needs.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from .routed_twin import Twin, check_difference, routed_llama
from .trainer_runs import BOTH

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with what both processes left."""
    folder = tmp_path_factory.mktemp("processes")
    # `accelerate launch --cpu --num_processes 2` would start one process only, unless under MPI.
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    launch += ["--module", "tests.molora.distributed_worker"]
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = {**os.environ, "PYTHONPATH": path, "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [sys.executable, *launch, str(folder)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return folder


@pytest.mark.parametrize("name", ["plain", "reentrant", "non-reentrant", "fsdp2"])
def test_the_gradient_is_the_mean_over_processes(results: Path, name: str):
    ranks = [torch.load(results / f"{name}-{rank}.pt") for rank in range(2)]
    calls = [call for rank in ranks for call in rank["calls"]]
    assert not torch.equal(ranks[0]["calls"][0]["input_ids"], ranks[1]["calls"][0]["input_ids"])
    expected = Twin(routed_llama()).gradient(calls, BOTH)
    for rank in ranks:
        check_difference(rank["with"], rank["without"], expected)
