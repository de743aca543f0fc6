"""`molora merge | export | report`: what they write, and what they say instead."""

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from molora import MoloraConfig
from molora.cli import main
from molora.cli.models import read_batches, read_tokenizer

WORDS = [f"w{i}" for i in range(60)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny_model, randomize) -> dict[str, Path]:
    """A base model with its tokenizer; a routed, an unrouted and a MixLoRA adapter of it; data."""
    root = tmp_path_factory.mktemp("deploy")
    tiny_model("llama").save_pretrained(root / "base")
    words = {word: number for number, word in enumerate(["<pad>", "<bos>", "<eos>", "?", *WORDS])}
    model = Tokenizer(models.WordLevel(words, unk_token="?"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=model, pad_token="<pad>").save_pretrained(
        root / "base"
    )
    fields = {"target_modules": ["q_proj", "up_proj"], "r": 2, "task_type": "CAUSAL_LM"}
    for name, own in (("routed", {"num_experts": 3}), ("plain", {"num_experts": 1})):
        base = AutoModelForCausalLM.from_pretrained(root / "base")
        randomize(get_peft_model(base, MoloraConfig(**fields, **own))).save_pretrained(root / name)
    base = AutoModelForCausalLM.from_pretrained(root / "base")
    networks = MoloraConfig.from_method("mixlora", r=2, task_type="CAUSAL_LM")
    randomize(get_peft_model(base, networks)).save_pretrained(root / "networks")
    base = AutoModelForCausalLM.from_pretrained(root / "base")
    by_prompt = MoloraConfig.from_method("milora", r=2, task_type="CAUSAL_LM")
    randomize(get_peft_model(base, by_prompt)).save_pretrained(root / "by_prompt")
    generator = torch.Generator().manual_seed(0)
    rows = [
        {"text": " ".join(WORDS[i] for i in torch.randint(60, (9,), generator=generator))}
        for _ in range(10)
    ]
    rows += [{"prompt": "w1 w2", "completion": " w3"}] * 2
    (root / "data.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    return {path.stem: path for path in root.iterdir()}


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main(list(map(str, arguments))) == 0
    return capsys.readouterr().out


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main(list(map(str, arguments))) == 2
    return capsys.readouterr().err


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(3, 20)[None]).logits


def adapted(folders: dict[str, Path], name: str) -> PeftModel:
    base = AutoModelForCausalLM.from_pretrained(folders["base"])
    return PeftModel.from_pretrained(base, folders[name])


def test_merge_writes_a_model_that_needs_nothing_else(capsys, folders, tmp_path):
    output = run(capsys, "merge", "--adapter", folders["plain"], "--output", tmp_path / "merged")
    assert output == f"wrote {tmp_path / 'merged'}, 0.1 MiB\n"
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    expected = logits(adapted(folders, "plain"))
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
    names = {path.name for path in (tmp_path / "merged").iterdir()}
    assert {"model.safetensors", "tokenizer.json", "README.md"} <= names
    card = ModelCard.load(tmp_path / "merged" / "README.md")
    assert card.data.library_name == "transformers" and "Exact: no expert is routed" in card.text


def test_a_routed_adapter_needs_data_and_then_says_how_far_it_is(capsys, folders, tmp_path):
    start = ["merge", "--adapter", folders["routed"], "--output", tmp_path / "merged"]
    assert "routes its experts by token" in refusal(capsys, *start)
    assert not (tmp_path / "merged").exists()
    data = ["--data", folders["data"], "--batch-size", 2]
    said = run(capsys, *start, *data, "--method", "full")
    assert "calibrated by full on" in said and "held-out tokens KL" in said
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "An approximation of token routing: calibrated by full" in card and "KL" in card
    run(capsys, "export", "--adapter", folders["routed"], "--output", tmp_path / "lora", *data,
        "--method", "full")  # fmt: skip
    base = AutoModelForCausalLM.from_pretrained(folders["base"])
    lora = PeftModel.from_pretrained(base, tmp_path / "lora")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(lora), logits(merged), rtol=1e-3, atol=1e-3)


