"""Two processes: a gate's own state follows what both have seen, and is the same on both."""

import pytest
import torch

from ..two_processes import run_two_processes


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, torch.Tensor]]:
    """By scenario, the state that both processes ended with."""
    folder = tmp_path_factory.mktemp("processes")
    run_two_processes("tests.molora.gates.distributed_worker", folder)
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
