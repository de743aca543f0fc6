"""When the tokens of each expert are worth gathering.

The dense form multiplies every token by all R columns; the grouped form by the columns of the
experts that the token chose, at the price of gathering and scattering rows of x and y. Both compute
the same sums, so this is a matter of time only.

CPU, GEMMs in fp32: from routed / K = 128 on grouped took 0.21 to 0.95 of the dense time in all of
44 cases (T = 2048, d = 576 and 2048, fp32 and bf16 rows, R = 128 to 512, K = 1 to 4, forward and
backward, 1 thread of an AVX2 machine); at 64 it took 0.74 to 1.27, at 32 1.28 to 2.02.
``python kernels/bench/run.py --sweep`` repeats it.
CPUs with native 16-bit GEMMs multiply so much faster than they copy that dense stays.
"""

import torch

from molora_kernels.layout import RankLayout

CPU_COLUMNS_PER_ACTIVE_EXPERT = 128
# A GPU has not been measured. A roofline of an H100 in bf16 (600 TFLOP/s on such shapes, 3 TB/s)
# puts equality at R = 230, 590 and 1160 for K = 1, 2 and 4, nearly independent of T, d and r.
GPU_COLUMNS_PER_ACTIVE_EXPERT = 300
LARGEST_SORTED_RANK = 64  # an expert's columns are one tile of registers


def can_group(layout: RankLayout, active: int | None) -> str | None:
    """None, or the reason why the grouped form can't be used."""
    if layout.tied is not None:
        return f"tied={layout.tied!r}: experts that share a factor share its columns"
    if layout.experts == 0:
        return "there is no routed expert"
    if active is None:
        return (
            "it gives no gradient to gate entries that are zero; "
            "pass active=K to say that they are experts which were not chosen"
        )
    return None


def decodes(layout: RankLayout, active: int | None, tokens: int) -> bool:
    """Whether a GPU should read the chosen experts' factors only, token by token.

    Generation moves little but the factors: all R columns of them, or K of E experts' for each of
    T tokens. From T K = E / 2 on, tokens share most experts and the dense form reads each once.
    """
    if active is None or layout.tied is not None or layout.always_on or layout.rank is None:
        return False
    return 0 < 2 * tokens * active <= layout.experts


def can_sort(layout: RankLayout) -> bool:
    """Whether the kernels over sorted tokens take the layout."""
    return layout.always_on == 0 and max(layout.ranks, default=0) in range(
        1, LARGEST_SORTED_RANK + 1
    )


def sorting_pays(layout: RankLayout, active: int) -> bool:
    """Whether a GPU is predicted to gain from sorting tokens by expert."""
    return layout.routed >= GPU_COLUMNS_PER_ACTIVE_EXPERT * active


def pays(layout: RankLayout, active: int, device: torch.device, product: torch.dtype) -> bool:
    """Whether the grouped form is the faster one, by the measurements above."""
    if device.type != "cpu" or product in (torch.bfloat16, torch.float16):
        return False
    return layout.routed >= CPU_COLUMNS_PER_ACTIVE_EXPERT * active