def test_a_prompt_is_merged_and_exported_exactly(capsys, folders, tmp_path):
    prompt, answer = [6, 20, 33], [7, 9]  # w2 w16 w29
    arguments = ["--adapter", folders["by_prompt"], "--prompt", "w2 w16 w29"]
    planned = run(capsys, "export", *arguments, "--output", tmp_path / "lora", "--dry-run")
    assert "one LoRA adapter of rank 2 at most" in planned  # each of 7 experts has its own module
    run(capsys, "export", *arguments, "--output", tmp_path / "lora")
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["r"] == 2
    run(capsys, "merge", *arguments, "--output", tmp_path / "merged")
    ids = torch.tensor([prompt + answer])
    model = adapted(folders, "by_prompt").eval()
    with torch.no_grad():
        expected = model(ids, prompt_mask=torch.tensor([[1, 1, 1, 0, 0]])).logits
    base = AutoModelForCausalLM.from_pretrained(folders["base"])
    lora = PeftModel.from_pretrained(base, tmp_path / "lora").eval()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    for exported in (lora, merged):
        with torch.no_grad():
            torch.testing.assert_close(exported(ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert "Exact: the routing weights of one prompt" in (tmp_path / "lora/README.md").read_text()


@pytest.mark.parametrize(
    ("kind", "written"),
    [("experts", "e2/adapter_model.safetensors"), ("bundle", "routing.json")],
)
def test_export_writes_experts_and_bundles_of_routed_adapters(
    capsys, folders, tmp_path, kind, written
):
    arguments = ["export", "--adapter", folders["routed"], "--output", tmp_path / "out"]
    arguments += ["--format", kind]
    planned = run(capsys, *arguments, "--dry-run")
    assert planned.startswith(f"would write {tmp_path / 'out'}: 3 routed and 0 shared experts")
    assert not (tmp_path / "out").exists()
    run(capsys, *arguments)
    assert (tmp_path / "out" / written).is_file()
    assert "is not an empty folder" in refusal(capsys, *arguments)
    run(capsys, *arguments, "--overwrite")


def test_export_writes_whole_networks_as_a_sparse_model(capsys, folders, tmp_path):
    arguments = ["export", "--adapter", folders["networks"], "--output", tmp_path / "out"]
    arguments += ["--format", "moe"]
    planned = run(capsys, *arguments, "--dry-run")
    run(capsys, *arguments)
    sparse = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    expected = logits(adapted(folders, "networks"))
    torch.testing.assert_close(logits(sparse), expected, rtol=1e-4, atol=1e-4)
    size = sum(4 * parameter.numel() for parameter in sparse.parameters()) / 2**20
    assert f"a MixtralForCausalLM of 8 experts a layer, {size:,.1f} MiB" in planned
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    routed = ["export", "--format", "moe", "--adapter", folders["routed"], "--output", tmp_path]
    assert "routes experts of its own" in refusal(capsys, *routed, "--dry-run")
    assert "--task has no effect" in refusal(capsys, *arguments, "--task", 0)


def test_a_dry_run_tells_the_size_and_what_would_be_refused(capsys, folders, tmp_path):
    plain = ["--adapter", folders["plain"], "--output", tmp_path / "out", "--dry-run"]
    routed = ["--adapter", folders["routed"], "--output", tmp_path / "out", "--dry-run"]
    numbers = 2 * 2 * ((32 + 32) + (32 + 48))  # rank 2 on two modules of two layers, fp32
    expected = f"one LoRA adapter of rank 2 at most, on 4 modules, {4 * numbers / 2**20:,.1f} MiB"
    assert expected in run(capsys, "export", *plain)
    assert "of rank 6 at most" in run(capsys, "export", *routed, "--task", 0)
    assert "the whole model with the adapter folded in" in run(capsys, "merge", *plain)
    for command in ("merge", "export"):
        assert "routes its experts by token" in refusal(capsys, command, *routed)
        assert "give --output" in refusal(capsys, command, *plain[:2])
        assert run(capsys, command, *plain[:2], "--dry-run").startswith("would write ")
    assert not (tmp_path / "out").exists()


def test_report_compares_the_methods(capsys, folders, tmp_path):
    arguments = ["report", "--adapter", folders["routed"], "--data", folders["data"]]
    arguments += ["--batch-size", 2, "--json", tmp_path / "reports.json"]
    lines = run(capsys, *arguments, "--rank", 3).splitlines()
    assert [line.split("|")[1].strip() for line in lines] == [
        "method", "---", "mean", "least_squares", "full", "low_rank, rank 3", "no adapter",
    ]  # fmt: skip
    errors = [float(line.split("|")[2]) for line in lines[2:5]]
    assert errors == sorted(errors, reverse=True)
    reports = json.loads((tmp_path / "reports.json").read_text())
    assert [report["method"] for report in reports] == ["mean", "least_squares", "full", "low_rank"]
    only = run(capsys, *arguments, "--method", "mean").splitlines()
    assert len(only) == 4


@pytest.mark.parametrize("command", ["report", "merge"])
def test_one_batch_leaves_nothing_to_compare_and_says_so(capsys, folders, tmp_path, command):
    arguments = [command, "--adapter", folders["routed"], "--data", folders["data"]]
    arguments += ["--output", tmp_path / "out"] if command == "merge" else []
    said = run(capsys, *arguments, "--rows", 8)
    assert "The logits were not compared: there is one batch" in said
    arguments += ["--overwrite"] if command == "merge" else []
    assert "not compared" not in run(capsys, *arguments, "--rows", 9)


def test_rows_are_drawn_from_the_whole_file(folders):
    tokenizer = read_tokenizer(str(folders["base"]))

    def texts(rows: int | None, shuffle: bool = False) -> list[str]:
        batches = read_batches(str(folders["data"]), tokenizer, 5, 64, rows, shuffle=shuffle)
        return [
            tokenizer.decode(row, skip_special_tokens=True)
            for batch in batches
            for row in batch["input_ids"]
        ]

    every, drawn = texts(None), texts(6)
    assert len(every) == 12 and len(drawn) == 6
    assert drawn == texts(6)
    places = [every.index(text) for text in drawn]
    assert places != sorted(places) and max(places) > 6
    shuffled = texts(None, shuffle=True)
    assert shuffled != every and sorted(shuffled) == sorted(every)
    assert shuffled == texts(None, shuffle=True)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["merge", "--method", "mean"], "--method has no effect without --data"),
        (["merge", "--rows", "4"], "--rows has no effect without --data"),
        (["merge", "--data", "d", "--task", "1"], "--task and --data each say"),
        (["export", "--prompt", "w1", "--task", "1"], "--task and --prompt each say"),
        (["merge", "--prompt", "w1"], "a prompt doesn't fix the routing weights"),
        (["merge", "--data", "d", "--rank", "4"], "--rank goes with --method low_rank"),
        (["merge", "--data", "d", "--method", "mode"], "unknown method 'mode'"),
        (["export", "--format", "bundle", "--task", "1"], "--task has no effect with --format"),
        (["merge", "--task", "1"], "task=1 doesn't fix the routing weights"),
    ],
    ids=str,
)
def test_what_would_have_no_effect_is_refused(capsys, folders, tmp_path, arguments, said):
    rest = ["--adapter", folders["routed"], "--output", tmp_path / "out"]
    assert said in refusal(capsys, *arguments, *rest)


def test_data_and_adapters_that_can_not_be_read(capsys, folders, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"question": 3}\n')
    start = ["report", "--adapter", folders["routed"]]
    assert "needs --data" in refusal(capsys, *start)
    assert "bad.jsonl, line 1: neither" in refusal(capsys, *start, "--data", tmp_path / "bad.jsonl")
    (tmp_path / "empty.jsonl").touch()
    assert "has no rows" in refusal(capsys, *start, "--data", tmp_path / "empty.jsonl")
    for rows in (0, 13):
        said = refusal(capsys, *start, "--data", folders["data"], "--rows", rows)
        assert f"rows={rows} must be from 1 to 12" in said
    MoloraConfig(target_modules=["q_proj"]).save_pretrained(str(tmp_path / "nameless"))
    nameless = ["export", "--adapter", tmp_path / "nameless", "--output", tmp_path / "out"]
    assert "names no base model; give --model" in refusal(capsys, *nameless)
