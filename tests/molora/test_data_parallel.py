"""Threads that share one model's routing decisions are refused."""

import pytest
import torch
from peft import get_peft_model
from torch import nn

from molora import MoloraConfig


def test_a_replica_of_data_parallel_is_refused():
    model = get_peft_model(
        nn.Sequential(nn.Linear(4, 4)), MoloraConfig(target_modules=["0"], num_experts=3)
    )
    layer = model.base_model.model[0]._replicate_for_data_parallel()
    with pytest.raises(RuntimeError, match="one process per device"):
        layer(torch.zeros(2, 4))
