import pytest

from arguments import AdapterArguments, ModelArguments, TrainingConfig, parse_arguments
from molora import MoloraConfig

# TRL 1.16 sets by default what transformers 5.23 has renamed
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated")

YAML = """
model_name_or_path: some/model
dataset: rows.jsonl
method: loramoe
adapter: {num_experts: 3, lora_dropout: 0.0}
learning_rate: 1.0e-3
use_cpu: true
"""


@pytest.fixture
def yaml(tmp_path):
    def write(text: str) -> list[str]:
        (tmp_path / "run.yaml").write_text(text)
        return ["--config", str(tmp_path / "run.yaml"), "--output_dir", str(tmp_path)]

    return write


def test_a_yaml_names_a_method_and_what_differs(yaml):
    arguments, extra = parse_arguments(yaml(YAML))
    config = arguments.adapter.config()
    assert (config.method, config.gate, config.num_experts) == ("loramoe", "dense", 3)
    assert config.task_type == "CAUSAL_LM"
    assert arguments.training.learning_rate == 1e-3
    assert extra == []


def test_a_flag_overrides_the_yaml(yaml):
    arguments, _ = parse_arguments([*yaml(YAML), "--learning_rate", "0.5", "--method", "mola"])
    assert arguments.training.learning_rate == 0.5
    assert arguments.adapter.method == "mola"
    flags = ["--method", "mola", "--adapter", '{"r": 2}']
    arguments, _ = parse_arguments([*yaml(YAML), *flags])
    config = arguments.adapter.config()
    assert config.r == 2
    assert config.num_experts == MoloraConfig.from_method("mola").num_experts
    assert config.lora_dropout == 0.05  # the file's fields went with its method


@pytest.mark.parametrize(
    ("dtype", "flags"),
    [("float32", (False, False)), ("bfloat16", (True, False)), ("float16", (False, True))],
)
def test_the_dtype_sets_the_trainers_precision(dtype, flags, tmp_path):
    config = TrainingConfig(output_dir=str(tmp_path), dtype=dtype, use_cpu=True)
    assert (config.bf16, config.fp16) == flags


def test_without_a_method_every_linear_layer_gets_experts():
    config = AdapterArguments(adapter={"num_experts": 4}).config()
    assert (config.target_modules, config.num_experts, config.method) == ("all-linear", 4, None)


def test_wrong_values(yaml):
    with pytest.raises(ValueError, match="unknown dtype 'int8'; known dtypes: auto, float32"):
        parse_arguments([*yaml(YAML), "--dtype", "int8"])
    with pytest.raises(ValueError, match="unknown field 'experts_num'; known: .*num_experts,"):
        AdapterArguments(adapter={"experts_num": 4}).config()
    with pytest.raises(ValueError, match="adapter='r=2' is not JSON"):
        AdapterArguments(adapter="r=2")
    with pytest.raises(ValueError, match="must be an object of MoloraConfig's fields"):
        AdapterArguments(adapter="[2]")
    with pytest.raises(ValueError, match="'molly'.*loramoe"):
        AdapterArguments(method="molly").config()
    with pytest.raises(ValueError, match="load_in_4bit and load_in_8bit exclude each other"):
        ModelArguments("m", load_in_4bit=True, load_in_8bit=True)
    with pytest.raises(ValueError, match="--lerning_rate"):
        parse_arguments(yaml(YAML + "lerning_rate: 1\n"))
    with pytest.raises(FileNotFoundError):
        parse_arguments(["--config", "no/such.yaml"])
