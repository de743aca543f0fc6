"""A fingerprint of a base model's weights: to notice an adapter on another base."""

import hashlib

import torch
from peft import PeftModel
from torch import Tensor, nn

SAMPLES = 64


@torch.no_grad()
def base_fingerprint(model: nn.Module) -> str:
    """SHA-256 over name, shape and up to 64 evenly spaced entries of each base parameter.

    The entries are rounded to bf16 first, so that it doesn't depend on the floating-point dtype in
    which a bf16 checkpoint is loaded. Quantised weights go in as they are stored, and differ.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    digest = hashlib.sha256()
    parameters = {
        name.replace(".base_layer.", "."): parameter
        for name, parameter in base.named_parameters()
        if ".molora_" not in name
    }
    for name in sorted(parameters):
        parameter = parameters[name].detach()
        digest.update(f"{name} {tuple(parameter.shape)}\n".encode())
        digest.update(_sample(parameter).numpy().tobytes())
    return digest.hexdigest()


def _sample(parameter: Tensor) -> Tensor:
    flat = parameter.reshape(-1)
    step = max(1, flat.numel() // SAMPLES)
    entries = flat[::step][:SAMPLES].cpu()
    return entries.to(torch.bfloat16).view(torch.int16) if entries.is_floating_point() else entries
