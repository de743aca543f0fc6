"""Data without a download, and short runs of unmodified trainers with a probe inside."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    DataCollatorForLanguageModeling,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from trl import (
    DistillationConfig,
    DistillationTrainer,
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)

from .routed_twin import VOCABULARY, Losses, Probe, routed_llama, tiny_llama

BOTH = {"load_balancing": 3.0, "z_loss": 0.5}
QUIET: dict[str, Any] = {
    "use_cpu": True,
    "bf16": False,
    "activation_checkpointing": False,
    "report_to": [],
    "disable_tqdm": True,
    "logging_steps": 1,
    "save_strategy": "no",
    "per_device_train_batch_size": 2,
    "seed": 3,
}
# Clipping comes before the probe looks, and later steps can be compared if nothing moves.
AT_REST: dict[str, Any] = {"max_grad_norm": 0.0, "learning_rate": 0.0}


def tokenizer() -> PreTrainedTokenizerFast:
    """One word a token: <pad>, <s>, </s> and w3, w4, ..."""
    words = ["<pad>", "<s>", "</s>"] + [f"w{i}" for i in range(3, VOCABULARY)]
    model = models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>")
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def draw(count: int, seed: int) -> list[list[int]]:
    """Token sequences of 3 to 9 tokens, hardly two of one length."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [3 + (4 * i + seed) % 7 for i in range(count)]
    return [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


def sequences(count: int) -> Dataset:
    """Tokens to continue."""
    return Dataset.from_dict({"input_ids": draw(count, seed=11)})


def texts(count: int, seed: int) -> list[str]:
    """The same in words."""
    # A space behind, or the last word of a prompt and the first of its answer are one.
    return ["".join(f"w{i} " for i in ids) for ids in draw(count, seed)]


def preferences(count: int) -> Dataset:
    """Words, a better and a worse continuation."""
    names = ["prompt", "chosen", "rejected"]
    return Dataset.from_dict({name: texts(count, seed) for seed, name in enumerate(names)})


def trainer(
    folder: Path,
    model: Any,
    callbacks: list[TrainerCallback],
    kind=Trainer,
    evaluate=0,
    **options: Any,
) -> Trainer:
    """transformers' Trainer on padded batches."""
    return kind(
        model,
        TrainingArguments(folder, **{**QUIET, **options}),
        train_dataset=sequences(16),
        eval_dataset=sequences(evaluate) if evaluate else None,
        data_collator=DataCollatorForLanguageModeling(tokenizer(), mlm=False),
        callbacks=callbacks,
    )


def sft_trainer(
    folder: Path, model: Any, callbacks: list[TrainerCallback], peft_config=None, **options: Any
) -> SFTTrainer:
    """TRL's SFTTrainer on the same sequences."""
    return SFTTrainer(
        model,
        SFTConfig(folder, **{**QUIET, **options}),
        train_dataset=sequences(16),
        processing_class=tokenizer(),
        callbacks=callbacks,
        peft_config=peft_config,
    )


def dpo_trainer(
    folder: Path, model: Any, callbacks: list[TrainerCallback], peft_config=None, **options: Any
) -> DPOTrainer:
    """TRL's DPOTrainer."""
    return DPOTrainer(
        model,
        args=DPOConfig(folder, **{**QUIET, **options}),
        train_dataset=preferences(16),
        processing_class=tokenizer(),
        callbacks=callbacks,
        peft_config=peft_config,
    )


def reward_trainer(
    folder: Path, model: Any, callbacks: list[TrainerCallback], peft_config=None, **options: Any
) -> RewardTrainer:
    """TRL's RewardTrainer."""
    return RewardTrainer(
        model,
        args=RewardConfig(folder, **{**QUIET, **options}),
        train_dataset=preferences(16),
        processing_class=tokenizer(),
        callbacks=callbacks,
        peft_config=peft_config,
    )


def grpo_trainer(
    folder: Path, model: Any, callbacks: list[TrainerCallback], peft_config=None, **options: Any
) -> GRPOTrainer:
    """TRL's GRPOTrainer: the length of a completion is its reward, and each is used twice."""
    own = {"max_completion_length": 6, "num_generations": 2, "num_iterations": 2, "beta": 0.1}
    return GRPOTrainer(
        model,
        reward_funcs=lambda completions, **columns: [float(len(text)) for text in completions],
        args=GRPOConfig(folder, **{**QUIET, **own, **options}),
        train_dataset=Dataset.from_dict({"prompt": texts(16, seed=5)}),
        processing_class=tokenizer(),
        callbacks=callbacks,
        peft_config=peft_config,
    )


def distillation_trainer(
    folder: Path,
    model: Any,
    callbacks: list[TrainerCallback],
    kind=DistillationTrainer,
    **options: Any,
) -> DistillationTrainer:
    """TRL's DistillationTrainer, which runs the model without its head."""
    return kind(
        model,
        tiny_llama(),
        args=DistillationConfig(folder, **{**QUIET, "max_completion_length": 6, **options}),
        train_dataset=Dataset.from_dict({"prompt": texts(16, seed=5)}),
        processing_class=tokenizer(),
        callbacks=callbacks,
    )


def runs(build: Callable[..., Trainer], model: PeftModel) -> nn.Module:
    """The part of the base model that such a trainer runs."""
    whole = model.get_base_model()
    return whole.base_model if build is distillation_trainer else whole


def probed(
    build: Callable[..., Trainer],
    folder: Path,
    make: Callable[[Losses], PeftModel] = routed_llama,
    **options: Any,
) -> Callable[[Losses], Probe]:
    """A function that runs such a trainer at rest with those losses and returns its probe."""

    def run(losses: Losses) -> Probe:
        model, probe = make(losses), Probe()
        probe.listen(runs(build, model))
        build(folder, model, [probe], **{**AT_REST, **options}).train()
        return probe

    return run
