"""Cost of mixing whole feed-forward networks: one of SmolLM2's shape, forward and backward.

    python train/feedforward_benchmark.py
    python train/feedforward_benchmark.py --dtype bfloat16 --tokens 4096 --rounds 9

8 experts of rank 8 on the three linear layers, 2 of them for each token, against

- lora: PEFT's LoRA of rank 64 on the three layers, the same A and B in one piece;
- chosen: eight adapted networks in a loop, each on the tokens that chose it;
- all: eight adapted networks in a loop, each on all tokens.

The variants take turns; each round takes one forward and backward of each. Compared are medians of
the processor time (of the wall clock on a GPU). `saved` is what autograd keeps for the backward
pass besides parameters, in units of tokens x d_inner.
"""

import argparse
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from molora import MoloraConfig

TARGETS = ["gate_proj", "up_proj", "down_proj"]
EXPERTS, RANK, ACTIVE = 8, 8, 2
Step = Callable[[Tensor], Tensor]


class Base(nn.Module):
    """A feed-forward network with a name that adapters can go by."""

    def __init__(self, features: int, inner: int) -> None:
        super().__init__()
        config = LlamaConfig(hidden_size=features, intermediate_size=inner, num_attention_heads=1)
        self.features = features
        self.mlp = LlamaMLP(config)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x)


class Loop(nn.Module):
    """Eight adapted networks, one after the other."""

    def __init__(self, base: Base, every_token: bool) -> None:
        super().__init__()
        config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS)
        self.model: Any = get_peft_model(base, config, adapter_name="0")
        for e in range(1, EXPERTS):
            self.model.add_adapter(str(e), config)
        self.router = nn.Linear(base.features, EXPERTS, bias=False)
        self.every_token = every_token

    def forward(self, x: Tensor) -> Tensor:
        probs = self.router(x).softmax(-1)
        weights, chosen = probs.topk(ACTIVE, -1)
        weights = weights / weights.sum(-1, keepdim=True)
        dense = torch.zeros_like(probs).scatter(-1, chosen, weights)
        y = torch.zeros_like(x)
        for e in range(EXPERTS):
            self.model.base_model.set_adapter(str(e))
            if self.every_token:
                y = y + dense[:, e, None] * self.model(x)
            else:
                rows = dense[:, e].nonzero()[:, 0]
                y = y.index_add(0, rows, dense[rows, e, None] * self.model(x[rows]))
        return y


def build(variant: str, options: argparse.Namespace) -> nn.Module:
    """A variant whose parameters, B included, aren't zero."""
    torch.manual_seed(0)
    base = Base(options.features, options.inner)
    model: nn.Module
    if variant == "molora":
        config = MoloraConfig(
            mixing="feed_forward",
            num_experts=EXPERTS,
            top_k=ACTIVE,
            r=RANK,
            lora_alpha=RANK,
            target_modules=TARGETS,
        )
        model = get_peft_model(base, config)
    elif variant == "lora":
        rank = EXPERTS * RANK
        lora = LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS)
        model = get_peft_model(base, lora)
    else:
        model = Loop(base, every_token=variant == "all")
    for name, parameter in model.named_parameters():
        adapter = any(part in name for part in ("lora_", "molora_", "router"))
        parameter.requires_grad_(adapter)
        if adapter:
            nn.init.normal_(parameter, std=0.02)
    return model.to(options.device, options.dtype).train()


def seconds(step: Callable[[], None], device: str) -> float:
    """How long a step takes: processor time, or the wall clock on a GPU."""
    if device == "cpu":
        start = time.process_time()
        step()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def saved_elements(model: nn.Module, x: Tensor) -> int:
    """Elements of the tensors that the graph keeps, each once, parameters not counted."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}  # held, so that no address is used twice

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(x)
    return sum(t.untyped_storage().nbytes() // x.element_size() for t in kept.values())


def main() -> None:
    options = parse()
    variants = ("molora", "lora", "chosen", "all")
    models = {variant: build(variant, options) for variant in variants}
    x = torch.randn(options.tokens, options.features, device=options.device, dtype=options.dtype)
    x.requires_grad_()

    def step(variant: str) -> None:
        models[variant](x).square().mean().backward()

    times: dict[str, list[float]] = {variant: [] for variant in variants}
    for round_ in range(options.rounds + 1):
        for variant in variants:
            taken = seconds(lambda v=variant: step(v), options.device)  # type: ignore[misc]
            if round_:  # the first one warms up
                times[variant].append(taken)
    ours = median(times["molora"])
    print(f"{options.device}, {options.dtype}, {options.tokens} tokens, d {options.features}, "
          f"d_inner {options.inner}, {options.rounds} rounds")  # fmt: skip
    print("variant   median ms  fastest  slowest  molora is  saved")
    for variant in variants:
        each = times[variant]
        saved = saved_elements(models[variant], x) / (options.tokens * options.inner)
        print(
            f"{variant:8} {1e3 * median(each):10.1f} {1e3 * min(each):8.1f} "
            f"{1e3 * max(each):8.1f} {ours / median(each):9.2f}x {saved:6.1f}"
        )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--features", type=int, default=576)
    parser.add_argument("--inner", type=int, default=1536)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtype", default="float32", type=lambda name: getattr(torch, name))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


if __name__ == "__main__":
    main()
