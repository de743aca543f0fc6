"""What moe-peft computes, for compare.py; runs in an environment of its own.

    python moe_peft_side.py FOLDER

Writes into FOLDER a tiny random Llama (`base/`), and for each method a safetensors file with the
adapter's weights, the batch, the logits, and the gradient of sum(logits * probe) by every weight.
"""

import sys
from pathlib import Path

import moe_peft
import torch
from moe_peft import AdapterConfig, LLMBatchConfig, LLMModel, LLMModelInput
from moe_peft.adapters import LoraMoeConfig, MolaConfig
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
FEED_FORWARD = ["gate_proj", "up_proj", "down_proj"]
# moe-peft asserts that lora_dropout > 0, and its experts, which stand in plain dicts, are never put
# into evaluation mode. At this rate no element of the batch is dropped, and 1 / (1 - p) is 1.
NO_DROPOUT = 1e-12
COMMON = {"r": 3, "lora_alpha": 6, "lora_dropout": NO_DROPOUT, "num_experts": 4}
METHODS = {
    "mola": (MolaConfig, {"top_k": 2, "target_modules": ATTENTION + FEED_FORWARD}),
    "loramoe": (LoraMoeConfig, {"target_modules": FEED_FORWARD}),
}


def save_base(folder: Path) -> None:
    """A Llama of two layers, always the same."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        attn_implementation="eager",
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def batch() -> dict[str, torch.Tensor]:
    """Two sequences, the second one padded on the right."""
    ids = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(9) < torch.tensor([[9], [6]])
    return {"input_ids": ids * mask, "attention_mask": mask.long()}


def run(model: LLMModel, name: str, inputs: dict[str, torch.Tensor]) -> moe_peft.LLMModelOutput:
    """One forward pass of the adapter over the whole batch, with its own losses."""
    arguments = LLMModelInput(
        batch_configs_=[LLMBatchConfig(name, 0, len(inputs["input_ids"]))],
        batch_tokens_=inputs["input_ids"].tolist(),
        batch_labels_=inputs["input_ids"].tolist(),
        batch_masks_=inputs["attention_mask"].tolist(),
    )
    (output,) = model.forward(arguments)
    return output


def base_logits(base: Path) -> dict[str, torch.Tensor]:
    """The batch and the logits without any expert: what differs there isn't the experts' doing."""
    model = LLMModel.from_pretrained(str(base), device="cpu", load_dtype=torch.float32)
    model.init_adapter(AdapterConfig(adapter_name="none"))
    inputs = batch()
    with torch.no_grad():
        return {**inputs, "logits": run(model, "none", inputs).logits}


def results(base: Path, name: str, dropout: float = NO_DROPOUT) -> dict[str, torch.Tensor]:
    """Weights, batch, logits and gradients of one method."""
    model = LLMModel.from_pretrained(str(base), device="cpu", load_dtype=torch.float32)
    config_class, options = METHODS[name]
    options = {**COMMON, **options, "lora_dropout": dropout}
    config = config_class.from_config({"name": name, "router_loss": True, **options}).check()
    model.init_adapter(config)
    model.eval()
    weights = model.get_adapter_weight_dict(name)
    generator = torch.Generator().manual_seed(2)
    for weight in weights.values():
        weight.data = 0.3 * torch.randn(weight.shape, generator=generator)
        weight.requires_grad_()
    inputs = batch()
    output = run(model, name, inputs)
    probe = torch.randn(output.logits.shape, generator=generator)
    probe *= inputs["attention_mask"][..., None]
    (output.logits * probe).sum().backward()
    found = {f"weight {key}": weight.detach() for key, weight in weights.items()}
    found |= {f"gradient {key}": weight.grad for key, weight in weights.items()}
    found |= {**inputs, "probe": probe, "logits": output.logits.detach()}
    if output.aux_loss is not None:
        found["balance loss"] = output.aux_loss.detach() / config.router_aux_loss_coef_
    return {key: value.contiguous() for key, value in found.items()}


def main(folder: Path) -> None:
    base = folder / "base"
    save_base(base)
    save_file(base_logits(base), folder / "base.safetensors")
    for name in METHODS:
        save_file(results(base, name), folder / f"{name}.safetensors")
    torch.manual_seed(3)
    first, second = (results(base, "mola", dropout=0.5)["logits"] for _ in range(2))
    save_file({"difference": (first - second).abs().max()}, folder / "dropout.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
