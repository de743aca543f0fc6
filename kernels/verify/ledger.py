"""Count what every kernel reads, writes and multiplies, in Triton's interpreter, against the ideal.

    python kernels/verify/ledger.py            # print the table, exit 1 above 1.02
    python kernels/verify/ledger.py --write    # and put it into kernels/README.md

Read: 32-byte sectors that some program touches, each counted once (the traffic to memory if the
cache keeps what is read again). Written: every byte of every store. Ideal: each operand and result
once. FLOPs: those of the kernel's matrix products against 2 T d R.
"""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np  # noqa: E402
import torch  # noqa: E402
import triton.runtime.interpreter as interpreter  # noqa: E402

from molora_kernels import (  # noqa: E402
    triton_decode,
    triton_kernels,
    triton_launch,
    triton_sorted,
    triton_sorted_kernels,
)
from molora_kernels.dense import Needs  # noqa: E402
from molora_kernels.layout import RankLayout  # noqa: E402
from molora_kernels.tiles import DEFAULTS  # noqa: E402

README = Path(__file__).resolve().parents[1] / "README.md"
MARKERS = ("<!-- ledger -->\n", "<!-- end of ledger -->\n")
LIMIT = 1.02
T, D, EXPERTS, RANK = 512, 512, 4, 16
R = EXPERTS * RANK
CHOSEN, TILE_OF_EXPERTS = 2, 16  # experts of a token; logits that one matrix product makes at least
SPLIT = DEFAULTS["decode_shrink"][2]["SPLIT"]
KERNELS = (
    "shrink",
    "shrink_route",
    "decode_shrink",
    "decode_expand",
    "sorted_shrink",
    "sorted_expand",
    "sorted_rank_backward",
    "sorted_outer",
    "expand",
    "rank_backward",
    "outer",
    "add_planes",
)


