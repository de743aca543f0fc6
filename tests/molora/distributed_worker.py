"""What each of two processes runs for test_distributed.py: `-m tests.molora.distributed_worker`."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from .routed_twin import Losses, Probe, ragged_batch, routed_llama
from .trainer_runs import BOTH, probed, sft_trainer, trainer

Run = Callable[[Losses], Probe]


def checkpointing(reentrant: bool) -> dict[str, Any]:
    kwargs = {"use_reentrant": reentrant}
    return {"activation_checkpointing": True, "activation_checkpointing_kwargs": kwargs}


def data_parallel(build: Callable[..., Any], folder: Path, **options: Any) -> Run:
    """A trainer under DDP that accumulates over two micro-batches on each process."""
    options = {"gradient_accumulation_steps": 2, "max_steps": 2, **options}
    return probed(build, folder, ddp_find_unused_parameters=False, **options)


def sharded(losses: Losses) -> Probe:
    """A bare loop over a model whose parameters FSDP2 divides among the processes."""
    model, probe = routed_llama(losses), Probe()
    probe.listen(model.get_base_model())
    for layer in model.get_base_model().model.layers:
        fully_shard(layer)
    fully_shard(model)
    model(**ragged_batch(seed=dist.get_rank())).loss.backward()
    probe.on_pre_optimizer_step(None, None, None, model=model)
    whole = {name: gradient.full_tensor() for name, gradient in probe.gradients[0].items()}
    probe.gradients[0] = whole
    return probe


def main(folder: Path) -> None:
    """Run each scenario with and without the losses; leave inputs and gradients in files."""
    runs: dict[str, Run] = {
        "plain": data_parallel(trainer, folder),
        "reentrant": data_parallel(trainer, folder, **checkpointing(True)),
        "non-reentrant": data_parallel(sft_trainer, folder, **checkpointing(False)),
        "fsdp2": sharded,
    }
    for name, run in runs.items():
        with_losses, without = run(BOTH), run({})
        result = {
            "calls": with_losses.windows[0],
            "with": with_losses.gradients[0],
            "without": without.gradients[0],
        }
        torch.save(result, folder / f"{name}-{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
