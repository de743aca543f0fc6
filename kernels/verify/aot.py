"""Compile every kernel for every architecture without a GPU and check what came out.

    python kernels/verify/aot.py            # print the table, exit 1 if a kernel breaks a rule
    python kernels/verify/aot.py --write    # and put it into kernels/README.md

The launches are the launcher's at R = 64 (generation: 2 experts of rank 8; sorted: K = 1, ranks up
to 16) with the default tiles and the specialisations that Triton makes of aligned arguments. Rules:
no spills and no stack, shared memory within the architecture's limit, tensor cores for 16-bit
products, asynchronous 16-byte copies in NVIDIA's GEMM loops. Registers and instructions are read
from the machine code with the tools inside the Triton wheel. Compiled kernels are cached in
build/triton (or TRITON_CACHE_DIR).
"""

import argparse
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
os.environ.setdefault("TRITON_CACHE_DIR", str(ROOT / "build" / "triton"))
# Triton 3.10 will change the default; the kernels want fused multiply-add
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
os.environ.pop("TRITON_INTERPRET", None)

import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from molora_kernels import triton_kernels, triton_sorted_kernels  # noqa: E402
from molora_kernels.tiles import DEFAULTS  # noqa: E402

README = ROOT / "kernels" / "README.md"
MARKERS = ("<!-- aot table -->\n", "<!-- end of aot table -->\n")
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
ELEMENT_SIZE = {"bf16": 2, "fp32": 4}


@dataclass(frozen=True)
class Architecture:
    """A target with its limits: bytes of shared memory per program and per processor."""

    name: str
    target: GPUTarget
    shared_limit: int
    shared_total: int
    max_threads: int


def _nvidia(capability: int, limit: int, total: int, threads: int) -> Architecture:
    target = GPUTarget("cuda", capability, 32)
    return Architecture(f"sm_{capability}", target, limit * 1024, total * 1024, threads)


ARCHITECTURES = [
    _nvidia(80, 163, 164, 2048),
    _nvidia(86, 99, 100, 1536),
    _nvidia(89, 99, 100, 1536),
    _nvidia(90, 227, 228, 2048),
    _nvidia(100, 227, 228, 2048),
    _nvidia(120, 99, 100, 1536),
    Architecture("gfx942", GPUTarget("hip", "gfx942", 64), 64 * 1024, 64 * 1024, 2048),
    Architecture("gfx950", GPUTarget("hip", "gfx950", 64), 160 * 1024, 160 * 1024, 2048),
]

SORTED_TABLES = dict.fromkeys(("ORDER", "OFFSET", "EXPERT", "ROW", "START"), "*i32")
# launch -> (kernel, pointers in the operands' dtype, other types, constants, unaligned integers)
LAUNCHES: dict[str, tuple[str, str, dict[str, str], dict[str, Any], tuple[str, ...]]] = {
    "shrink": (
        "shrink",
        "X A U Z",
        {"G": "*fp32", "COLUMN": "*i32", "SCALE": "*fp32"},
        {"GATED": True, "WRITE_U": True, "WRITE_Z": True},
        ("T", "sg"),
    ),
    "shrink_route": (
        "shrink_route",
        "X A U",
        {"ROUTER": "*fp32", "BIAS": "*fp32", "LOGITS": "*fp32"},
        {"BIASED": True, "BE": 16, "ROUTER_PRECISION": "ieee"},
        ("T", "E", "s_logits"),
    ),
    "expand": ("expand", "Z W OUT Y", {}, {"ADD": True, "swr": 1}, ("T",)),
    "expand, dX": ("expand", "Z W OUT Y", {}, {"ADD": False, "swn": 1, "so": 0}, ("T",)),
    "rank_backward": (
        "rank_backward",
        "DY B U DU Z",
        {"G": "*fp32", "COLUMN": "*i32", "SCALE": "*fp32", "DG": "*fp32"},
        {"GATED": True, "WRITE_DU": True, "WRITE_Z": True, "WRITE_DG": True},
        ("T", "sg", "sdg"),
    ),
    "outer": ("outer", "P V", {"W": "*fp32"}, {"swn": 1}, ("T",)),
    "sorted_shrink": (
        "sorted_shrink",
        "X A U Z",
        {**SORTED_TABLES, "WEIGHT": "*fp32", "SCALE": "*fp32"},
        {"SLOTS": 1, "BR": 16},
        ("T", "E", "TILES"),
    ),
    "sorted_expand": (
        "sorted_expand",
        "Z W OUT Y",
        SORTED_TABLES,
        {"SLOTS": 1, "BR": 16, "ADD": True, "swr": 1},
        ("slot", "T", "E", "TILES"),
    ),
    "sorted_rank_backward": (
        "sorted_rank_backward",
        "DY B U DU Z",
        {**SORTED_TABLES, "WEIGHT": "*fp32", "SCALE": "*fp32", "DG": "*fp32"},
        {"SLOTS": 1, "BR": 16},
        ("T", "E", "TILES"),
    ),
    "sorted_outer": (
        "sorted_outer",
        "P V W",
        SORTED_TABLES,
        {"SLOTS": 1, "BR": 16, "swn": 1},
        ("T", "E"),
    ),
    "decode_shrink": (
        "decode_shrink",
        "X A",
        {"CHOSEN": "*i32", "WEIGHT": "*fp32", "SCALE": "*fp32", "Z": "*fp32"},
        {"SLOTS": 2, "R": 8, "BR": 8},
        ("s_chosen",),
    ),
    "decode_expand": (
        "decode_expand",
        "B OUT Y",
        {"CHOSEN": "*i32", "Z": "*fp32"},
        {"SLOTS": 2, "R": 8, "BR": 8, "SPLIT": 8, "ADD": True},
        ("s_chosen",),
    ),
    "add_planes": ("add_planes", "W", {"PLANES": "*fp32"}, {"swn": 1}, ("PLANE_COUNT",)),
}


