"""What is decided before any arithmetic: layout, dtypes and the path that runs."""

import importlib.util
import warnings
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from molora_kernels import rule
from molora_kernels.layout import RankLayout

PRECISIONS = ("ieee", "tf32", "tf32x3")
DISPATCHES = ("auto", "dense", "grouped")
BACKENDS = ("auto", "torch", "triton")
# A row stride that is a multiple of this many elements keeps Triton's alignment hints, without
# which every load is scalar: 255 registers, spills and no asynchronous copies on sm_90.
STRIDE_MULTIPLE = 16


def _native(name: str) -> bool:
    supported = getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported", None)
    return supported is not None and supported()


# asked once, at import: torch.compile can't trace the question
_NATIVE = {torch.bfloat16: _native("bf16"), torch.float16: _native("fp16")}


@dataclass(frozen=True)
class Plan:
    """How one call runs."""

    layout: RankLayout
    compute_dtype: torch.dtype  # of the factors and of U, as autocast or the factors set it
    product_dtype: torch.dtype  # of the GEMMs
    path: str  # "dense", "grouped", "triton", "sorted" or "decode"
    active: int  # K where gate entries of zero are experts that were not chosen, else 0
    precision: str

    @property
    def emulated(self) -> bool:
        """Whether the GEMMs run in a wider dtype than the factors', for want of their own."""
        return self.product_dtype != self.compute_dtype

    def columns_of_u(self, A: Tensor) -> int:
        """Width of the buffer that keeps U: zero where U is formed again."""
        if self.path in ("grouped", "decode"):
            return 0
        if self.path == "dense":
            return A.shape[0]
        if self.path == "sorted":
            from molora_kernels.triton_sorted import padded_rank

            return min(self.active, self.layout.experts) * padded_rank(self.layout)
        return -(-A.shape[0] // STRIDE_MULTIPLE) * STRIDE_MULTIPLE


def make_plan(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    layout: RankLayout,
    active: int | None,
    precision: str,
    dispatch: str,
    backend: str,
    differentiable: bool,
) -> Plan:
    """The plan that the options allow and, where they say "auto", measurements prefer."""
    for name, value, known in (
        ("precision", precision, PRECISIONS),
        ("dispatch", dispatch, DISPATCHES),
        ("backend", backend, BACKENDS),
    ):
        if value not in known:
            raise ValueError(f"unknown {name} {value!r}; known values: {', '.join(known)}")
    compute = compute_dtype(A)
    product = product_dtype(compute, A.device)
    path = _path(x, B, layout, compute, product, active, dispatch, backend)
    if path in ("triton", "sorted"):
        product = compute
    if path == "triton":
        tokens = x.numel() // x.shape[-1]
        if dispatch == "auto" and not differentiable and rule.decodes(layout, active, tokens):
            path = "decode"
    if torch.version.hip is not None:
        precision = "ieee"  # of the three, what every AMD architecture has
    return Plan(layout, compute, product, path, active or 0, precision)


def compute_dtype(A: Tensor) -> torch.dtype:
    """Autocast's dtype where autocast is on, else A's."""
    device = A.device.type
    # like torch's own linear, autocast leaves double precision alone
    if A.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return A.dtype


def product_dtype(compute_dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype in which the GEMMs run: fp32 for 16-bit factors on a CPU that can't multiply them.

    torch then falls back to scalar code: on an AVX2 machine X A^T of 2048 x 576 by 64 x 576 took
    16.8 ms in bf16 and 2.5 ms in fp32.
    """
    if device.type != "cpu" or compute_dtype not in (torch.bfloat16, torch.float16):
        return compute_dtype
    return compute_dtype if _NATIVE[compute_dtype] else torch.float32


def _path(
    x: Tensor,
    B: Tensor,
    layout: RankLayout,
    compute: torch.dtype,
    product: torch.dtype,
    active: int | None,
    dispatch: str,
    backend: str,
) -> str:
    obstacle = rule.can_group(layout, active)
    if dispatch == "grouped":
        if obstacle is not None:
            raise ValueError(f"dispatch='grouped' can't be used: {obstacle}")
        wanted = backend == "triton" or (backend == "auto" and prefers_triton(x, B, compute))
        if not wanted or (backend == "auto" and not rule.can_sort(layout)):
            return "grouped"
        if not rule.can_sort(layout):
            raise ValueError(
                "dispatch='grouped' on backend='triton' needs always_on=0 and ranks of at most "
                f"{rule.LARGEST_SORTED_RANK}, got {list(layout.ranks)}, {layout.always_on}"
            )
        missing = triton_missing(x.device.type, x.device.index)
        if missing is not None:
            raise ValueError(f"backend='triton' can't be used: {missing}")
        return "sorted"
    if backend == "triton":
        missing = triton_missing(x.device.type, x.device.index)
        if missing is not None:
            raise ValueError(f"backend='triton' can't be used: {missing}")
        return "triton"
    if backend == "auto" and prefers_triton(x, B, compute):
        sortable = dispatch == "auto" and obstacle is None and rule.can_sort(layout)
        if sortable and active is not None and rule.sorting_pays(layout, active):
            return "sorted"
        return "triton"
    if dispatch == "auto" and obstacle is None and active is not None:
        return "grouped" if rule.pays(layout, active, x.device, product) else "dense"
    return "dense"


def prefers_triton(x: Tensor, B: Tensor, compute: torch.dtype) -> bool:
    """Whether the kernels run where the caller leaves the choice."""
    if x.device.type != "cuda" or compute == torch.float64:
        return False
    missing = triton_missing(x.device.type, x.device.index)
    if missing is not None:
        _say_once(f"molora_kernels runs on torch's GEMMs: {missing}")
        return False
    return x.shape[-1] % STRIDE_MULTIPLE == 0 and B.shape[0] % STRIDE_MULTIPLE == 0


@torch.compiler.assume_constant_result
def triton_missing(device_type: str, index: int | None) -> str | None:
    """None where the Triton kernels can run on the device, else the reason why not."""
    return _triton_missing(device_type, index)


@lru_cache
def _triton_missing(device_type: str, index: int | None) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    import triton

    if triton.knobs.runtime.interpret:
        return None
    if device_type != "cuda":
        return f"triton has no kernels for {device_type} (TRITON_INTERPRET=1 interprets them)"
    if torch.version.hip is None and torch.cuda.get_device_capability(index) < (8, 0):
        return "the kernels were only compiled for compute capability 8.0 and newer"
    return None


@lru_cache
def _say_once(message: str) -> None:
    warnings.warn(message, stacklevel=2)
