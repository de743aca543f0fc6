"""The comparisons of examples/compare_with_peers that need no other environment than this one."""

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from molora.routers import ROUTERS

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "compare_with_peers"


@pytest.fixture(scope="module")
def compare() -> Iterator[ModuleType]:
    """The script; the router that it registers is gone afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        patch.setattr(ROUTERS, "_entries", dict(ROUTERS._entries))
        yield importlib.import_module("compare")


def test_hydralora_equals_its_formula_over_pefts_layers(compare):
    ((_, _, difference, size),) = compare.compare_hydralora()
    assert size > 1 and difference < 1e-5 * size


def test_a_mixture_by_given_weights_equals_pefts_xlora(
    compare, tiny_model, tiny_batch, tmp_path: Path
):
    tiny_model("llama").save_pretrained(tmp_path / "base")
    batch = {key: tiny_batch("llama")[key] for key in ("input_ids", "attention_mask")}
    ((_, _, difference, size),) = compare.compare_xlora(
        tmp_path / "base", tmp_path / "loras", batch
    )
    assert size > 0.1 and difference < 1e-5 * size
