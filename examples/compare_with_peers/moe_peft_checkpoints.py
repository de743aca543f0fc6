"""Checkpoints as moe-peft saves them, and its logits, for converted.py; runs in its environment.

    python moe_peft_checkpoints.py FOLDER

For each of its methods, `checkpoints/NAME/` is what its own trainer would write, with random
weights, and `NAME.safetensors` beside it the logits. mixlora 0.2.3, the authors' loader, reads the
first one.
"""

import json
import sys
from pathlib import Path

import torch
import transformers
from mixlora import MixLoraModelForCausalLM
from moe_peft import LLMModel
from moe_peft.adapters import lora_config_factory
from moe_peft.tasks import CasualTask
from moe_peft.trainer import TrainConfig, save_adapter_weight
from moe_peft_side import ATTENTION, COMMON, FEED_FORWARD, NO_DROPOUT, batch, run
from safetensors.torch import save_file

ALL = {**COMMON, "target_modules": ATTENTION + FEED_FORWARD, "bias": "none"}
MIXLORA = {**ALL, "peft_type": "MIXLORA", "jitter_noise": 0.0}
# Experts of another rank and scaling than attention's.
EXPERT_LORA = {"r": 2, "lora_alpha": 5, "lora_dropout": NO_DROPOUT, "use_rslora": True}
CHECKPOINTS = {
    "mixlora": {**MIXLORA, "routing_strategy": "mixlora", "top_k": 2},
    "mixlora-expert-lora": {
        **MIXLORA, "routing_strategy": "mixlora", "top_k": 3, "expert_lora": EXPERT_LORA,
    },
    "mixlora-dynamic": {
        **MIXLORA, "routing_strategy": "mixlora-dynamic", "top_p": 0.6, "temperature": 0.0,
    },
    "mixlora-switch": {**MIXLORA, "routing_strategy": "mixlora-switch", "expert_capacity": 32},
    "mola": {**ALL, "peft_type": "MOLA", "top_k": 2},
    "loramoe": {**ALL, "peft_type": "LORAMOE"},
}  # fmt: skip
SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "attn_implementation": "eager",
}
# MixLoRA on other base models: what their configuration needs, and the targets.
LLAMA_LIKE = ATTENTION + FEED_FORWARD
FAMILIES = {
    "Gemma": ({"head_dim": 8}, LLAMA_LIKE),
    "Mistral": ({"sliding_window": None}, LLAMA_LIKE),
    "Phi3": ({}, ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]),
    "Qwen2": ({}, LLAMA_LIKE),
}


def save(base: Path, folder: Path, name: str, fields: dict) -> None:
    """An adapter with random weights, saved by moe-peft, and what it computes."""
    model = LLMModel.from_pretrained(str(base), device="cpu", load_dtype=torch.float32)
    config = lora_config_factory(fields)
    config.adapter_name = name
    model.init_adapter(config)
    model.eval()
    generator = torch.Generator().manual_seed(4)
    for weight in model.get_adapter_weight_dict(name).values():
        weight.data = 0.3 * torch.randn(weight.shape, generator=generator)
    save_adapter_weight(model, TrainConfig(adapter_name=name, task_=CasualTask()), str(folder))
    inputs = batch()
    with torch.no_grad():
        logits = run(model, name, inputs).logits
    save_file({**inputs, "logits": logits.contiguous()}, folder / f"{name}.safetensors")


def save_family(folder: Path, family: str, fields: dict, targets: list[str]) -> str:
    """MixLoRA on a tiny random model of another family; the checkpoint's name."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SMALL, **fields)
    base = folder / f"base-{family}"
    getattr(transformers, f"{family}ForCausalLM")(config).save_pretrained(base)
    name = f"mixlora-{family}"
    save(base, folder, name, {**CHECKPOINTS["mixlora"], "target_modules": targets})
    return name


def read_with_mixlora(folder: Path) -> None:
    """What the authors' inference package makes of the file."""
    model, _ = MixLoraModelForCausalLM.from_pretrained(
        str(folder / "mixlora"), torch_dtype=torch.float32
    )
    model.eval()
    for layer in model.model.layers:  # its experts stand in plain dicts, out of reach of eval()
        for moe in layer.mlp.mixlora_moes.values():
            for expert in moe.experts_.values():
                expert.eval()
    inputs = batch()
    with torch.no_grad():
        logits = model(**inputs).logits
    save_file({**inputs, "logits": logits}, folder / "mixlora-0.2.3.safetensors")


def main(folder: Path) -> None:
    checkpoints = folder / "checkpoints"
    checkpoints.mkdir(exist_ok=True)
    for name, fields in CHECKPOINTS.items():
        save(folder / "base", checkpoints, name, fields)
    read_with_mixlora(checkpoints)
    others = [save_family(checkpoints, family, *its) for family, its in FAMILIES.items()]
    (checkpoints / "names.json").write_text(json.dumps([*CHECKPOINTS, *others]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
