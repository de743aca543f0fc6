"""Trainers that know nothing of molora: the auxiliary gradient, resuming, reference adapters."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

from .routed_twin import Twin, check_added_gradient, check_difference, routed_llama
from .trainer_runs import BOTH, dpo_trainer, probed, sft_trainer, trainer

PADDING_FREE = {"padding_free": True, "max_length": None}
PACKED = {"packing": True, "max_length": 16}


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("build", [trainer, sft_trainer, dpo_trainer])
def test_the_losses_reach_the_gradient(build, tmp_path: Path, steps: int):
    run = probed(build, tmp_path, gradient_accumulation_steps=steps, max_steps=2)
    probe = check_added_gradient(run, Twin(routed_llama()), BOTH, windows=2)
    assert [len(calls) for calls in probe.windows] == [steps] * 2
    assert not all(call["attention_mask"].all() for calls in probe.windows for call in calls)


@pytest.mark.parametrize("options", [PADDING_FREE, PACKED], ids=["padding-free", "packed"])
def test_sequences_without_padding(tmp_path: Path, options: dict):
    run = probed(sft_trainer, tmp_path, gradient_accumulation_steps=2, max_steps=1, **options)
    probe = check_added_gradient(run, Twin(routed_llama()), BOTH, windows=1)
    assert all(call.get("attention_mask") is None for call in probe.windows[0])


@pytest.mark.parametrize("build", [trainer, sft_trainer])
def test_the_last_window_of_an_epoch_is_shorter(build, tmp_path: Path):
    # 8 batches, 3 at a time
    run = probed(build, tmp_path, gradient_accumulation_steps=3, num_train_epochs=2)
    probe = check_added_gradient(run, Twin(routed_llama()), BOTH, windows=6)
    assert [len(calls) for calls in probe.windows] == [3, 3, 2] * 2


class ScalingTrainer(Trainer):
    """A Trainer with the gradient scaler that mixed precision in fp16 has on an accelerator."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    @staticmethod
    def build(folder: Path, model: Any, callbacks: list, **options: Any) -> Trainer:
        return trainer(folder, model, callbacks, kind=ScalingTrainer, **options)


def test_the_losses_are_scaled_like_the_task(tmp_path: Path):
    """The probe sees scaled gradients, which the optimizer step unscales."""
    run = probed(ScalingTrainer.build, tmp_path, gradient_accumulation_steps=2, max_steps=2)
    twin, with_losses, without = Twin(routed_llama()), run(BOTH), run({})
    for step, calls in enumerate(with_losses.windows):
        scaled = {k: 1024 * v for k, v in twin.gradient(calls, BOTH).items()}
        check_difference(with_losses.gradients[step], without.gradients[step], scaled)
