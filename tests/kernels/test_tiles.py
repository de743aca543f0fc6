"""Tiles come from the device's file, nearest T in log space, and from safe defaults elsewhere."""

import json

import pytest

from molora_kernels import tiles


@pytest.fixture
def measured(tmp_path, monkeypatch):
    monkeypatch.setattr(tiles, "FOLDER", tmp_path)
    tiles._measured.cache_clear()
    entries = [{"T": 16, "BT": 16, "num_warps": 2}, {"T": 4096, "BT": 128, "num_warps": 8}]
    tiles.config_file("Some GPU", "3.9.0").write_text(json.dumps({"shrink": {"2": entries}}))
    yield
    tiles._measured.cache_clear()


@pytest.mark.parametrize("tokens, block", [(0, 16), (1, 16), (200, 16), (300, 128), (10**6, 128)])
def test_nearest_tokens_in_log_space(measured, tokens, block):
    sizes = tiles.tile("shrink", 2, tokens, "Some GPU", "3.9.0")
    assert sizes["BT"] == block
    assert "T" not in sizes


@pytest.mark.parametrize(
    "kernel, size, device, version",
    [
        ("shrink", 4, "Some GPU", "3.9.0"),
        ("expand", 2, "Some GPU", "3.9.0"),
        ("shrink", 2, "Other GPU", "3.9.0"),
        ("shrink", 2, "Some GPU", "3.8.0"),
    ],
)
def test_what_was_not_measured_gets_the_default(measured, kernel, size, device, version):
    sizes = tiles.tile(kernel, size, 100, device, version)
    assert sizes == tiles.DEFAULTS[kernel][size]
    sizes.clear()
    assert tiles.DEFAULTS[kernel][size], "the caller may change what it gets"
