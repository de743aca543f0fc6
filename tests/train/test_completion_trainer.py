import pytest
import torch
from trl import SFTConfig, SFTTrainer

from completion_trainer import CompletionTrainer
from data import load_mixture
from molora import MoloraConfig

# TRL 1.16 sets by default what transformers 5.23 has renamed
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated")


def train(trainer_class, tmp_path, model, tokenizer, rows, **settings):
    """Two steps of SGD; the losses, and the adapter's weights after them."""
    torch.manual_seed(0)
    config = MoloraConfig(num_experts=4, top_k=2, r=2, target_modules="all-linear", losses={})
    arguments = SFTConfig(
        output_dir=str(tmp_path / trainer_class.__name__),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=3,
        max_steps=2,
        optim="sgd",
        learning_rate=1.0,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        **settings,
    )
    trainer = trainer_class(
        model=model,
        args=arguments,
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=config,
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    weights = {n: p.detach() for n, p in trainer.model.named_parameters() if p.requires_grad}
    return losses, weights


@pytest.mark.parametrize("steps", [1, 2], ids=["one_batch", "two_batches_accumulated"])
def test_losses_and_gradients_are_those_of_trl(
    steps, tmp_path, tiny_model, tokenizer, write_rows, sums
):
    rows = load_mixture(None, write_rows("sums.jsonl", sums))
    results = [
        train(
            trainer_class,
            tmp_path,
            tiny_model("llama", vocab_size=len(tokenizer), max_position_embeddings=256),
            tokenizer,
            rows,
            gradient_accumulation_steps=steps,
        )
        for trainer_class in (SFTTrainer, CompletionTrainer)
    ]
    (losses, weights), (own_losses, own_weights) = results
    assert own_losses == pytest.approx(losses, rel=1e-5)
    for name, value in weights.items():
        torch.testing.assert_close(own_weights[name], value, rtol=1e-5, atol=1e-6, msg=name)
    assert any(value.abs().max() > 0 for name, value in weights.items() if ".B" in name)
