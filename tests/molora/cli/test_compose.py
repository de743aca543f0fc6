"""`molora compose`: what it writes, and what it says instead."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import molora
from molora.cli import main
from molora.composition import plan_composition


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny_model) -> dict[str, str]:
    """A base model with its tokenizer, two LoRA adapters that name it, and examples."""
    root = tmp_path_factory.mktemp("compose")
    tiny_model("llama").save_pretrained(root / "base")
    words = {word: i for i, word in enumerate(["<pad>", *(f"w{i}" for i in range(63))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>").save_pretrained(
        root / "base"
    )
    for rank, name in ((2, "one"), (4, "two")):
        config = LoraConfig(
            r=rank, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
        )
        base = AutoModelForCausalLM.from_pretrained(root / "base")
        get_peft_model(base, config).save_pretrained(root / name)
    rows = [{"text": "w3 w4 w5 w3 w4 w5"}, {"prompt": "w3 w4", "completion": " w5 w3"}]
    (root / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (root / "other.jsonl").write_text(json.dumps({"text": "w9 w8 w7"}))
    return {path.stem: str(path) for path in root.iterdir()}


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        ids = torch.arange(3, 20)[None]
        # What some routers ask for, and others leave.
        labels = {"expert_prior": torch.tensor([[0.3, 0.2]]), "prompt_mask": torch.ones_like(ids)}
        return model.eval()(input_ids=ids, **labels).logits


def test_what_it_writes_is_what_compose_makes(folders, tmp_path: Path, capsys):
    adapters = [folders["one"], folders["two"]]
    options = ["--router", "arrow", "--set", "top_k=2", "--set", "temperature=0.5"]
    assert main(["compose", *adapters, *options, "--output", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out == f"wrote {tmp_path / 'out'}\n"
    base = AutoModelForCausalLM.from_pretrained(folders["base"])
    loaded = PeftModel.from_pretrained(base, tmp_path / "out")
    assert loaded.peft_config["default"].base_model_name_or_path == folders["base"]
    again = AutoModelForCausalLM.from_pretrained(folders["base"])
    expected = molora.compose(again, adapters, top_k=2, temperature=0.5)
    assert torch.equal(logits(loaded), logits(expected))


def test_weights_are_fitted_to_data(folders, tmp_path: Path, capsys):
    arguments = ["compose", folders["one"], folders["two"], "--router", "static"]
    arguments += ["--data", folders["data"], "--output", str(tmp_path / "out")]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    weights = config["gate_options"]["weights"]
    assert said.startswith(f"weights: {weights[0]:.4f}, {weights[1]:.4f}\n")
    assert weights != [0.5, 0.5]


@pytest.mark.parametrize("router", ["arrow", "static"])
def test_the_best_are_kept(folders, tmp_path: Path, capsys, router):
    adapters = [folders["one"], folders["two"]]
    arguments = ["compose", *adapters, "--router", router, "--keep", "1"]
    arguments += ["--data", folders["other"], "--output", str(tmp_path / "out")]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    base = AutoModelForCausalLM.from_pretrained(folders["base"])
    row = torch.tensor([[10, 9, 8]])
    batch = {"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row}
    ranking = molora.rank_adapters(base, adapters, [batch], 1)
    assert said.startswith(f"{ranking.table()}\n")
    loaded = PeftModel.from_pretrained(base, tmp_path / "out").peft_config["default"]
    assert loaded.r == {".*": [2 if ranking.kept == [0] else 4]}
    assert ("weights: " in said) == (router == "static")


def test_a_folder_is_replaced_whole_or_not_at_all(folders, tmp_path: Path, capsys):
    output = tmp_path / "out"
    output.mkdir()
    (output / "old").write_text("here before")
    arguments = ["compose", folders["one"], folders["two"], "--output", str(output), "--overwrite"]
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    assert main([*arguments, "--router", "static", "--data", str(empty)]) == 2
    assert "empty.jsonl has no rows" in capsys.readouterr().err
    assert [path.name for path in output.iterdir()] == ["old"]
    assert main(arguments) == 0
    assert not (output / "old").exists() and (output / "adapter_config.json").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.jsonl", "out"]


def test_a_warning_is_one_line(folders, tmp_path: Path, monkeypatch, capsys):
    def plan_with_a_warning(*arguments, **settings):
        warnings.warn("molora: look at this", stacklevel=2)
        return plan_composition(*arguments, **settings)

    monkeypatch.setattr("molora.cli.compose.plan_composition", plan_with_a_warning)
    arguments = ["compose", folders["one"], "--router", "mole", "--dry-run"]
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        assert main(arguments) == 0
    said = capsys.readouterr().err
    assert "\nmolora: look at this\n" in f"\n{said}"
    assert "UserWarning" not in said and "test_compose.py" not in said


def test_rows_are_drawn_of_the_data(folders, tmp_path: Path, capsys):
    def weights(data: str, *more: str) -> str:
        arguments = ["compose", folders["one"], folders["two"], "--router", "static", *more]
        assert main([*arguments, "--data", data, "--output", str(tmp_path / "out")]) == 0
        return capsys.readouterr().out.splitlines()[0]

    alone = []
    for number, row in enumerate(Path(folders["data"]).read_text().splitlines()):
        (tmp_path / f"{number}.jsonl").write_text(row)
        alone.append(weights(str(tmp_path / f"{number}.jsonl"), "--overwrite"))
    assert len({*alone, weights(folders["data"], "--overwrite")}) == 3
    assert weights(folders["data"], "--rows", "1", "--overwrite") in alone


def test_an_adapter_of_another_kind_is_named_as_peft_does(folders, tmp_path: Path, capsys):
    molora.MoloraConfig(target_modules=["q_proj"]).save_pretrained(str(tmp_path / "routed"))
    assert main(["compose", folders["one"], str(tmp_path / "routed"), "--dry-run"]) == 2
    assert "is an adapter of type MOLORA; only LoRA" in capsys.readouterr().err


def test_a_dry_run_writes_nothing(folders, capsys):
    assert main(["compose", folders["one"], folders["two"], "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == f"expert 1: {folders['two']}, 2 of 2 sites, ranks 4"
    assert lines[2] == "router arrow, gate top_k, 2 of 2, mixing linear; total rank of a site: 6"


@pytest.mark.parametrize("router", ["dume", "glider", "phatgoose", "ttmm"])
def test_what_a_router_knows_is_fitted_to_each_adapters_data(folders, tmp_path, router):
    adapters, data = [folders["one"], folders["two"]], [folders["data"], folders["other"]]
    arguments = ["compose", *adapters, "--router", router, "--data", *data]
    assert main([*arguments, "--dry-run"]) == 0
    assert main([*arguments, "--batch-size", "1", "--output", str(tmp_path / "out")]) == 0
    base = AutoModelForCausalLM.from_pretrained(folders["base"])
    loaded = PeftModel.from_pretrained(base, tmp_path / "out")
    base = AutoModelForCausalLM.from_pretrained(folders["base"])
    ids = [[[4, 5, 6, 4, 5, 6], [4, 5, 6, 4]], [[10, 9, 8]]]
    batches = [
        [{"input_ids": torch.tensor([row]), "labels": torch.tensor([row])} for row in rows]
        for rows in ids
    ]
    if router == "ttmm":
        options = {"centroids": molora.fit_centroids(base, batches)}
    elif router == "dume":
        options = {"gates": molora.fit_ridge(base, adapters, batches)}
    else:
        pairs = zip(adapters, batches, strict=True)
        options = {"gates": [molora.fit_gates(base, adapter, given) for adapter, given in pairs]}
    expected = molora.compose(base, adapters, router, **options)
    torch.testing.assert_close(logits(loaded), logits(expected), atol=1e-6, rtol=1e-6)


def test_what_a_router_knows_may_be_given(folders, tmp_path):
    arguments = ["compose", folders["one"], folders["two"], "--router", "ttmm"]
    arguments += ["--set", "centroids=[[1.0, 0.5], [-1, 2]]", "--set", "source=request"]
    assert main([*arguments, "--dry-run"]) == 0
    assert main([*arguments, "--output", str(tmp_path / "out")]) == 0
    base = AutoModelForCausalLM.from_pretrained(folders["base"])
    loaded = PeftModel.from_pretrained(base, tmp_path / "out")
    (centroids,) = [p for n, p in loaded.named_parameters() if "centroids" in n]
    assert centroids.tolist() == [[1.0, 0.5], [-1.0, 2.0]]


@pytest.mark.parametrize("router", ["linear", "lora-mixer", "mole", "x-lora"])
def test_a_router_to_be_trained_says_so(folders, tmp_path, capsys, router):
    arguments = ["compose", folders["one"], folders["two"], "--router", router]
    for option in (["--dry-run"], ["--output", str(tmp_path / "out")]):
        assert main([*arguments, *option]) == 0
        assert "starts at random: train it before use" in capsys.readouterr().out
    for option in (["--dry-run"], ["--output", str(tmp_path / "one")]):  # it has nothing to choose
        assert main(["compose", folders["one"], "--router", router, *option]) == 0
        assert "at random" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give --output"),
        (["--output", "base"], "is not an empty folder"),
        (["--output", "data"], "is not an empty folder"),
        (["--data", "data"], "--router arrow with --mixing linear fits nothing to data"),
        (["--router", "mole", "--data", "data"], "--router mole with --mixing linear fits nothing"),
        (["--router", "ttmm"], "--router ttmm needs --data: a JSONL file for each adapter"),
        (["--router", "static", "--data", "data", "data"], "--data has 2 files; --router static"),
        (["--router", "dume", "--data", "data"], "--data has 1 files; --router dume takes 2"),
        (["--router", "phatgoose", "--dry-run"], "needs --data: a JSONL file for each adapter"),
        (["--router", "static", "--data", "no.jsonl"], "there is no file no.jsonl"),
        (
            ["--router", "static", "--weights", "1", "1", "--data", "data"],
            "--data fits the weights, which are given too",
        ),
        (
            ["--router", "static", "--set", "weights=[1, 1]", "--data", "data"],
            "--data fits the weights, which are given too",
        ),
        (
            ["--router=ttmm", "--set=source=request", "--data", "data", "other", "--output=x"],
            "with source='request' the centroids are of your own encoder",
        ),
        (["--mixing", "feed_forward", "--dry-run"], "use linear, lora-mixer, mole, static"),
        (
            ["--mixing", "feed_forward", "--router", "static", "--data", "data"],
            "--router static with --mixing feed_forward fits nothing",
        ),
        (["--rows", "1"], "--rows has no effect without --data"),
        (
            ["--router=static", "--data", "data", "--rows=3", "--output=x"],
            "rows=3 must be from 1 to",
        ),
        (["--keep", "1"], "--keep needs --data"),
        (["--keep", "1", "--data", "data", "--dry-run"], "--dry-run doesn't"),
        (["--keep", "3", "--data", "data", "--output", "new"], "keep=3 must be from 1 to 2"),
        (["--keep", "1", "--router", "ttmm", "--data", "data", "other"], "molora.rank_adapters"),
        (["--keep", "1", "--weights", "1", "--data", "data"], "--weights can't be given"),
        (["--weights", "1", "1", "--dry-run"], "'arrow' has no option 'weights'; it takes: temp"),
        (["--set", "topk=2", "--dry-run"], "unknown option 'topk'; known: temperature, top_k"),
        (["--set", "top_k", "--dry-run"], "--set 'top_k' is not of the form OPTION=VALUE"),
    ],
)
def test_what_is_refused(folders, capsys, options, message):
    options = [folders.get(option, option) for option in options]
    assert main(["compose", folders["one"], folders["two"], *options]) == 2
    assert message in capsys.readouterr().err
