"""How the commands read data and devices."""

import json
from pathlib import Path

import pytest
import torch

from molora.cli import main
from molora.cli.models import read_batches


class Characters:
    """A tokenizer that gives each row its length."""

    def __call__(self, texts: list[str], **options: object) -> dict[str, torch.Tensor]:
        return {"lengths": torch.tensor([len(text) for text in texts])}


def test_rows_in_their_order(tmp_path: Path):
    rows = [{"text": "abc"}, {"prompt": "a", "completion": "bcde"}, {"text": "ab", "other": 1}]
    path = tmp_path / "data.jsonl"
    path.write_text("\n\n".join(map(json.dumps, rows)))
    found = [batch["lengths"].tolist() for batch in read_batches(str(path), Characters(), 2, 64)]
    assert found == [[3, 5], [2]]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("not json", "line 2: not JSON, Expecting value"),
        ('["text"]', "line 2: neither 'text' nor"),
        ("3", "line 2: neither 'text' nor"),
        ('{"prompt": "a"}', "line 2: neither 'text' nor"),
        ('{"text": 3}', "neither 'text' nor 'prompt' and 'completion', as strings"),
        ('{"prompt": "a", "completion": null}', "'completion', as strings"),
        ('{"text": " "}', "line 2: there is no text in it"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line, message):
    path = tmp_path / "data.jsonl"
    path.write_text(f'{{"text": "fine"}}\n{line}\n')
    with pytest.raises(ValueError, match=message):
        read_batches(str(path), Characters(), 2, 64)


@pytest.mark.parametrize(("name", "sizes"), [("batch_size", (0, 64)), ("max_length", (2, 0))])
def test_a_size_is_a_count(tmp_path: Path, name, sizes):
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "fine"}')
    with pytest.raises(ValueError, match=f"{name}=. must be a whole number of at least 1"):
        read_batches(str(path), Characters(), *sizes)


@pytest.mark.parametrize(
    "start", [["compose", "a"], ["extract", "a", "b"], ["merge", "--adapter=a"]]
)
def test_a_device_that_is_not_here(capsys, start):
    with pytest.raises(SystemExit):
        main([*start, "--output", "out", "--device", "gpu0"])
    assert "argument --device: Invalid device string: 'gpu0'" in capsys.readouterr().err
