"""Two processes and parameters that several layers read, or a first pass: exact gradients, or an
error that says how to get them."""

import itertools
from pathlib import Path

import pytest
import torch

from molora.sharing import refuse_out_of_reach

from .sharing_worker import METHODS, OWN_ROUTERS, build, gradients
from .two_processes import run_two_processes

EXACT = ("DDP", "DDP, checkpointed", "FSDP, one unit")
REFUSED = {"DDP, reentrant": "{'use_reentrant': False}", "FSDP, layers": "fully_shard(model)"}


def test_gradients_are_the_mean_over_the_processes_or_refused(tmp_path: Path):
    """One test, because each that shared a fixture might start the processes anew."""
    run_two_processes("tests.molora.sharing_worker", tmp_path)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for method in METHODS:
        one, two = (gradients(build(method), seed) for seed in range(2))
        mean = {name: (one[name] + two[name]) / 2 for name in one}
        for process, way in itertools.product(found, EXACT):
            actual = process[method, way]
            assert not isinstance(actual, str), f"{method}, {way}: {actual}"
            assert actual.keys() == mean.keys()
            for name, grad in actual.items():
                torch.testing.assert_close(
                    grad, mean[name], atol=1e-6, rtol=1e-4, msg=f"{method}, {way}: {name}"
                )
        for process, (way, advice) in itertools.product(found, REFUSED.items()):
            message = process[method, way]
            assert isinstance(message, str), f"{method}, {way}: it gave gradients"
            assert "parameters that live once in the adapter" in message and advice in message
            assert "the site 'model.layers.1." in message
    one, two = (gradients(build("xlora", **OWN_ROUTERS), seed) for seed in range(2))
    for process, checkpointing in itertools.product(found, ("None", "False", "True")):
        actual = process["first pass", checkpointing]
        assert all(grad.abs().max() > 0 for grad in actual.values())
        for name, grad in actual.items():
            expected = (one[name] + two[name]) / 2
            torch.testing.assert_close(grad, expected, atol=1e-6, rtol=1e-4, msg=name)


def test_parameters_that_zero_3_has_taken_away_are_refused():
    lent = torch.nn.Linear(2, 3)
    refuse_out_of_reach([lent], "here", runs_again=True)
    lent.weight.data = torch.empty(0)
    with pytest.raises(RuntimeError, match=r"'here' reads .* use DDP or ZeRO-2"):
        refuse_out_of_reach([lent], "here", runs_again=False)
