"""The worked examples of CONTRIBUTING.md do what the text says."""

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from peft import get_peft_model
from torch import nn

from molora.methods import METHODS
from molora.routers import ROUTERS

from .molora.methods.fidelity import Case

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()


def block(label: str) -> str:
    """The Python block behind the comment `<!-- label -->`."""
    found = re.findall(rf"<!-- {label} -->\n```python\n(.*?)```", TEXT, re.DOTALL)
    assert len(found) == 1
    return found[0]


def load(source: str, name: str, folder: Path) -> ModuleType:
    """Import `source` under `name`, so that its relative imports resolve."""
    path = folder / f"{name.rpartition('.')[2]}.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def router_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """Step 1 done, and undone after the test."""
    with monkeypatch.context() as patch:
        patch.setattr(ROUTERS, "_entries", dict(ROUTERS._entries))
        yield load(block("router"), "molora.routers.distance", tmp_path)


def test_the_example_is_not_in_the_library():
    assert "distance" not in ROUTERS.names()


@pytest.mark.usefixtures("router_file")
def test_the_test_of_the_example_passes(tmp_path: Path):
    torch.manual_seed(0)
    tests = vars(load(block("test"), "test_distance", tmp_path))
    (test,) = [value for name, value in tests.items() if name.startswith("test_")]
    test()


def test_the_config_of_the_example_trains_that_router(router_file: ModuleType, tmp_path: Path):
    config = load(block("use"), "use", tmp_path).config
    torch.manual_seed(0)
    base = nn.Sequential()
    base.add_module("up", nn.Linear(5, 3))
    model = get_peft_model(base, config)
    (router,) = [m for m in model.modules() if isinstance(m, router_file.DistanceRouter)]
    assert (router.init_std, router.temperature, router.num_experts) == (0.5, 0.7, 4)
    experts = [
        p for name, p in model.named_parameters() if p.requires_grad and "center" not in name
    ]
    for parameter in experts:  # away from B = 0, where no router has a gradient
        nn.init.normal_(parameter)
    model(torch.randn(7, 5)).square().sum().backward()
    assert router.centers.grad is not None and router.centers.grad.abs().sum() > 0


@pytest.fixture
def method_file(
    router_file: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[ModuleType]:
    """The method's step 1 done, and undone after the test."""
    with monkeypatch.context() as patch:
        patch.setattr(METHODS, "_entries", dict(METHODS._entries))
        yield load(block("method"), "molora.methods.nearest", tmp_path)


def test_the_method_is_not_in_the_library():
    assert "nearest" not in METHODS.names()


def test_the_method_equals_its_formula(method_file: ModuleType, tmp_path: Path):
    assert method_file.NEAREST is METHODS.get("nearest")
    load(block("method test"), "test_nearest", tmp_path).test_formula(Case)


def test_every_verb_of_the_table_exists():
    makefile = (ROOT / "Makefile").read_text()
    named = set(re.findall(r"^\| `make ([a-z-]+)`", TEXT, re.MULTILINE))
    assert named | {"help", "setup"} == set(re.findall(r"^([a-z-]+):.*##", makefile, re.MULTILINE))
