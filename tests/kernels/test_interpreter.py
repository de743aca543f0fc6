"""Runs tests/kernels/interpreted in a process where Triton interprets its kernels."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
FOLDER = Path(__file__).parent / "interpreted"


def interpreted(selection: str) -> None:
    # without the conftest files: loading transformers takes longer than the tests
    command = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-m", selection, str(FOLDER)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert " passed" in result.stdout


def test_every_kernel_once():
    interpreted("not kernels")


@pytest.mark.kernels
def test_every_kernel_dtype_layout_and_shape():
    interpreted("kernels")
