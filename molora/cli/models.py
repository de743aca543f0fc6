"""Base models, adapters and data, as the commands read them."""

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..architecture import architecture
from ..config_checks import check_count

DTYPES = ("auto", "float32", "bfloat16", "float16")


def device(text: str) -> str:
    """The name of a device that is here, for `add_argument(type=...)`."""
    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(str(error).splitlines()[0]) from error
    return text


def full_model(source: str, dtype: str, device: str) -> nn.Module:
    """The model with its weights; a GGUF file is dequantised."""
    import transformers

    cls, _ = architecture(source)
    path = Path(source)
    options: dict[str, Any] = {}
    if path.suffix == ".gguf":
        source = str(path.parent)
        options["gguf_file"] = path.name
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    chosen = dtype if dtype == "auto" else getattr(torch, dtype)
    model: nn.Module = cls.from_pretrained(source, dtype=chosen, **options)
    if path.suffix == ".gguf" and dtype != "auto":  # the reader leaves its own dtype
        model = model.to(chosen)
    return model.to(device)


def read_tokenizer(source: str) -> Any:
    """The model's tokenizer, with a padding token."""
    import transformers

    path = Path(source)
    if path.suffix == ".gguf":
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            str(path.parent), gguf_file=path.name
        )
    else:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def read_batches(
    path: str,
    tokenizer: Any,
    batch_size: int,
    max_length: int,
    rows: int | None = None,
    *,
    shuffle: bool = False,
) -> list[dict[str, Tensor]]:
    """Padded batches of a JSONL file, whose rows have `text`, or `prompt` and `completion`.

    Args:
        path: the file.
        tokenizer: has a padding token.
        batch_size: rows of a batch.
        max_length: tokens of a row; what is longer is cut.
        rows: draw that many at random, the same ones each time; None: all, in the file's order.
        shuffle: with all rows too, an order drawn at random, the same each time. Files are often
            sorted by task, and then no batch stands for the others.

    Raises:
        ValueError: a row has neither or no text, there are none or too few, or a number is no
            count.
    """
    check_count(1)("batch_size", batch_size)
    check_count(1)("max_length", max_length)
    texts = list(_texts(Path(path)))
    if not texts:
        raise ValueError(f"{path} has no rows.")
    if shuffle and rows is None:
        rows = len(texts)
    if rows is not None:
        if not 1 <= rows <= len(texts):
            raise ValueError(f"rows={rows} must be from 1 to {len(texts)}, the rows of {path}.")
        texts = random.Random(0).sample(texts, rows)
    return [
        dict(
            tokenizer(
                texts[start : start + batch_size],
                return_tensors="pt",
                padding=True,
                truncation=True,
                max_length=max_length,
            )
        )
        for start in range(0, len(texts), batch_size)
    ]


def _texts(path: Path) -> Iterator[str]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON, {error}.") from error
        row = row if isinstance(row, dict) else {}
        fields = ("text",) if "text" in row else ("prompt", "completion")
        if not all(isinstance(row.get(field), str) for field in fields):
            raise ValueError(
                f"{path}, line {number}: neither 'text' nor 'prompt' and 'completion', as strings."
            )
        text = "".join(row[field] for field in fields)
        if not text.strip():
            raise ValueError(f"{path}, line {number}: there is no text in it.")
        yield text