def source(launch: str, dtype: str, hip: bool) -> tuple[ASTSource, dict[str, int]]:
    """What the launcher would compile, and its options."""
    name, same, other, constants, unaligned = LAUNCHES[launch]
    module = triton_sorted_kernels if name.startswith("sorted") else triton_kernels
    kernel = getattr(module, name)
    tile = dict(DEFAULTS[name][ELEMENT_SIZE[dtype]])
    options = {option: tile.pop(option) for option in ("num_warps", "num_stages")}
    constants = {**constants, **tile, "WIDE": triton.language.float32}
    if launch == "shrink_route" and dtype == "bf16" and not hip:
        constants["ROUTER_PRECISION"] = "tf32x3"
    if "PRECISION" in kernel.arg_names:
        constants["PRECISION"] = "ieee"
    types = {**dict.fromkeys(same.split(), f"*{dtype}"), **other}
    signature = {
        argument: "constexpr" if argument in constants else types.get(argument, "i32")
        for argument in kernel.arg_names
    }
    aligned = {
        (position,): [["tt.divisibility", 16]]
        for position, argument in enumerate(kernel.arg_names)
        if argument not in constants and argument not in unaligned
    }
    return ASTSource(kernel, signature, constexprs=constants, attrs=aligned), options


def count(pattern: str, text: str) -> int:
    return len(re.findall(pattern, text))


def inspect_nvidia(compiled: Any, architecture: Architecture, warps: int) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = [str(TOOLS / "cuobjdump")]
        usage, sass = (
            subprocess.run([*tool, flag, file.name], capture_output=True, text=True, check=True)
            for flag in ("--dump-resource-usage", "-sass")
        )
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage.stdout)
    if found is None:
        raise RuntimeError(f"cuobjdump says nothing of registers: {usage.stdout}")
    registers, stack, local = map(int, found.groups())
    code = sass.stdout
    shared = compiled.metadata.shared
    per_warp = math.ceil(registers * 32 / 256) * 256
    occupancy = min(
        65536 // per_warp // warps,
        architecture.max_threads // (32 * warps),
        architecture.shared_total // (math.ceil((shared + 1024) / 1024) * 1024),
    )
    return {
        "registers": registers,
        "spills": stack + local + count(r"\b(?:LDL|STL)\b", code),
        "occupancy": occupancy,
        "tensor": count(r"\b(?:HMMA|HGMMA|UTC\w*MMA)", code),
        "ffma": count(r"\bFFMA", code),
        "async": count(r"\bLDGSTS\.\S*128", code),
        "wide": count(r"\b(?:LDG|STG)\.\S*128", code),
    }


