"""Tile sizes of each kernel: from ``configs/<device>,triton=<version>.json``, else a safe default.

A file maps kernel -> element size in bytes -> list of {"T": tokens, tile sizes, "num_warps",
"num_stages"}, written by ``python kernels/bench/tune.py`` on the device itself. The entry whose T
is nearest in log space is taken.
"""

import json
import math
from functools import lru_cache
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "configs"

# Compiled ahead of time for every architecture of kernels/README.md: no register spills, and shared
# memory within the smallest limit (64 KiB on gfx942, 99 KiB on sm_86, sm_89 and sm_120).
DEFAULTS: dict[str, dict[int, dict[str, int]]] = {
    "shrink": {
        2: {"BT": 64, "BR": 64, "BK": 64, "num_warps": 4, "num_stages": 3},
        4: {"BT": 64, "BR": 64, "BK": 32, "num_warps": 8, "num_stages": 3},
        8: {"BT": 32, "BR": 32, "BK": 16, "num_warps": 4, "num_stages": 2},
    },
    "shrink_route": {
        2: {"BT": 64, "BR": 64, "BK": 64, "num_warps": 8, "num_stages": 2},
        4: {"BT": 64, "BR": 64, "BK": 32, "num_warps": 8, "num_stages": 2},
        8: {"BT": 32, "BR": 32, "BK": 16, "num_warps": 4, "num_stages": 2},
    },
    "expand": {
        2: {"BT": 128, "BN": 128, "BR": 64, "num_warps": 8, "num_stages": 2},
        4: {"BT": 64, "BN": 64, "BR": 32, "num_warps": 8, "num_stages": 2},
        8: {"BT": 32, "BN": 32, "BR": 16, "num_warps": 4, "num_stages": 2},
    },
    "rank_backward": {
        2: {"BT": 64, "BR": 64, "BN": 64, "num_warps": 4, "num_stages": 3},
        4: {"BT": 64, "BR": 64, "BN": 32, "num_warps": 8, "num_stages": 3},
        8: {"BT": 32, "BR": 32, "BN": 16, "num_warps": 4, "num_stages": 2},
    },
    "outer": {
        2: {"BT": 64, "BR": 64, "BN": 128, "num_warps": 4, "num_stages": 3},
        4: {"BT": 32, "BR": 64, "BN": 64, "num_warps": 8, "num_stages": 3},
        8: {"BT": 16, "BR": 32, "BN": 32, "num_warps": 4, "num_stages": 2},
    },
    "sorted_shrink": {
        2: {"BT": 64, "BK": 64, "num_warps": 4, "num_stages": 3},
        4: {"BT": 64, "BK": 32, "num_warps": 8, "num_stages": 3},
        8: {"BT": 32, "BK": 16, "num_warps": 4, "num_stages": 2},
    },
    "sorted_expand": {
        2: {"BT": 64, "BN": 128, "num_warps": 4, "num_stages": 2},
        4: {"BT": 64, "BN": 64, "num_warps": 8, "num_stages": 2},
        8: {"BT": 32, "BN": 32, "num_warps": 4, "num_stages": 2},
    },
    "sorted_rank_backward": {
        2: {"BT": 64, "BN": 64, "num_warps": 4, "num_stages": 3},
        4: {"BT": 64, "BN": 32, "num_warps": 8, "num_stages": 3},
        8: {"BT": 32, "BN": 16, "num_warps": 4, "num_stages": 2},
    },
    "sorted_outer": {
        2: {"BT": 64, "BN": 128, "num_warps": 4, "num_stages": 3},
        4: {"BT": 32, "BN": 64, "num_warps": 8, "num_stages": 3},
        8: {"BT": 16, "BN": 32, "num_warps": 4, "num_stages": 2},
    },
    "decode_shrink": {
        size: {"BK": 256, "SPLIT": 8, "num_warps": 4, "num_stages": 2} for size in (2, 4, 8)
    },
    "decode_expand": {size: {"BN": 64, "num_warps": 4, "num_stages": 1} for size in (2, 4, 8)},
    "add_planes": {
        size: {"BR": 16, "BN": 128, "num_warps": 4, "num_stages": 1} for size in (2, 4, 8)
    },
}


def config_file(device: str, triton_version: str) -> Path:
    return FOLDER / f"{device.replace(' ', '_')},triton={triton_version}.json"


@lru_cache
def _measured(device: str, triton_version: str) -> dict[str, dict[str, list[dict[str, int]]]]:
    path = config_file(device, triton_version)
    return json.loads(path.read_text()) if path.exists() else {}


def tile(
    kernel: str,
    element_size: int,
    tokens: int,
    device: str,
    triton_version: str,
    hip: bool = False,
) -> Any:
    """Keyword arguments of one launch, as a dict that the caller owns."""
    entries = _measured(device, triton_version).get(kernel, {}).get(str(element_size))
    if not entries:
        sizes = dict(DEFAULTS[kernel][element_size])
        if hip:  # a third stage would not fit 64 KiB, and loads go through registers anyway
            sizes["num_stages"] = min(sizes["num_stages"], 2)
        return sizes
    wanted = math.log(max(1, tokens))
    nearest = min(entries, key=lambda entry: abs(math.log(entry["T"]) - wanted))
    return {name: value for name, value in nearest.items() if name != "T"}
