"""A few rows at a time, so that what is computed on the way needs little memory."""

from collections.abc import Iterator

import torch

# glibc gives large pieces of memory back to the system when they are free, and a CPU then waits for
# new pages: 15000 faults, 25 of 140 ms, in a step over 1024 tokens of 1536 features in bf16, when
# everything between the products was formed for all tokens at once.
ROWS = 256


def row_blocks(rows: int, device: torch.device) -> Iterator[slice]:
    """Slices that cover the rows: `ROWS` each on a CPU, all in one elsewhere or for a compiler."""
    few = device.type == "cpu" and not torch.compiler.is_compiling()
    step = ROWS if few else max(rows, 1)
    for start in range(0, rows, step):
        yield slice(start, start + step)
