"""How a pair of low-rank factors starts, as LoRA's does (arXiv 2106.09685)."""

import math

from torch import Tensor, nn


def start_down(down: Tensor, init: bool | str, rank: int | None = None) -> None:
    """Fill a down factor (r, d_in) in place: kaiming-uniform (a = sqrt(5)), or with init="gaussian"
    N(0, 1 / r^2); r is `rank` where several experts of that rank are stacked."""
    if init == "gaussian":
        nn.init.normal_(down, std=1 / (rank or down.shape[0]))
    else:
        nn.init.kaiming_uniform_(down, a=math.sqrt(5))


def start_up(up: Tensor, init: bool | str) -> None:
    """Fill an up factor (d_out, r) in place: zeros, or with init=False kaiming-uniform, so that the
    output differs from the base model's."""
    if init is False:
        nn.init.kaiming_uniform_(up, a=math.sqrt(5))
    else:
        nn.init.zeros_(up)
