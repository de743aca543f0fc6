"""Time the operator against what it replaces: PEFT's LoRA, a loop over experts, plain torch.

    python kernels/bench/run.py                    # this CPU -> kernels/bench/results/cpu.json
    python kernels/bench/run.py --write            # and its ratios -> kernels/README.md
    python kernels/bench/run.py --device cuda      # -> kernels/bench/results/<device name>.json
    python kernels/bench/run.py --sweep            # where grouping tokens by expert begins to pay

Forward and backward of the adapter part alone: the base layer's result is precomputed. Contestants
are interleaved; a figure is the median of --repeats runs, on the CPU in time of one thread. Values
are compared with fp64 before anything is timed. Results are ratios: milliseconds only mean
something on the machine named in the file.
"""

import argparse
import itertools
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from molora_kernels import routed_lora
from molora_kernels.plan import product_dtype
from molora_kernels.reference import routed_lora_reference

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).resolve().parents[1] / "README.md"
MARKERS = ("<!-- cpu -->\n", "<!-- end of cpu -->\n")
OTHERS = ("peft_lora", "dense_torch", "expert_loop", "ours_dense")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Case:
    """T tokens, d_in = d_out = d, E experts of rank r of which K are active."""

    T: int
    d: int
    E: int
    r: int
    K: int
    dtype: torch.dtype
    adapter_dtype: torch.dtype

    @property
    def name(self) -> str:
        short = {torch.float32: "fp32", torch.bfloat16: "bf16"}
        dtypes = short[self.dtype]
        if self.adapter_dtype != self.dtype:
            dtypes += f", {short[self.adapter_dtype]} adapter"
        return f"T={self.T} d={self.d} E={self.E} r={self.r} K={self.K} {dtypes}"


Step = Callable[[], tuple[Tensor, ...]]


class Fixed(nn.Linear):
    """A base layer that costs nothing: it returns a result computed before."""

    result: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return self.result


def operands(case: Case, device: str) -> dict[str, Tensor]:
    torch.manual_seed(0)
    R = case.E * case.r
    logits = torch.randn(case.T, case.E)
    values, chosen = logits.topk(case.K, -1)
    # not a softmax over K: with K = 1 its weight would be the constant 1
    gate = torch.zeros(case.T, case.E).scatter(-1, chosen, values.sigmoid())
    factors = {"A": torch.randn(R, case.d) / case.d**0.5, "B": torch.randn(case.d, R) / R**0.5}
    wide = {"x": torch.randn(case.T, case.d), "out": torch.randn(case.T, case.d)}
    tensors = {
        **{name: t.to(case.adapter_dtype) for name, t in factors.items()},
        **{name: t.to(case.dtype) for name, t in wide.items()},
        "gate": gate,
    }
    leaves = {name: t.to(device).requires_grad_() for name, t in tensors.items()}
    return {**leaves, "dy": torch.randn(case.T, case.d).to(device, case.dtype)}


def step(function: Callable[[], Tensor], leaves: list[Tensor], dy: Tensor) -> Step:
    return lambda: (y := function(), *torch.autograd.grad(y, leaves, dy))


def ours(case: Case, t: dict[str, Tensor], dispatch: str = "auto", active: bool = True) -> Step:
    def forward() -> Tensor:
        return routed_lora(
            t["x"],
            t["A"],
            t["B"],
            t["gate"],
            0.5,
            t["out"],
            active=case.K if active else None,
            dispatch=dispatch,
        )

    return step(forward, [t[n] for n in ("x", "A", "B", "gate", "out")], t["dy"])


