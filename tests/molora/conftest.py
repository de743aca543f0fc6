"""Hypothesis, saved LoRA adapters, and models routed by prompt, for every module of these tests."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from peft import LoraConfig, get_peft_model

from molora import MoloraConfig

# No deadline: a loaded machine is no failure. Derandomised: a run that passed passes again.
settings.register_profile("molora", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("molora")


@pytest.fixture(scope="session")
def save_loras() -> Callable[..., list[str]]:
    """`save_loras(base, specs, root)`: folders of LoRA adapters of `base()`, one for each spec."""

    def save(base: Callable[[], Any], specs: Sequence[dict[str, Any]], root: Path) -> list[str]:
        for i, spec in enumerate(specs):
            torch.manual_seed(i)
            config = LoraConfig(init_lora_weights=False, task_type="CAUSAL_LM", **spec)
            model = get_peft_model(base(), config, autocast_adapter_dtype=False)
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.data = 0.5 * torch.randn_like(parameter)
            model.save_pretrained(root / str(i))
        return [str(root / str(i)) for i in range(len(specs))]

    return save


@pytest.fixture
def build_by_prompt(tiny_model, randomize) -> Callable[..., Any]:
    """`build_by_prompt(method, **fields)`: a tiny Llama whose decisions differ by the prompt."""

    def make(method: str, **fields: Any) -> Any:
        config = MoloraConfig.from_method(method, r=2, task_type="CAUSAL_LM", **fields)
        model = randomize(get_peft_model(tiny_model("llama"), config).eval())
        for key, parameter in model.named_parameters():
            if "molora_router" in key:
                parameter.data *= 20
        return model

    return make
