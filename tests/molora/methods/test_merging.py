"""For every method: merged exactly, calibrated and bundled, or refused with the reason."""

import importlib.util
import warnings
from pathlib import Path

import pytest
import torch

import molora
from molora import available_methods
from molora.layer import adapted_layers

from .test_all_methods import batch_for, build  # noqa: F401  # fixtures

every_method = pytest.mark.parametrize("name", available_methods())
CLOSE = {"rtol": 1e-3, "atol": 1e-3}
# What their experts make of a token isn't linear in it, or not a sum over experts.
NOT_LINEAR = ("can't be written as LoRA factors", "which no LoRA on a linear module equals")


@pytest.fixture(scope="module")
def read_bundle():
    """The reader that knows nothing of this library, as a module."""
    path = Path(__file__).resolve().parents[3] / "examples" / "read_bundle.py"
    spec = importlib.util.spec_from_file_location("read_bundle", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def weights_of(model) -> list[torch.Tensor]:
    layers = adapted_layers(model).values()
    return [p.detach().clone() for layer in layers for p in layer.get_base_layer().parameters()]


@every_method
def test_merging_is_exact_or_refused(name, build, batch_for, logits_of):  # noqa: F811
    model, batch = build(name), batch_for(name)
    expected, before = logits_of(model, batch), weights_of(model)
    layers = adapted_layers(model).values()
    if all(layer.static_mixture("default") is not None for layer in layers):
        model.merge_adapter(safe_merge=True)
        torch.testing.assert_close(logits_of(model, batch), expected, **CLOSE)
        model.unmerge_adapter()
    else:
        with pytest.raises(ValueError, match="'default'"):
            model.merge_adapter()
    assert all(map(torch.equal, weights_of(model), before))
    assert torch.equal(logits_of(model, batch), expected)


@every_method
def test_calibrating_gives_what_is_merged_or_is_refused(name, build, batch_for, logits_of):  # noqa: F811
    model, batch = build(name), batch_for(name)
    try:
        report = molora.calibrate(model, [batch] * 2, "full", progress=False)
    except ValueError as error:
        said = (*NOT_LINEAR, "routes nothing by token")
        assert any(part in str(error) for part in said), error
        return
    assert all(0 <= site.relative_error <= 1 + 1e-6 for site in report.sites)
    with molora.static_routing(model):
        expected = logits_of(model, batch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        model.merge_adapter()
    torch.testing.assert_close(logits_of(model, batch), expected, **CLOSE)


@every_method
def test_a_bundle_is_faithful_or_refused(name, build, tmp_path, read_bundle):  # noqa: F811
    model = build(name)
    try:
        molora.export_bundle(model, tmp_path / "bundle")
    except ValueError as error:
        said = (*NOT_LINEAR, "for a bundle", "routes nothing; molora.export_lora writes it exactly")
        assert any(part in str(error) for part in said), error
        return
    assert read_bundle.check(tmp_path / "bundle") == len(adapted_layers(model))
