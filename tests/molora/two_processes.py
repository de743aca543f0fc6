"""Starts two processes that run a module of these tests and leave files."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run_two_processes(module: str, folder: Path) -> None:
    """Run `-m module folder` in two processes on the CPU that know of each other."""
    # `accelerate launch --cpu --num_processes 2` would start one process only, unless under MPI.
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(
        [sys.executable, *launch, "--module", module, str(folder)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-6000:]
