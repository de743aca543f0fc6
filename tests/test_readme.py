"""The README's Python runs as pasted, with no network."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


# What each block prints.
PRINTS = {
    "first page": "trainable parameters in adapters",
    "train": "entropy",
    "labels": "train_loss",
}


@pytest.mark.parametrize(
    "code, prints", list(zip(BLOCKS, PRINTS.values(), strict=True)), ids=PRINTS
)
def test_code_runs(code: str, prints: str, tmp_path: Path):
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert prints in done.stdout
