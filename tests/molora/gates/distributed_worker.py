"""What each of two processes runs for test_distributed.py: `-m ...gates.distributed_worker`."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from molora import SiteInput
from molora.gates import GATES
from molora.gates.balance_bias import BalanceBias
from molora.routers import ROUTERS


def balance(passes: dict[int, list[int]]) -> dict[str, torch.Tensor]:
    """The bias after one step in which process r chose the experts `passes[r]`."""
    bias = BalanceBias(4, rate=0.5)
    chosen = passes[dist.get_rank()]
    if chosen:
        bias.count(torch.nn.functional.one_hot(torch.tensor(chosen), 4).bool(), None)
    bias.after_step()
    return bias.state_dict()


def thresholds(rows: dict[int, list[list[float]]]) -> dict[str, torch.Tensor]:
    """Gate and router of DynMoE after two steps, the second without a pass on process 1."""
    options = {"initial_experts": 3, "period": 2}
    gate = GATES.build("expert_thresholds", options, num_experts=4, top_k=None, in_features=4)
    gate.thresholds.data.fill_(0.1)
    router = ROUTERS.build("cosine", {}, in_features=4, num_experts=4)
    router.weight.data = torch.eye(4)
    for step in range(2):
        if step == 0 or dist.get_rank() == 0:
            inputs = SiteInput(torch.tensor(rows[dist.get_rank()]), router=router)
            gate(router(inputs), inputs)
        gate.after_step(None)
    return {**gate.state_dict(), "router.weight": router.weight.detach()}


def penalty(passes: dict[int, tuple[int, int]]) -> dict[str, torch.Tensor]:
    """ReMoE's gate after a step in which process r had so many tokens with so many experts each."""
    gate = GATES.build("relu", {}, num_experts=4, top_k=2, in_features=1)
    tokens, active = passes[dist.get_rank()]
    logits = (torch.arange(4) < active).float().expand(tokens, 4) - 0.5
    gate(logits, SiteInput(logits))
    gate.after_step(None)
    return gate.state_dict()


def main(folder: Path) -> None:
    """Leave what this process ends with in a file of its own."""
    dist.init_process_group("gloo")
    result = {
        # apart, process 0 would raise expert 1 and process 1 lower it
        "balance": balance({0: [0, 0, 2, 3], 1: [1, 1, 1, 2]}),
        "one process alone": balance({0: [0, 0, 2, 3], 1: []}),
        # seven uses by four tokens; apart, process 0 would raise it
        "penalty": penalty({0: (1, 4), 1: (3, 1)}),
        # axis 1 is used by process 1 alone, axis 2 by nobody, and axis 3 has no expert yet
        "thresholds": thresholds({0: [[1.0, 0, 0, 0], [0, 0, 0, 3.0]], 1: [[0, 2.0, 0, 0]]}),
    }
    torch.save(result, folder / f"{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
