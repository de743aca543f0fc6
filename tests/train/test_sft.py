"""train/sft.py as it is run: from a YAML, alone and under `accelerate launch`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file

from sft import checkpoint_to_resume, main

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    # TRL 1.16 sets by default what transformers 5.23 has renamed
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated"),
    # torch's loader, which has no accelerator to pin memory for
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true"),
]


@pytest.fixture
def command_line(tmp_path, model_folder, write_rows, sums):
    """`command_line(name, **flags)`: a run of its own output directory, and that directory."""
    data = write_rows("sums.jsonl", sums)
    yaml = tmp_path / "run.yaml"
    yaml.write_text(
        f"""
model_name_or_path: {model_folder}
tasks: {{sums: {data}}}
format: plain
adapter: {{num_experts: 4, top_k: 2, r: 2, losses: {{load_balancing: 0.1, z_loss: 0.01}}}}
routing_report: false
use_cpu: true
dtype: float32
learning_rate: 1.0
optim: sgd
lr_scheduler_type: constant
max_grad_norm: 0.0
logging_steps: 1
disable_tqdm: true
"""
    )

    def build(name: str, **flags) -> tuple[list[str], Path]:
        output = tmp_path / name
        options = {"output_dir": output, **flags}
        return ["--config", str(yaml)] + [
            part for key, value in options.items() for part in (f"--{key}", str(value))
        ], output

    return build


def losses(folder: Path) -> list[float]:
    state = json.loads((folder / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"]]


def assert_same_adapter(first: Path, second: Path, tolerance: float) -> None:
    a, b = (load_file(folder / "adapter_model.safetensors") for folder in (first, second))
    assert a.keys() == b.keys()
    for name, value in a.items():
        torch.testing.assert_close(value, b[name], rtol=0, atol=tolerance, msg=name)


def test_two_processes_equal_one_that_accumulates(command_line):
    one_arguments, one = command_line(
        "one", per_device_train_batch_size=3, gradient_accumulation_steps=2, max_steps=1
    )
    two_arguments, two = command_line("two", per_device_train_batch_size=3, max_steps=1)
    main(one_arguments)
    # `accelerate launch --cpu --num_processes 2` starts one process only in accelerate 1.15
    config = ROOT / "configs" / "accelerate" / "multi_cpu.yaml"
    launch = [str(Path(sys.executable).parent / "accelerate"), "launch"]
    launch += ["--config_file", str(config), "--main_process_port", "0"]
    launch += [str(ROOT / "train" / "sft.py"), *two_arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(launch, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    last = "checkpoint-1"
    assert losses(two / last) == pytest.approx(losses(one / last), abs=1e-5)
    # SGD with learning rate 1: the step is the gradient
    assert_same_adapter(one, two, tolerance=1e-5)


def test_a_resumed_run_equals_one_without_interruption(command_line):
    arguments, output = command_line(
        "run",
        per_device_train_batch_size=2,
        max_steps=4,
        save_steps=2,
        optim="adamw_torch",
        learning_rate=0.01,
    )
    main(arguments)
    uninterrupted = output.with_name("uninterrupted")
    (output / "checkpoint-4").rename(uninterrupted)  # as if it had stopped after step 2
    main([*arguments, "--resume_from_checkpoint", "latest"])
    assert_same_adapter(uninterrupted, output, tolerance=0)
    assert losses(output / "checkpoint-4") == losses(uninterrupted)


def test_the_adapter_loads_on_its_base(command_line):
    arguments, output = command_line("run", per_device_train_batch_size=2, max_steps=1)
    main(arguments)
    model = AutoPeftModelForCausalLM.from_pretrained(output)
    saved = load_file(output / "adapter_model.safetensors")
    assert any(tensor.abs().max() > 0 for name, tensor in saved.items() if name.endswith(".B"))
    assert model.peft_config["default"].num_experts == 4


def test_checkpoints_that_are_not_there(tmp_path):
    assert checkpoint_to_resume(None, str(tmp_path)) is None
    for folder in (str(tmp_path), str(tmp_path / "none"), None):
        with pytest.raises(FileNotFoundError, match="has no checkpoint"):
            checkpoint_to_resume("latest", folder)
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        checkpoint_to_resume("checkpoint-7", str(tmp_path))
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-10").mkdir()
    assert checkpoint_to_resume("latest", str(tmp_path)) == str(tmp_path / "checkpoint-10")