class Ledger:
    """Traffic of the launches made while it is installed."""

    def __init__(self) -> None:
        self.sectors: set[int] = set()
        self.written = self.flops = 0

    def install(self) -> Callable[[], None]:
        """Hook the interpreter; the returned function unhooks it."""
        builder = interpreter.interpreter_builder
        load, store, dot = (
            builder.create_masked_load,
            builder.create_masked_store,
            builder.create_dot,
        )

        def active(pointers: Any, mask: Any) -> Any:
            return pointers.data[np.broadcast_to(mask.data, pointers.data.shape)]

        def counted_load(pointers: Any, mask: Any, *rest: Any) -> Any:
            self.sectors.update((active(pointers, mask) // 32).tolist())
            return load(pointers, mask, *rest)

        def counted_store(pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
            size = pointers.get_element_ty().primitive_bitwidth // 8
            self.written += active(pointers, mask).size * size
            return store(pointers, value, mask, *rest)

        def counted_dot(a: Any, b: Any, *rest: Any) -> Any:
            self.flops += 2 * a.data.shape[-2] * a.data.shape[-1] * b.data.shape[-1]
            return dot(a, b, *rest)

        builder.create_masked_load, builder.create_masked_store = counted_load, counted_store
        builder.create_dot = counted_dot

        def remove() -> None:
            builder.create_masked_load, builder.create_masked_store = load, store
            builder.create_dot = dot

        return remove


def sizes() -> tuple[int, int, int, int]:
    """Bytes of X, of U, of a factor, and of a plane of its gradient."""
    return T * D * 2, T * R * 2, R * D * 2, R * D * 4


def ideal_bytes() -> dict[str, int]:
    """Every operand and result of a launch once; results that vary with the launch are left out."""
    wide, rank, factor, _ = sizes()
    gates, table, order, weights = T * EXPERTS * 4, R * 4, T * 4, T * 4
    tables, rank_of_one = 2 * table, T * RANK * 2
    return {
        "shrink": wide + factor + gates + tables + 2 * rank,
        "rank_backward": wide + factor + 2 * gates + tables + 3 * rank,
        "expand": rank + factor + wide,
        # the router's weight in fp32
        "shrink_route": wide + factor + EXPERTS * D * 4 + rank + gates,
        # one token of two experts: its row, their columns, fp32 planes
        "decode_shrink": D * 2 + CHOSEN * RANK * D * 2 + CHOSEN * RANK * 4 * (SPLIT + 1),
        "decode_expand": 2 * D * 2 + CHOSEN * RANK * D * 2 + CHOSEN * RANK * 4 * SPLIT,
        "sorted_shrink": wide + factor + order + weights + table + 2 * rank_of_one,
        "sorted_expand": rank_of_one + factor + order + wide,
        "sorted_rank_backward": wide + factor + order + 2 * weights + table + 3 * rank_of_one,
        "sorted_outer": wide + rank_of_one + order + factor,
    }


def ideal_flops(name: str) -> int:
    """2 T d per column that is multiplied; zero where no matrix product is formed."""
    if name in ("add_planes", "decode_shrink", "decode_expand"):
        return 0
    columns = {"shrink_route": R + TILE_OF_EXPERTS}.get(name, R)
    return 2 * T * D * (RANK if name.startswith("sorted") else columns)


def measure() -> list[tuple[str, int, int, int, int]]:
    """(kernel, bytes, ideal bytes, FLOPs, ideal FLOPs) of each launch of a forward and backward."""
    rows: list[tuple[str, int, int, int, int]] = []
    ideal, (wide, rank, factor, planes) = ideal_bytes(), sizes()

    def counting(name: str, kernel: Any) -> Any:
        class Launcher:
            def __getitem__(self, grid: tuple[int, ...]) -> Any:
                def launch(*arguments: Any, **options: Any) -> None:
                    ledger = Ledger()
                    remove = ledger.install()
                    kernel[grid](*arguments, **options)
                    remove()
                    used = len(ledger.sectors) * 32 + ledger.written
                    least = ideal.get(name, 0)
                    if name.endswith("expand") and options["ADD"] and name != "decode_expand":
                        least += wide
                    if name == "outer":
                        least = wide + rank + (grid[2] * planes if grid[2] > 1 else factor)
                    if name == "add_planes":
                        least = arguments[2] * planes + factor
                    rows.append((name, used, least, ledger.flops, ideal_flops(name)))

                return launch

        return Launcher()

    homes = {
        name: triton_sorted_kernels if name.startswith("sorted") else triton_kernels
        for name in KERNELS
    }
    originals = {name: getattr(home, name) for name, home in homes.items()}
    for name, kernel in originals.items():
        setattr(homes[name], name, counting(name, kernel))
    try:
        step()
    finally:
        for name, kernel in originals.items():
            setattr(homes[name], name, kernel)
    return rows


def step() -> None:
    torch.manual_seed(0)
    layout = RankLayout((RANK,) * EXPERTS)
    half = torch.float16
    x, out, dy = (torch.randn(T, D).to(half) for _ in range(3))
    A, B, gate = torch.randn(R, D).to(half), torch.randn(D, R).to(half), torch.rand(T, EXPERTS)
    u = triton_launch.rank_buffer(x, R, half)
    triton_launch.forward(x, A, B, gate, 1.0, out, layout, half, False, u)
    needs = Needs(True, True, True, True)
    triton_launch.backward(dy, x, A, B, gate, u, 1.0, layout, needs, half)

    router = torch.randn(EXPERTS, D)
    triton_launch.shrink_route(x, A, router, None, "ieee")
    one = torch.zeros(1, EXPERTS)
    one[0, 1:3] = 1
    rest = (one, CHOSEN, 1.0, out[:1], layout, half, False)
    triton_decode.forward(x[:1], A, B, *rest)
    # every expert gets a whole number of tiles: rows that pad a tile are no traffic but are FLOPs
    each = torch.eye(EXPERTS)[torch.randperm(T) % EXPERTS]
    kept = x.new_empty(T, triton_sorted.padded_rank(layout))
    triton_sorted.forward(x, A, B, each, 1, 1.0, out, layout, half, False, kept, "ieee")
    triton_sorted.backward(dy, x, A, B, each, 1, kept, 1.0, layout, needs, half, "ieee")


def report(rows: list[tuple[str, int, int, int, int]]) -> str:
    lines = [
        f"T = {T}, d = {D}, E = {EXPERTS}, r = {RANK}, fp16, in the order of the launches.",
        "",
        "| kernel | bytes | ideal | ratio | FLOPs | ideal | ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, used, least, flops, ideal in rows:
        share = f"{flops / ideal:.3f}" if ideal else "-"
        lines.append(
            f"| {name} | {used} | {least} | {used / least:.3f} | {flops} | {ideal} | {share} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="update kernels/README.md")
    arguments = parser.parse_args()
    rows = measure()
    print(report(rows))
    missing = set(KERNELS) - {row[0] for row in rows}
    if missing:
        sys.exit(f"never launched: {', '.join(sorted(missing))}")
    over = [row for row in rows if row[1] > LIMIT * row[2] or row[3] > LIMIT * max(row[4], 1)]
    if over:
        sys.exit(f"above {LIMIT}: {over}")
    if arguments.write:
        text = README.read_text()
        head, rest = text.split(MARKERS[0])
        _, tail = rest.split(MARKERS[1])
        README.write_text(head + MARKERS[0] + report(rows) + MARKERS[1] + tail)


if __name__ == "__main__":
    main()
