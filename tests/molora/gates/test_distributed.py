"""Two processes: a gate's own state follows what both have seen, and is the same on both."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, torch.Tensor]]:
    """By scenario, the state that both processes ended with."""
    folder = tmp_path_factory.mktemp("processes")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    launch += ["--module", "tests.molora.gates.distributed_worker"]
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(
        [sys.executable, *launch, str(folder)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    first, second = (torch.load(folder / f"{rank}.pt") for rank in range(2))
    for scenario, state in first.items():
        for name, tensor in state.items():
            assert torch.equal(tensor, second[scenario][name]), (scenario, name)
    return first


def test_the_balance_bias_follows_the_sum_of_the_counts(states):
    # counts 2, 3, 2, 1 of 8: the mean is 2
    assert states["balance"]["steps"].tolist() == [0, -1, 0, 1]


def test_a_process_that_counted_nothing_takes_part(states):
    assert states["one process alone"]["steps"].tolist() == [-1, 1, 0, 0]


def test_the_penalty_follows_all_tokens(states):
    assert states["penalty"]["steps"].tolist() == [-1]


def test_an_expert_that_one_process_used_stays(states):
    gate = states["thresholds"]
    assert gate["active"].tolist() == [True, True, True, False]  # the third went and came anew
    assert gate["router.weight"][:2].tolist() == torch.eye(4)[:2].tolist()
    assert gate["router.weight"][2].tolist() == [0, 0, 0, 1]
