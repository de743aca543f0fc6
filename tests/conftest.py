"""Tiny random models, made here without a download, and what every test module needs of them."""

import os

# Before torch and transformers are imported: nothing may ask the network, and one thread is the
# fastest for models of this size.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from peft import get_peft_model
from torch import Tensor, nn

import molora  # noqa: F401  # registers the tuner with PEFT
from molora.layer import MoloraLayer

VOCABULARY = 64
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA = {**TEXT, "intermediate_size": 48, "num_key_value_heads": 2}
# (model class, config class, config fields)
TINY = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", LLAMA),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**LLAMA, "head_dim": 8}),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", {**LLAMA, "head_dim": 8}),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {**TEXT, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    ),
    "opt": (
        "OPTForCausalLM",
        "OPTConfig",
        {**TEXT, "ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0},
    ),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "vocab_size": VOCABULARY,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 2,
            "num_heads": 4,
            "feed_forward_proj": "gated-gelu",
            "dropout_rate": 0.0,
            "decoder_start_token_id": 0,
            "pad_token_id": 0,
            "eos_token_id": 2,
        },
    ),
    "bert": (
        "BertForSequenceClassification",
        "BertConfig",
        {
            **TEXT,
            "intermediate_size": 48,
            "num_labels": 3,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        },
    ),
    "vit": (
        "ViTForImageClassification",
        "ViTConfig",
        {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 48,
            "image_size": 8,
            "patch_size": 4,
            "num_labels": 3,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        },
    ),
}


# Warnings of the libraries about each other, which neither we nor a user can act upon.
FOREIGN_WARNINGS = (
    # PEFT 0.21 reads a name that transformers 5.23 has renamed
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
)


def pytest_configure(config: pytest.Config) -> None:
    for line in FOREIGN_WARNINGS:
        config.addinivalue_line("filterwarnings", line)


class MLP(nn.Module):
    """A plain module: no config, no layers that transformers knows."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(10, 32)
        self.middle = nn.Linear(32, 32)
        self.down = nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.middle(self.up(x).relu()).relu())


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., Any]:
    """`tiny_model("llama", seed=0, **config_fields)`: a new random model in eval mode."""

    def build(name: str, seed: int = 0, **fields: Any) -> Any:
        torch.manual_seed(seed)
        if name == "mlp":
            return MLP().eval()
        model_class, config_class, defaults = TINY[name]
        config = getattr(transformers, config_class)(**{**defaults, **fields})
        return getattr(transformers, model_class)(config).eval()

    return build


@pytest.fixture(scope="session")
def tiny_batch() -> Callable[[str], dict[str, Tensor]]:
    """`tiny_batch("llama")`: two padded examples with labels, as keyword arguments of the model."""

    def build(name: str) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(1)
        if name == "mlp":
            return {"x": torch.randn(6, 10, generator=generator)}
        if name == "vit":
            pixels = torch.randn(2, 3, 8, 8, generator=generator)
            return {"pixel_values": pixels, "labels": torch.tensor([0, 2])}
        ids = torch.randint(3, VOCABULARY, (2, 7), generator=generator)
        mask = torch.ones_like(ids)
        mask[1, 5:] = 0
        ids = torch.where(mask.bool(), ids, 0)
        batch = {"input_ids": ids, "attention_mask": mask}
        if name == "bert":
            return {**batch, "labels": torch.tensor([0, 2])}
        if name == "t5":
            labels = torch.randint(3, VOCABULARY, (2, 5), generator=generator)
            labels[1, 3:] = -100
            return {**batch, "labels": labels}
        return {**batch, "labels": ids.masked_fill(mask == 0, -100)}

    return build


@pytest.fixture(scope="session")
def randomize() -> Callable[..., Any]:
    """`randomize(model, seed=0)`: experts and routers that all do something; returns the model."""

    def fill(model: Any, seed: int = 0) -> Any:
        generator = torch.Generator().manual_seed(seed)
        for layer in model.modules():
            if not isinstance(layer, MoloraLayer):
                continue
            for part in (layer.molora_experts, layer.molora_router, layer.molora_gate):
                for parameter in part.parameters():
                    values = torch.randn(parameter.shape, generator=generator)
                    parameter.data.copy_(0.3 * values)
        return model

    return fill


@pytest.fixture(scope="session")
def logits_of() -> Callable[..., Tensor]:
    """`logits_of(model, batch)`: what the model computes, without gradients."""

    @torch.no_grad()
    def compute(model: Any, batch: dict[str, Tensor], **kwargs: Any) -> Tensor:
        output = model(**batch, **kwargs)
        return output if isinstance(output, Tensor) else output.logits

    return compute


@pytest.fixture
def build(tiny_model, randomize) -> Callable[..., Any]:
    """`build(case, **config_fields)`: a tiny Llama with that adapter, every part of it random."""

    def make(case: Any, **overrides: Any) -> Any:
        return randomize(get_peft_model(tiny_model("llama"), case.config(**overrides)).eval())

    return make