def peft_lora(case: Case, t: dict[str, Tensor]) -> Step:
    """PEFT's own layer with one adapter of rank E r, which has no gate."""
    from peft import LoraConfig
    from peft.tuners.lora import Linear

    R, device = case.E * case.r, t["x"].device
    base = Fixed(case.d, case.d, bias=False, device=device, dtype=case.dtype)
    base.result = t["out"]
    layer = Linear(base, "default", LoraConfig(r=R, lora_alpha=R // 2), r=R, lora_alpha=R // 2)
    for factor, name in ((layer.lora_A, "A"), (layer.lora_B, "B")):
        factor["default"].weight.data = t[name].detach().clone()
    weights: list[Any] = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    return step(lambda: layer(t["x"]), [t["x"], *weights, t["out"]], t["dy"])


def expert_loop(case: Case, t: dict[str, Tensor]) -> Step:
    """Gather the tokens of one expert, run it, add its rows to the result: expert after expert."""
    r = case.r

    def forward() -> Tensor:
        x, A, B, gate = (t[n] for n in ("x", "A", "B", "gate"))
        y = t["out"]
        for e in range(case.E):
            tokens = gate[:, e].nonzero().squeeze(-1)
            rows = x.index_select(0, tokens).to(A.dtype)
            z = (rows @ A[e * r : (e + 1) * r].T) * (0.5 * gate[tokens, e, None]).to(A.dtype)
            delta = z @ B[:, e * r : (e + 1) * r].T
            y = y.index_add(0, tokens, delta.to(y.dtype))
        return y

    return step(forward, [t[n] for n in ("x", "A", "B", "gate", "out")], t["dy"])


def dense_torch(case: Case, t: dict[str, Tensor]) -> Step:
    """Stacked experts, the gate and the sum as separate operations, torch's autograd."""

    def forward() -> Tensor:
        x, A, B, gate = (t[n] for n in ("x", "A", "B", "gate"))
        u = (x.to(A.dtype) @ A.T).view(-1, case.E, case.r)
        z = (u * gate[..., None].to(A.dtype)).view(-1, case.E * case.r)
        return t["out"] + (z @ B.T * 0.5).to(t["out"].dtype)

    return step(forward, [t[n] for n in ("x", "A", "B", "gate", "out")], t["dy"])


def products(case: Case, t: dict[str, Tensor]) -> Step:
    """The six GEMMs of a step that forms all columns, alone, on operands that are there already."""
    dtype = product_dtype(case.adapter_dtype, t["x"].device)
    x, dy, A, B = (t[n].detach().to(dtype) for n in ("x", "dy", "A", "B"))
    z = x @ A.mT
    return lambda: (x @ A.mT, z @ B.mT, dy @ B, z @ A, z.mT @ x, z.mT @ dy)


def check(case: Case, t: dict[str, Tensor]) -> None:
    """Stop unless result and gradients agree with fp64."""
    truth = {n: v.detach().double().requires_grad_() for n, v in t.items()}
    names = ("x", "A", "B", "out")
    y = routed_lora_reference(truth["x"], truth["A"], truth["B"], truth["gate"], 0.5, truth["out"])
    expected = (y, *torch.autograd.grad(y, [truth[n] for n in names], truth["dy"]))
    got = ours(case, t)()
    for name, a, b in zip(("y", *names), (*got[:4], got[5]), expected, strict=True):
        error = ((a.double() - b).norm() / b.norm()).item()
        if error > TOLERANCE[case.dtype]:
            sys.exit(f"{case.name}: {name} is {error:.1e} away from fp64: nothing was timed")


def seconds(device: str, function: Step) -> float:
    if device == "cpu":
        start = time.thread_time()
        function()
        return time.thread_time() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    function()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


def medians(contestants: dict[str, Step], repeats: int, device: str) -> dict[str, float]:
    """Milliseconds of each contestant, all of them run in turn."""
    for function in contestants.values():
        function()
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(repeats):
        for name, function in contestants.items():
            times[name].append(seconds(device, function))
    return {name: statistics.median(v) * 1e3 for name, v in times.items()}


def peak_bytes(function: Step, device: str) -> int:
    """The most memory that one step holds at a time beyond what was there before."""
    function()
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True) as profile:
        function()
    events = profile.profiler.kineto_results.events()
    held = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def bench(case: Case, device: str, repeats: int) -> dict[str, object]:
    t = operands(case, device)
    check(case, t)
    contestants = {
        "ours": ours(case, t),
        "peft_lora": peft_lora(case, t),
        "dense_torch": dense_torch(case, t),
        "expert_loop": expert_loop(case, t),
    }
    if case.K == 1:
        contestants["ours_dense"] = ours(case, t, "dense")
    times = medians({**contestants, "products": products(case, t)}, repeats, device)
    others = [name for name in contestants if name != "ours"]
    memory = {n: peak_bytes(contestants[n], device) for n in ("ours", "peft_lora")}
    return {
        "case": case.name,
        "milliseconds": {n: round(v, 3) for n, v in times.items()},
        "time_over": {n: round(times["ours"] / times[n], 3) for n in others},
        "products_over_ours": round(times["products"] / times["ours"], 3),
        "peak_bytes": memory,
        "peak_memory_over_peft_lora": round(memory["ours"] / memory["peft_lora"], 3),
    }


def sweep(device: str, repeats: int) -> None:
    """Print grouped over dense for the rule in molora_kernels/rule.py."""
    fp32, bf16 = torch.float32, torch.bfloat16
    shapes = ((8, 8), (16, 8), (32, 8), (64, 8), (16, 16), (8, 32), (8, 64))
    for dtype, d, (E, r), K in itertools.product((fp32, bf16), (576, 2048), shapes, (1, 2, 4)):
        case = Case(2048, d, E, r, K, dtype, fp32)
        t = operands(case, device)
        both = {name: ours(case, t, name) for name in ("dense", "grouped")}
        times = medians(both, repeats, device)
        ratio = times["grouped"] / times["dense"]
        print(f"{case.name}  R/K={E * r // K:4d}  grouped/dense {ratio:.2f}", flush=True)


def cases(device: str) -> list[Case]:
    fp32, bf16 = torch.float32, torch.bfloat16
    T = 2048 if device == "cpu" else 16384
    widths = (576, 2048) if device == "cpu" else (2048, 4096, 8192)
    common = [Case(T, d, 8, 8, 2, dt, dt) for d in widths for dt in (fp32, bf16)]
    mixed = Case(T, 2048, 8, 8, 2, bf16, fp32)
    return [*common, mixed, Case(T, 2048, 64, 8, 1, fp32, fp32)]


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.processor()


def table(report: dict[str, Any]) -> str:
    """The ratios in Markdown."""
    lines = [
        f"{report['device']}, torch {report['torch']}, {report['threads']} thread, "
        f"medians of {report['repeats']}.",
        "",
        "| case | PEFT LoRA | dense torch | expert loop | own dense form | GEMMs alone | "
        "memory over PEFT LoRA |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        ratios = [f"{row['time_over'][n]:.2f}" if n in row["time_over"] else "" for n in OTHERS]
        rest = (f"{row[name]:.2f}" for name in ("products_over_ours", "peak_memory_over_peft_lora"))
        lines.append("| " + " | ".join([row["case"], *ratios, *rest]) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    if arguments.device == "cpu":
        # spinning OpenMP threads would be charged to whoever runs next
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        torch.set_num_threads(1)
    if arguments.sweep:
        sweep(arguments.device, arguments.repeats)
        return
    rows = []
    for case in cases(arguments.device):
        rows.append(bench(case, arguments.device, arguments.repeats))
        print(case.name, rows[-1]["time_over"], flush=True)
    name = "cpu" if arguments.device == "cpu" else torch.cuda.get_device_name().replace(" ", "_")
    report = {
        "device": processor() if arguments.device == "cpu" else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "repeats": arguments.repeats,
        "rows": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
    print("\nTime of ours over that of\n\n" + table(report))
    if arguments.write:
        head, rest = README.read_text().split(MARKERS[0])
        _, tail = rest.split(MARKERS[1])
        README.write_text(head + MARKERS[0] + table(report) + MARKERS[1] + tail)


if __name__ == "__main__":
    main()
