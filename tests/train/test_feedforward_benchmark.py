"""The variants compute the same thing, and what a graph keeps is counted."""

import argparse
import sys

import pytest
import torch

from feedforward_benchmark import EXPERTS, RANK, TARGETS, build, main, saved_elements

OPTIONS = argparse.Namespace(features=8, inner=12, device="cpu", dtype=torch.float32)


@pytest.fixture
def variants():
    """The mixture, with the loops' parameters, and both loops."""
    ours, chosen, every = (build(variant, OPTIONS) for variant in ("molora", "chosen", "all"))
    every.load_state_dict(chosen.state_dict())
    layer = ours.base_model.model.mlp
    layer.base_layer.load_state_dict(
        {f"{name}.weight": chosen.model.base_model.model.mlp.get_submodule(name).weight
         for name in TARGETS}
    )  # fmt: skip
    layer.molora_router["default"].weight.data = chosen.router.weight.data
    for name in TARGETS:
        loras = chosen.model.base_model.model.mlp.get_submodule(name)
        experts = layer.molora_experts["default"].linears[name]
        for e in range(EXPERTS):
            rows = slice(e * RANK, (e + 1) * RANK)
            experts.A.data[rows] = loras.lora_A[str(e)].weight
            experts.B.data[:, rows] = loras.lora_B[str(e)].weight
    return ours, chosen, every


def test_the_loops_compute_the_mixture(variants):
    ours, chosen, every = variants
    x = torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(chosen(x), ours(x), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(every(x), ours(x), atol=1e-5, rtol=1e-5)


def test_what_is_saved_is_counted_once():
    linear = torch.nn.Linear(3, 3, bias=False)
    x = torch.randn(5, 3, requires_grad=True)
    assert saved_elements(linear, x) == 15  # x, and not the weight


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_prints_a_line_per_variant(monkeypatch, capsys, dtype: str):
    sizes = ["--tokens", "6", "--features", "8", "--inner", "12", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", ["feedforward_benchmark.py", *sizes, "--device", "cpu"])
    sys.argv += ["--dtype", dtype]
    main()
    lines = capsys.readouterr().out.splitlines()
    assert f"torch.{dtype}" in lines[0]
    assert [line.split()[0] for line in lines[2:]] == ["molora", "lora", "chosen", "all"]
    assert "1.00x" in lines[2]
