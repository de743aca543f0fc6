"""The proofs that need a process of their own: machine code, traffic, launches."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
pytestmark = pytest.mark.kernels
ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "kernels" / "README.md").read_text()


def run(script: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(ROOT / "kernels" / "verify" / script)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return result.stdout


def rows(text: str) -> set[str]:
    return {line for line in text.splitlines() if line.startswith("| ")}


def test_traffic_is_the_ideal_and_the_readme_shows_it():
    assert rows(run("ledger.py")) <= rows(README)


def test_machine_code_keeps_the_rules_and_the_readme_shows_it():
    import triton

    found = rows(run("aot.py"))
    assert len(found) > 8 * 8 * 2
    if f"Triton {triton.__version__}," in README:  # another compiler makes another table
        assert found <= rows(README)


def test_launches_on_fake_tensors_keep_the_rules():
    assert "rank_backward" in run("launch.py")
