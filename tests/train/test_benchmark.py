import json
import sys

import pytest
from peft import get_peft_model

from benchmark import (
    VARIANTS,
    adapter_config,
    format_results,
    interleaved_medians,
    main,
    parse,
    peak_memory,
)
from models import save_dequantized


def test_both_variants_have_the_same_expert_parameters(tiny_model):
    counts = {}
    for variant in VARIANTS:
        model = get_peft_model(tiny_model("llama"), adapter_config(variant))
        counts[variant] = sum(
            parameter.numel()
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and "router" not in name
        )
    assert counts["lora"] == counts["molora"]


def test_actions_take_turns_and_the_first_round_is_dropped(monkeypatch):
    calls = []
    actions = {name: lambda name=name: calls.append(name) for name in "ab"}
    monkeypatch.setattr("benchmark.time.perf_counter", lambda: float(len(calls) ** 2))
    medians = interleaved_medians(actions, rounds=3, description="")
    assert "".join(calls) == "abababab"
    # call n lasts (n + 1)^2 - n^2 = 2n + 1; a is calls 2, 4, 6 and b is calls 3, 5, 7
    assert medians == {"a": 9, "b": 11}


def test_the_table():
    results = {
        "step": {"lora": 2.0, "molora": 2.5},
        "generation, batch 8": {"lora": 1.0, "molora": 1.1},
        "memory": {"lora": 1000.0, "molora": 1100.4},
    }
    assert format_results(results).splitlines() == [
        "                           LoRA r=64  MoLoRA 8x8  ratio  target",
        "step (s)                       2.000       2.500   1.25    1.25",
        "generation, batch 8 (s)        1.000       1.100   1.10    1.25",
        "memory (MiB)                    1000        1100   1.10    1.15",
    ]


@pytest.fixture
def command_line(model_folder, tmp_path) -> list[str]:
    sizes = ["--batch", "2", "--length", "40", "--new-tokens", "3", "--rounds", "1"]
    model = ["--model", str(model_folder), "--dtype", "float32"]
    return [*model, *sizes, "--output", str(tmp_path)]


def test_the_script_measures_and_writes(command_line, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("benchmark.peak_memory", lambda variant, options: 7.0)
    main(command_line)
    record = json.loads((tmp_path / "float32.json").read_text())
    names = {"step", "generation, batch 1", "generation, batch 2", "memory"}
    assert set(record["results"]) == names
    assert record["options"]["batch"] == 2
    for values in record["results"].values():
        assert all(values[variant] > 0 for variant in VARIANTS)
    assert "MoLoRA 8x8" in capsys.readouterr().out


def test_only_what_is_asked_for_is_measured(command_line, tmp_path):
    main([*command_line, "--measure", "generation"])
    record = json.loads((tmp_path / "float32.json").read_text())
    assert set(record["results"]) == {"generation, batch 1", "generation, batch 2"}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_peak_is_that_of_a_fresh_process(command_line, model_folder, tmp_path):
    ballast = bytearray(2**30)  # of this process, so that no child may count it
    options = parse(command_line)
    save_dequantized(str(model_folder), tmp_path / "base-float32", "float32")
    peak = peak_memory("molora", options)
    assert 100 < peak < 1000  # MiB: Python with torch alone takes more than the first
    assert len(ballast) == 2**30
