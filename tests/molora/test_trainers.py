"""Trainers that know nothing of molora: the auxiliary gradient, resuming, reference adapters."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaForSequenceClassification, Trainer

from .routed_twin import (
    Losses,
    Twin,
    check_added_gradient,
    check_difference,
    ragged_batch,
    routed_llama,
    tiny_config,
    tiny_llama,
)
from .trainer_runs import (
    BOTH,
    dpo_trainer,
    grpo_trainer,
    probed,
    reward_trainer,
    sft_trainer,
    trainer,
)

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


def scoring_llama(losses: Losses | None = None) -> PeftModel:
    """The tiny Llama with a score in place of its vocabulary, adapted."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        base = tiny_llama()
        base.config.num_labels = 1
        scoring = LlamaForSequenceClassification(base.config).double()
        scoring.model = base.model
        config = tiny_config(losses, task_type="SEQ_CLS", modules_to_save=["score"])
        return get_peft_model(scoring, config).train()


def test_a_reward_model(tmp_path: Path):
    options = {"gradient_accumulation_steps": 4, "max_steps": 1}
    run = probed(reward_trainer, tmp_path, scoring_llama, **options)
    check_added_gradient(run, Twin(scoring_llama()), BOTH, windows=1)

    model = scoring_llama(BOTH)
    start = model.get_base_model().score.modules_to_save["default"].weight.detach().clone()
    trained = reward_trainer(tmp_path, model, [], learning_rate=0.05, **options)
    trained.train()
    trained.save_model(str(tmp_path / "saved"))
    saved = PeftModel.from_pretrained(scoring_llama().unload(), tmp_path / "saved").eval()
    with torch.no_grad():
        batch = {name: value for name, value in ragged_batch().items() if name != "labels"}
        assert torch.equal(saved(**batch).logits, model.eval()(**batch).logits)
    assert not torch.equal(saved.get_base_model().score.modules_to_save["default"].weight, start)


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


def adapter(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """A copy of the adapter's parameters."""
    found = {n: p.detach().clone() for n, p in model.named_parameters() if f".{name}." in n}
    assert found
    return found


def check_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


LEARNING = {"learning_rate": 0.05, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}


@pytest.mark.parametrize("build", [trainer, sft_trainer])
def test_a_resumed_run_equals_one_without_a_break(build, tmp_path: Path):
    whole = routed_llama(BOTH)
    build(tmp_path, whole, [], **LEARNING).train()

    resumed, start = routed_llama(BOTH), adapter(routed_llama(BOTH))
    run = build(tmp_path / "again", resumed, [], **LEARNING)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    check_equal(adapter(resumed), adapter(whole))
    assert not any(torch.equal(value, start[name]) for name, value in adapter(resumed).items())
    assert run.state.global_step == 4


def test_the_best_adapter_is_loaded_at_the_end(tmp_path: Path):
    model = routed_llama(BOTH)
    options = {"learning_rate": 2.0, "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    run = trainer(
        tmp_path, model, [], evaluate=4, load_best_model_at_end=True, **{**LEARNING, **options}
    )
    run.train()
    losses = [entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry]
    best = losses.index(min(losses)) + 1
    assert best < 4, "the learning rate is meant to be too large"
    saved = PeftModel.from_pretrained(tiny_llama(), tmp_path / f"checkpoint-{best}")
    check_equal(adapter(model), adapter(saved))


@pytest.mark.parametrize("build", [sft_trainer, dpo_trainer, grpo_trainer])
def test_a_trainer_that_adds_the_adapter_itself(build, tmp_path: Path):
    config = tiny_config(BOTH)
    run = build(tmp_path, tiny_llama(), [], peft_config=config, learning_rate=0.05, max_steps=2)
    start = adapter(run.model)
    run.train()
    assert not any(torch.equal(value, start[name]) for name, value in adapter(run.model).items())

    run.save_model(str(tmp_path / "saved"))
    saved = PeftModel.from_pretrained(tiny_llama(), tmp_path / "saved").eval()
    with torch.no_grad():
        batch = ragged_batch()
        assert torch.equal(saved(**batch).logits, run.model.eval()(**batch).logits)


def test_the_reference_adapter_is_the_policy_before_training(tmp_path: Path):
    model = routed_llama(BOTH)
    start = adapter(model)
    run = dpo_trainer(tmp_path, model, [], learning_rate=0.05, max_steps=2)
    assert set(run.model.peft_config) == {"default", "ref"}

    def reference() -> dict[str, Tensor]:
        found = adapter(run.model, "ref").items()
        return {name.replace(".ref.", ".default."): value for name, value in found}

    check_equal(reference(), start)
    run.train()
    check_equal(reference(), start)
    assert not any(torch.equal(value, start[name]) for name, value in adapter(run.model).items())
    assert [entry["loss"] for entry in run.state.log_history if "loss" in entry][0] == (
        pytest.approx(math.log(2))
    )
