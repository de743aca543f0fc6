"""What each of two processes runs for test_sharing_distributed.py: `-m ...sharing_worker`."""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import get_peft_model
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from molora import MoloraConfig

from .routed_twin import ragged_batch, tiny_llama

METHODS = ("omni-router", "lily", "rmoe", "octavius", "xlora")
# A first pass without shared parameters.
OWN_ROUTERS = {"router_scope": "site", "target_modules": ["q_proj", "v_proj"]}


def build(method: str, checkpointing: bool | None = None, **fields: Any) -> Any:
    """A tiny Llama with that method, every part of it random; checkpointed, reentrant or not."""
    config = MoloraConfig.from_method(
        method, lora_dropout=0.0, init_lora_weights=False, task_type="CAUSAL_LM", **fields
    )
    torch.manual_seed(1)
    model: Any = get_peft_model(tiny_llama(), config).train()
    if checkpointing is not None:
        model.enable_input_require_grads()
        options = {"use_reentrant": checkpointing}
        model.get_base_model().gradient_checkpointing_enable(options)
    return model


def gradients(model: Any, seed: int) -> dict[str, Tensor]:
    """Of the adapter, whole."""
    model(**ragged_batch(seed=seed), use_cache=False).loss.backward()
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    grads = {name: p.grad for name, p in inner.named_parameters() if p.requires_grad}
    return {
        name: grad.full_tensor() if hasattr(grad, "full_tensor") else grad
        for name, grad in grads.items()
        if grad is not None
    }


def in_layers(model: Any) -> Any:
    for layer in model.get_base_model().model.layers:
        fully_shard(layer)
    return fully_shard(model)


def main(folder: Path) -> None:
    """Leave the gradients of each way to train, or what it said instead."""
    dist.init_process_group("gloo")
    ways = {
        "DDP": lambda method: DistributedDataParallel(build(method)),
        "DDP, checkpointed": lambda method: DistributedDataParallel(build(method, False)),
        "DDP, reentrant": lambda method: DistributedDataParallel(build(method, True)),
        "FSDP, one unit": lambda method: fully_shard(build(method)),
        "FSDP, layers": lambda method: in_layers(build(method)),
    }
    found: dict[tuple[str, str], Any] = {}
    for method in METHODS:
        for way, make in ways.items():
            try:
                found[method, way] = gradients(make(method), dist.get_rank())
            except RuntimeError as error:
                found[method, way] = str(error)
    for checkpointing in (None, False, True):
        model = in_layers(build("xlora", checkpointing, **OWN_ROUTERS))
        found["first pass", str(checkpointing)] = gradients(model, dist.get_rank())
    torch.save(found, folder / f"{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
