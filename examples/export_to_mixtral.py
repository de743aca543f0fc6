"""A MixLoRA adapter as a Mixtral: plain transformers generates the same text from it.

    python train/quickstart.py --config configs/sft/quickstart.yaml \
        --method mixlora --adapter '{"r": 8}' --output_dir outputs/mixlora
    python examples/export_to_mixtral.py outputs/mixlora

The folder is a quickstart's result; its `mixtral` is written. A second process, in which molora
can't be imported, loads that and continues one held-out problem of each task, in fp32 as here.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

NEW_TOKENS = 24


@torch.no_grad()
def continuations(model: Any, tokenizer: Any, prompts: list[str]) -> dict[str, Tensor]:
    """For prompt i, the greedy text "ids.i" (T,) and its logits "logits.i" (T, vocabulary)."""
    found = {}
    for i, prompt in enumerate(prompts):
        batch = tokenizer(prompt, return_tensors="pt")
        ids = model.generate(
            **batch, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False
        )
        found[f"ids.{i}"], found[f"logits.{i}"] = ids[0], model(input_ids=ids).logits[0]
    return found


def exported(folder: Path, prompts: list[str]) -> dict[str, Tensor]:
    """`continuations` by transformers alone."""
    sys.modules.update({"molora": None, "molora_kernels": None})  # type: ignore[dict-item]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return continuations(model, AutoTokenizer.from_pretrained(folder), prompts)


def routed(folder: Path, prompts: list[str]) -> dict[str, Tensor]:
    """`continuations` by the base model and the adapter, which is exported besides."""
    # Not above: the second process runs this file without them.
    from peft import PeftModel

    import molora

    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, folder / "adapter").eval()
    molora.export_moe(model, folder / "mixtral", tokenizer, overwrite=True)
    return continuations(model, tokenizer, prompts)


def compare(folder: Path, prompts: list[str]) -> tuple[float, float, list[str]]:
    """The largest difference of a logit, the largest logit, and the texts.

    Raises:
        RuntimeError: the exported model generates another text.
    """
    expected = routed(folder, prompts)
    asked, answered = folder / "prompts.json", folder / "exported.safetensors"
    asked.write_text(json.dumps(prompts))
    command = [sys.executable, __file__, str(folder / "mixtral"), "--alone", str(asked)]
    subprocess.run([*command, "--output", str(answered)], check=True)
    actual = load_file(answered)
    tokenizer = AutoTokenizer.from_pretrained(folder / "mixtral")
    difference, largest, texts = 0.0, 0.0, []
    for i in range(len(prompts)):
        texts.append(tokenizer.decode(expected[f"ids.{i}"]))
        if not torch.equal(actual[f"ids.{i}"], expected[f"ids.{i}"]):
            other = tokenizer.decode(actual[f"ids.{i}"])
            raise RuntimeError(f"the exported model generates {other!r}, not {texts[-1]!r}.")
        logits = expected[f"logits.{i}"]
        difference = max(difference, (actual[f"logits.{i}"] - logits).abs().max().item())
        largest = max(largest, logits.abs().max().item())
    return difference, largest, texts


def prompts_of(data: Path) -> list[str]:
    """The first problem of each task."""
    first: dict[str, str] = {}
    for line in data.read_text().splitlines():
        row = json.loads(line)
        first.setdefault(row["task"], row["prompt"])
    return list(first.values())


def main() -> None:
    parser = argparse.ArgumentParser(description="Export a MixLoRA adapter and compare.")
    parser.add_argument("folder", type=Path, help="a quickstart's result")
    parser.add_argument("--alone", type=Path, help="the second process: JSON of prompts")
    parser.add_argument("--output", type=Path, help="the second process: where its result goes")
    options = parser.parse_args()
    if options.alone is not None:
        save_file(exported(options.folder, json.loads(options.alone.read_text())), options.output)
        return
    prompts = prompts_of(options.folder / "data" / "held_out.jsonl")
    difference, largest, texts = compare(options.folder, prompts)
    print("\n\n".join(texts))
    print(
        f"\n{len(texts)} texts are equal; the logits, up to {largest:.0f}, differ by "
        f"{difference:.1e} at most"
    )


if __name__ == "__main__":
    main()
