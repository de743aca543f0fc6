"""Two processes and parameters that several layers read: exact gradients, or an error that says how
to get them."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from molora.sharing import refuse_out_of_reach

from .sharing_worker import METHODS, build, gradients

ROOT = Path(__file__).resolve().parents[2]
every_method = pytest.mark.parametrize("method", METHODS)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[tuple[str, str], Any]]:
    """By process: gradients, or an error, of each method and way to train."""
    folder = tmp_path_factory.mktemp("processes")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    launch += ["--module", "tests.molora.sharing_worker"]
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(
        [sys.executable, *launch, str(folder)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@every_method
def test_gradients_are_the_mean_over_the_processes(method: str, found):
    one, two = (gradients(build(method), seed) for seed in range(2))
    for process in found:
        for way in ("DDP", "DDP, checkpointed", "FSDP, one unit"):
            actual = process[method, way]
            assert not isinstance(actual, str), f"{way}: {actual}"
            assert actual.keys() == one.keys()
            for name, grad in actual.items():
                expected = (one[name] + two[name]) / 2
                torch.testing.assert_close(grad, expected, atol=1e-6, rtol=1e-4, msg=name)


@every_method
@pytest.mark.parametrize(
    ("way", "advice"),
    [("DDP, reentrant", "{'use_reentrant': False}"), ("FSDP, layers", "fully_shard(model)")],
)
def test_what_cannot_be_exact_is_refused(method: str, way: str, advice: str, found):
    for process in found:
        message = process[method, way]
        assert isinstance(message, str), "it gave gradients"
        assert "parameters that live once in the adapter" in message and advice in message
        assert "the site 'model.layers.1." in message


def test_parameters_that_zero_3_has_taken_away_are_refused():
    lent = torch.nn.Linear(2, 3)
    refuse_out_of_reach([lent], "here", runs_again=True)
    lent.weight.data = torch.empty(0)
    with pytest.raises(RuntimeError, match=r"'here' reads .* use DDP or ZeRO-2"):
        refuse_out_of_reach([lent], "here", runs_again=False)
