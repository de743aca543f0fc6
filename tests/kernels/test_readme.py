"""The example on the package's front page runs."""

import re
from pathlib import Path

README = Path(__file__).resolve().parents[2] / "kernels" / "README.md"


def test_example():
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    names = {}
    exec(code, names)
    assert names["y"].shape == (10, 48)