def inspect_amd(compiled: Any, architecture: Architecture, warps: int) -> dict[str, Any]:
    code = compiled.asm["amdgcn"]

    def field(name: str) -> int:
        found = re.search(rf"\.{name}:\s*(\d+)", code)
        return int(found.group(1)) if found else 0

    registers = field("vgpr_count")
    spills = field("vgpr_spill_count") + field("sgpr_spill_count")
    # 512 vector registers a lane and SIMD, 4 SIMDs: waves, then programs
    waves = 4 * min(8, 512 // (math.ceil(max(registers, 1) / 8) * 8))
    shared = compiled.metadata.shared
    return {
        "registers": registers,
        "spills": spills + field("private_segment_fixed_size"),
        "occupancy": min(waves // warps, architecture.shared_total // max(shared, 1)),
        "tensor": count(r"\bv_mfma_", code),
        "ffma": count(r"\bv_(?:pk_)?fma(?:c|_)", code),
        "async": count(r"\b(?:global|buffer)_load_lds_dwordx4", code),  # gfx950 has them
        "wide": count(r"\b(?:global|buffer)_(?:load|store)(?:_lds)?_dwordx4", code),
    }


def build(launch: str, dtype: str, architecture: Architecture) -> dict[str, Any]:
    hip = architecture.target.backend == "hip"
    kernel_source, options = source(launch, dtype, hip)
    if hip:
        options["num_stages"] = min(options["num_stages"], 2)
    compiled = triton.compile(kernel_source, target=architecture.target, options=options)
    warps = options["num_warps"]
    if architecture.target.backend == "cuda":
        row = inspect_nvidia(compiled, architecture, warps)
    else:
        row = inspect_amd(compiled, architecture, warps)
    return {"launch": launch, "dtype": dtype, "shared": compiled.metadata.shared, **row}


NO_PRODUCTS = ("add_planes", "decode_shrink", "decode_expand")


def faults(row: dict[str, Any], architecture: Architecture) -> list[str]:
    """The rules that the machine code breaks."""
    nvidia = architecture.target.backend == "cuda"
    multiplies = row["launch"] not in NO_PRODUCTS
    loops = multiplies and row["launch"] != "sorted_expand"  # one expert's columns are one block
    broken = {
        "spills registers": row["spills"] > 0,
        "needs too much shared memory": row["shared"] > architecture.shared_limit,
        "no tensor cores": multiplies and row["dtype"] == "bf16" and row["tensor"] == 0,
        "no asynchronous 16-byte copies": loops and nvidia and row["async"] == 0,
        "no 16-byte accesses": multiplies and nvidia and row["wide"] == 0,
    }
    return [fault for fault, is_broken in broken.items() if is_broken]


COLUMNS = {
    "registers": "registers",
    "spills": "spills",
    "shared": "shared memory",
    "occupancy": "programs per processor",
    "tensor": "tensor-core instructions",
    "ffma": "FMA",
    "async": "async 16-byte copies",
    "wide": "16-byte loads and stores",
}


def table(rows: dict[str, list[dict[str, Any]]]) -> str:
    lines = [
        f"Triton {triton.__version__}, R = 64, default tiles.",
        "",
        "| architecture | kernel | dtype | " + " | ".join(COLUMNS.values()) + " |",
        "|---" * (3 + len(COLUMNS)) + "|",
    ]
    for name, found in rows.items():
        for row in found:
            cells = " | ".join(str(row[column]) for column in COLUMNS)
            lines.append(f"| {name} | {row['launch']} | {row['dtype']} | {cells} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="update kernels/README.md")
    parser.add_argument("--only", help="one architecture, such as sm_90")
    arguments = parser.parse_args()
    chosen = [a for a in ARCHITECTURES if arguments.only in (None, a.name)]
    rows: dict[str, list[dict[str, Any]]] = {}
    broken = []
    for architecture in chosen:
        start = time.perf_counter()
        rows[architecture.name] = [
            build(launch, dtype, architecture) for launch in LAUNCHES for dtype in ELEMENT_SIZE
        ]
        for row in rows[architecture.name]:
            where = f"{architecture.name} {row['launch']} {row['dtype']}"
            broken += [f"{where}: {fault} {row}" for fault in faults(row, architecture)]
        print(f"{architecture.name}: {time.perf_counter() - start:.0f} s", file=sys.stderr)
    print(table(rows))
    if broken:
        sys.exit("\n".join(broken))
    if arguments.write:
        text = README.read_text()
        head, rest = text.split(MARKERS[0])
        _, tail = rest.split(MARKERS[1])
        README.write_text(head + MARKERS[0] + table(rows) + MARKERS[1] + tail)


if __name__ == "__main__":
    main()
