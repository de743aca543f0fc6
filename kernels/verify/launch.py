"""Run the host code on fake CUDA tensors of T = 200,000, d = 16,384: what would be launched?

    python kernels/verify/launch.py    # exit 1 if a launch breaks a rule

No GPU takes part: a driver that knows only its architecture, tensors without memory, and Triton's
warm-up, which compiles exactly the specialisations that the launches ask for. Rules: the number of
launches, alignment hints on every pointer and row stride, 64-bit row offsets (T d exceeds 2^31), no
read of a value on the host (fake tensors have none and would raise).
"""

import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
os.environ.setdefault("TRITON_CACHE_DIR", str(ROOT / "build" / "triton"))
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
os.environ.pop("TRITON_INTERPRET", None)

import torch  # noqa: E402
import triton  # noqa: E402
from triton._compile_warmup import compile_warmup_only  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.backends.driver import DriverBase  # noqa: E402

from molora_kernels import (  # noqa: E402
    triton_kernels,
    triton_launch,
    triton_sorted,
    triton_sorted_kernels,
)
from molora_kernels.dense import Needs  # noqa: E402
from molora_kernels.layout import RankLayout  # noqa: E402

T, D, EXPERTS, RANK = 200_000, 16_384, 8, 8
FORWARD = ["shrink", "expand"]
BACKWARD = ["rank_backward", "expand", "outer", "outer"]
SORTED_FORWARD = ["sorted_shrink", "sorted_expand"]
SORTED_BACKWARD = ["sorted_rank_backward", "sorted_expand", "sorted_outer", "sorted_outer"]
UNALIGNED = {"T", "E", "TILES", "slot", "sg", "sdg", "rows_per_plane", "PLANE_COUNT"}


class NoGpu(DriverBase):
    """A driver that can name its target and nothing else."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target
        super().__init__()

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_benchmarker(self) -> Any:
        raise RuntimeError("nothing can be timed without a device")

    def map_python_to_cpp_type(self, name: str) -> str:
        return name


def record(launches: list[str], compiled: dict[str, Any]) -> None:
    """Note the name of each launch, and the source and code of each compilation."""
    for name in {*FORWARD, *BACKWARD, *SORTED_FORWARD, *SORTED_BACKWARD, "add_planes"}:
        module = triton_sorted_kernels if name.startswith("sorted") else triton_kernels
        kernel = getattr(module, name)

        class Launcher:
            def __init__(self, name: str, kernel: Any) -> None:
                self.name, self.kernel = name, kernel

            def __getitem__(self, grid: tuple[int, ...]) -> Any:
                def launch(*arguments: Any, **options: Any) -> None:
                    if max(grid[1:]) > 65535:
                        sys.exit(f"{self.name}: grid {grid} is larger than CUDA allows")
                    launches.append(self.name)
                    compiled[f"{self.name} {len(launches)}"] = self.kernel[grid](
                        *arguments, **options
                    )

                return launch

        setattr(module, name, Launcher(name, kernel))


def faults(name: str, kernel: Any) -> list[str]:
    source = kernel.src
    arguments = source.fn.arg_names
    constants = {path[0] for path in source.constants}
    hinted = {path[0] for path, hints in source.attrs.items() if ["tt.divisibility", 16] in hints}
    plain = [
        argument
        for position, argument in enumerate(arguments)
        if position not in hinted | constants and argument not in UNALIGNED
    ]
    found = [f"{name}: no alignment hint on {argument}" for argument in plain]
    if "add_planes" not in name and "xi64" not in kernel.asm["ttir"].split("tt.load")[0]:
        found.append(f"{name}: row offsets are not 64-bit")
    return found


def main() -> None:
    triton.runtime.driver.set_active(NoGpu(GPUTarget("cuda", 90, 32)))
    launches: list[str] = []
    compiled: dict[str, Any] = {}
    record(launches, compiled)
    layout, bf16 = RankLayout((RANK,) * EXPERTS), torch.bfloat16
    R = EXPERTS * RANK
    with compile_warmup_only():
        x, out, dy = (torch.empty(T, D, dtype=bf16, device="cuda") for _ in range(3))
        A, B = (torch.empty(s, dtype=bf16, device="cuda") for s in ((R, D), (D, R)))
        gate = torch.empty(T, EXPERTS, device="cuda")
        u = triton_launch.rank_buffer(x, R, bf16)
        y = triton_launch.forward(x, A, B, gate, 1.0, out, layout, bf16, False, u)
        forward = list(launches)
        needs = Needs(True, True, True, True)
        grads = triton_launch.backward(dy, x, A, B, gate, u, 1.0, layout, needs, bf16)
        shapes = [tuple(t.shape) for t in (y, *grads) if t is not None]
        backward = launches[len(forward) :]
        launches.clear()
        kept = x.new_empty(T, triton_sorted.padded_rank(layout))
        triton_sorted.forward(x, A, B, gate, 1, 1.0, out, layout, bf16, False, kept, "ieee")
        rest = (gate, 1, kept, 1.0, layout, needs, bf16, "ieee")
        triton_sorted.backward(dy, x, A, B, *rest)
    broken = [fault for name, kernel in compiled.items() for fault in faults(name, kernel)]
    if forward != FORWARD:
        broken.append(f"forward launches {forward}, expected {FORWARD}")
    if [name for name in backward if name != "add_planes"] != BACKWARD:
        broken.append(f"backward launches {backward}, expected {BACKWARD}")
    if launches != SORTED_FORWARD + SORTED_BACKWARD:
        broken.append(f"sorted: {launches}, expected {SORTED_FORWARD + SORTED_BACKWARD}")
    if shapes != [(T, D), (T, D), (R, D), (D, R), (T, EXPERTS)]:
        broken.append(f"shapes {shapes}")
    print(f"T = {T}, d = {D}: forward {forward}, backward {backward}, sorted {launches}")
    if broken:
        sys.exit("\n".join(broken))


if __name__ == "__main__":
    main()
