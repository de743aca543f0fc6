"""Time the tile sizes of each kernel on this GPU and write the fastest for the launcher.

    python kernels/bench/tune.py --d 4096 --R 64

Writes molora_kernels/configs/<device>,triton=<version>.json. Each candidate's result is compared
with the default tiles' before it is timed; candidates that don't compile or don't fit are skipped.
"""

import argparse
import itertools
import json
from collections.abc import Callable, Iterator

import torch
import triton
from torch import Tensor

from molora_kernels import tiles, triton_launch
from molora_kernels.dense import Needs
from molora_kernels.layout import RankLayout

TOKENS = (16, 256, 4096, 65536)
SPACE = {
    "shrink": {"BT": (32, 64, 128), "BR": (64, 128), "BK": (32, 64, 128)},
    "expand": {"BT": (64, 128), "BN": (64, 128, 256), "BR": (32, 64)},
    "rank_backward": {"BT": (32, 64, 128), "BR": (64, 128), "BN": (32, 64, 128)},
    "outer": {"BT": (32, 64, 128), "BR": (64, 128), "BN": (64, 128)},
}
DTYPES = (torch.bfloat16, torch.float32)


def candidates(kernel: str) -> Iterator[dict[str, int]]:
    names, values = zip(*SPACE[kernel].items(), strict=True)
    for sizes in itertools.product(*values):
        for warps, stages in itertools.product((4, 8), (2, 3, 4)):
            yield dict(zip(names, sizes, strict=True)) | {"num_warps": warps, "num_stages": stages}


def step(T: int, d: int, R: int, dtype: torch.dtype) -> Callable[[], list[Tensor]]:
    """One forward and backward, which launches every kernel."""
    torch.manual_seed(0)
    layout = RankLayout((8,) * (R // 8))
    x, out, dy = (torch.randn(T, d, device="cuda", dtype=dtype) for _ in range(3))
    A, B = (torch.randn(s, device="cuda", dtype=dtype) / 8 for s in ((R, d), (d, R)))
    gate = torch.rand(T, layout.experts, device="cuda")
    u = triton_launch.rank_buffer(x, R, dtype)
    needs = Needs(True, True, True, True)

    def run() -> list[Tensor]:
        y = triton_launch.forward(x, A, B, gate, 1.0, out, layout, dtype, False, u)
        grads = triton_launch.backward(dy, x, A, B, gate, u, 1.0, layout, needs, dtype)
        return [t for t in (y, *grads) if t is not None]

    return run


def best(kernel: str, size: int, run: Callable[[], list[Tensor]]) -> dict[str, int]:
    """The candidate with which the whole step is fastest; only this kernel's tiles vary."""
    default = dict(tiles.DEFAULTS[kernel][size])
    expected = run()
    fastest, found = triton.testing.do_bench(run), default
    for candidate in candidates(kernel):
        tiles.DEFAULTS[kernel][size] = candidate
        try:
            for a, b in zip(run(), expected, strict=True):
                torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)
            time = triton.testing.do_bench(run)
        except (triton.compiler.CompilationError, triton.runtime.errors.OutOfResources):
            continue
        finally:
            tiles.DEFAULTS[kernel][size] = default
        if time < fastest:
            fastest, found = time, candidate
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--d", type=int, default=4096)
    parser.add_argument("--R", type=int, default=64, help="a multiple of 8")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("tiles can only be timed on a GPU")
    path = tiles.config_file(torch.cuda.get_device_name(), triton.__version__)
    path.unlink(missing_ok=True)  # an earlier result would hide the candidates from the launcher
    chosen: dict[str, dict[str, list[dict[str, int]]]] = {name: {} for name in SPACE}
    for dtype, T in itertools.product(DTYPES, TOKENS):
        run = step(T, arguments.d, arguments.R, dtype)
        for kernel in SPACE:
            entry = {"T": T, **best(kernel, dtype.itemsize, run)}
            chosen[kernel].setdefault(str(dtype.itemsize), []).append(entry)
            print(kernel, dtype, entry, flush=True)
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(chosen, indent=1) + "\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
