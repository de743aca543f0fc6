"""Checkpoints that moe-peft has written, converted: do both compute the same? For compare.py."""

import json
import tempfile
import warnings
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import molora

Rows = list[tuple[str, str, float, float]]


def compare_converted(folder: Path) -> Rows:
    """Logits of each converted checkpoint, against those of who wrote it and of the loader.

    Args:
        folder: what moe_peft_checkpoints.py wrote into.
    """
    checkpoints, rows = folder / "checkpoints", []
    for name in json.loads((checkpoints / "names.json").read_text()):
        with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
            warnings.filterwarnings("ignore", "molora:", UserWarning)  # what is in the model card
            adapter = molora.convert(checkpoints / name, Path(scratch) / "adapter")
            config = PeftConfig.from_pretrained(str(adapter))
            base = AutoModelForCausalLM.from_pretrained(config.base_model_name_or_path)
            model = PeftModel.from_pretrained(base, str(adapter)).eval()
        for peer in (name, f"{name}-0.2.3"):
            path = checkpoints / f"{peer}.safetensors"
            if path.exists():
                rows.append((peer, "as converted", *_difference(model, path)))
    return rows


@torch.no_grad()
def _difference(model: PeftModel, path: Path) -> tuple[float, float]:
    peer = load_file(path)
    logits = model(input_ids=peer["input_ids"], attention_mask=peer["attention_mask"]).logits
    real = peer["attention_mask"].bool()
    theirs = peer["logits"][real]
    return (logits[real] - theirs).abs().max().item(), theirs.abs().max().item()
