"""Losses that draw random numbers or read experts and routers, inside a checkpointed model."""

import pytest
import torch
from peft import get_peft_model

from molora import MoloraConfig

from ..test_contract import gradients

LOSSES = {
    "expert_router_coupling": 0.1,
    "gate_balance": 0.1,
    "mutual_information": {"coefficient": 0.1, "about": "task"},
    "orthogonality": {"coefficient": 10.0, "max_tokens": 3},
    "renyi_entropy": 0.1,
    "specialization_balance": 0.1,
}


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.filterwarnings("ignore:.*use_reentrant:UserWarning")
def test_checkpointing_changes_no_gradient(tiny_model, tiny_batch, reentrant: bool):
    # Dropout draws behind the losses: it must draw alike when a layer is run again.
    config = MoloraConfig(
        r=2,
        num_experts=3,
        losses=LOSSES,
        lora_dropout=0.2,
        init_lora_weights=False,
        target_modules=["up_proj", "down_proj"],
    )
    model = get_peft_model(tiny_model("llama"), config).train()
    batch = {**tiny_batch("llama"), "routing_task_ids": torch.tensor([0, 1])}
    expected = gradients(model, batch)
    model.enable_input_require_grads()
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    for name, grad in gradients(model, batch).items():
        torch.testing.assert_close(grad, expected[name], atol=1e-6, rtol=1e-5)
