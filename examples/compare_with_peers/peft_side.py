"""What PEFT's own layers compute, for compare.py: HydraLoRA put together from them, and X-LoRA."""

from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, XLoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

ALPHA = 6
TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]
RANKS = (2, 4, 3)


def hydralora(d_in: int = 12, d_out: int = 9, experts: int = 4, rank: int = 3) -> dict[str, Tensor]:
    """y = W x + sum over e of softmax(W_r x)_e (alpha / r) B_e A x at one linear layer.

    Every expert is a LoRA of PEFT's that holds the same A, and the layer with that expert alone
    gives its output.
    """
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    torch.manual_seed(0)
    linear = nn.Linear(d_in, d_out)
    base = nn.Sequential()
    base.add_module("up", linear)
    config = LoraConfig(r=rank, lora_alpha=ALPHA, target_modules=["up"])
    model = get_peft_model(base, config, adapter_name="0")
    for e in range(1, experts):
        model.add_adapter(str(e), config)
    A, B = random(rank, d_in), random(experts, d_out, rank)
    W_r, x = random(experts, d_in), random(7, d_in)
    with torch.no_grad():
        frozen = model.base_model.model.up.get_base_layer()
        y = plain = frozen(x)
        for e in range(experts):
            model.set_adapter(str(e))
            layer = model.base_model.model.up
            layer.lora_A[str(e)].weight.copy_(A)
            layer.lora_B[str(e)].weight.copy_(B[e])
            y = y + (x @ W_r.T).softmax(-1)[:, e, None] * (model(x) - plain)
    weight, bias = frozen.weight.detach(), frozen.bias.detach()
    return {"weight": weight, "bias": bias, "A": A, "B": B, "W_r": W_r, "x": x, "output": y}


def write_loras(base: Path, folder: Path) -> list[Path]:
    """LoRA adapters of unequal ranks for that base model, none of them at rest."""
    written = []
    for i, rank in enumerate(RANKS):
        config = LoraConfig(
            r=rank, lora_alpha=ALPHA, target_modules=TARGETS, init_lora_weights=False
        )
        torch.manual_seed(i)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        model.save_pretrained(folder / str(i))
        written.append(folder / str(i))
    return written


@torch.no_grad()
def xlora(
    base: Path, adapters: list[Path], batch: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor], dict[str, tuple[Tensor, Tensor]]]:
    """Logits of PEFT's X-LoRA with a random classifier.

    Returns:
        The logits, the routing weights (T, E) of every adapted module by its name, and its experts'
        A (R, d_in) and B (d_out, R).
    """
    model = AutoModelForCausalLM.from_pretrained(base)
    model.config.use_cache = False
    config = XLoraConfig(
        task_type="CAUSAL_LM",
        hidden_size=model.config.hidden_size,
        adapters={str(i): str(path) for i, path in enumerate(adapters)},
        layerwise_scalings=True,
        xlora_depth=1,
    )
    torch.manual_seed(5)
    peft_model: PeftModel = get_peft_model(model, config).eval()
    for parameter in peft_model.base_model.internal_xlora_classifier.parameters():
        nn.init.normal_(parameter)
    logits = peft_model(**batch).logits
    scalings = peft_model.base_model.get_latest_scalings()  # (batch, sequence, modules, E)
    weights, factors = {}, {}
    layers = [
        (name, module)
        for name, module in peft_model.base_model.lora_model.model.named_modules()
        if hasattr(module, "lora_A")
    ]
    assert len(layers) == scalings.shape[2]
    for i, (name, layer) in enumerate(layers):
        weights[name] = scalings[:, :, i].flatten(0, 1)
        A = torch.cat([layer.lora_A[str(e)].weight for e in range(len(adapters))])
        B = torch.cat([layer.lora_B[str(e)].weight for e in range(len(adapters))], dim=1)
        factors[name] = A, B
    return logits, weights, factors
