"""Every YAML in configs/ is read as its command reads it, and its header says how to run it."""

import re
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser

from molora import MoloraConfig, available_methods

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
ACCELERATE = [path for path in CONFIGS if path.parent.name == "accelerate"]
SFT = [path for path in CONFIGS if path.parent.name == "sft"]
sys.path.insert(0, str(ROOT / "train"))

from arguments import AdapterArguments, parse_arguments  # noqa: E402  train/ is no package
from data import FORMATS, TaskSource  # noqa: E402
from quickstart import QuickstartArguments  # noqa: E402
from reasoning_tasks import make_examples  # noqa: E402

# TRL 1.16 sets by default what transformers 5.23 has renamed
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated")


def named(paths: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("path", paths, ids=lambda path: path.stem)


def header(path: Path) -> str:
    """The comment at the top, as one line."""
    lines = re.match(r"(?:#.*\n)+", path.read_text())
    assert lines is not None, f"{path} has no header"
    return " ".join(line.lstrip("# ").rstrip("\\ ") for line in lines.group().splitlines())


def test_no_file_is_left_out():
    files = {path for path in (ROOT / "configs").rglob("*") if path.is_file()}
    assert files == set(ACCELERATE) | set(SFT)
    names = {path.stem for path in ACCELERATE}
    assert names >= {"cpu", "single_gpu", "multi_gpu", "fsdp2", "zero2", "zero3"}
    assert {path.stem for path in SFT} >= {"quickstart", *available_methods()}


@pytest.mark.parametrize("name", available_methods())
def test_a_method_has_a_file_that_differs_by_what_it_names_alone(name):
    said = yaml.safe_load((ROOT / "configs" / "sft" / f"{name}.yaml").read_text())
    assert said["method"] == name
    built = AdapterArguments(said["method"], said.get("adapter")).config().to_dict()
    published = MoloraConfig.from_method(name).to_dict()
    differs = {key for key in built if built[key] != published[key]}
    assert differs <= {"task_type", *said.get("adapter", {})}


@named(CONFIGS)
def test_the_header_has_the_launch_command(path):
    command = header(path)
    assert "accelerate launch" in command
    assert str(path.relative_to(ROOT)) in command
    for script in re.findall(r"train/\w+\.py", command):
        assert (ROOT / script).is_file()
    for config in re.findall(r"configs/[\w/]+\.yaml", command):
        assert (ROOT / config).is_file()


@named(ACCELERATE)
def test_accelerate_takes_it(path):
    parsed = launch_command_parser().parse_args(["--config_file", str(path), "script.py"])
    arguments, _, precision_given = _validate_launch_command(parsed)
    said = yaml.safe_load(path.read_text())
    assert arguments.num_processes == said["num_processes"]
    assert precision_given  # else accelerate would warn and choose
    kind = said["distributed_type"]
    flags = (arguments.multi_gpu, arguments.use_fsdp, arguments.use_deepspeed)
    assert flags == (kind == "MULTI_GPU", kind == "FSDP", kind == "DEEPSPEED")
    for key, value in {**said.get("fsdp_config", {}), **said.get("deepspeed_config", {})}.items():
        assert str(getattr(arguments, key)).lower() == str(value).lower()


@named(SFT)
def test_the_script_takes_it(path, tmp_path):
    is_quickstart = "train/quickstart.py" in header(path)
    extra = [QuickstartArguments] if is_quickstart else []
    arguments, rest = parse_arguments(["--config", str(path), "--dtype", "float32"], extra)
    arguments.adapter.config()
    data = arguments.data
    assert data.format in FORMATS
    assert (data.tasks is not None) + (data.dataset is not None) == (not is_quickstart)
    named_sources = {**(data.tasks or {}), **({"all": data.dataset} if data.dataset else {})}
    for task, source in named_sources.items():
        TaskSource.parse(task, source)
    for options in rest:
        for task, settings in options.reasoning_tasks.items():
            make_examples(task, settings, options.held_out_examples, seed=0)
    assert arguments.training.output_dir == f"outputs/{path.stem}"


def test_the_quickstart_has_enough_examples_for_its_steps():
    path = ROOT / "configs" / "sft" / "quickstart.yaml"
    arguments, (options,) = parse_arguments(["--config", str(path)], [QuickstartArguments])
    training = arguments.training
    per_step = training.per_device_train_batch_size * training.gradient_accumulation_steps
    seen = training.max_steps * per_step
    assert len(options.reasoning_tasks) >= 5
    assert seen <= len(options.reasoning_tasks) * options.train_examples  # one epoch
