"""Labels from a data set's column through an unmodified trainer, and from there to generation."""

import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

import molora

from .routed_twin import tiny_llama
from .trainer_runs import QUIET, tokenizer


def test_a_column_of_modalities_from_training_to_generation(tmp_path):
    rows = {"input_ids": [list(range(5, 25))] * 8, "modality_ids": [[1] * 4 + [0] * 16] * 8}
    trainer = SFTTrainer(
        tiny_llama(),
        SFTConfig(tmp_path, **{**QUIET, "max_steps": 2, "remove_unused_columns": False}),
        train_dataset=Dataset.from_dict(rows),
        processing_class=tokenizer(),
        peft_config=molora.MoloraConfig.from_method("moiie", target_modules=["up_proj"]),
    )
    trainer.data_collator = molora.RoutingLabelCollator(trainer.data_collator, "modality_ids")
    trainer.train()
    prompt = torch.tensor([rows["input_ids"][0][:8]])
    modality = torch.tensor([[1] * 4 + [0] * 4])
    model = trainer.model.eval()
    with molora.routing_labels(model, modality_ids=modality), molora.observe(model) as records:
        model.generate(prompt, max_new_tokens=4, min_new_tokens=4, pad_token_id=0)
    for routing in records.values():
        own = routing.weights[:, :4] > 0  # the first two experts are for text, the next for images
        assert not own[:4, :2].any() and not own[4:, 2:].any()
        assert len(routing.weights) == 8 + 3  # the last token's successor is never read


def test_prompts_of_prompt_completion_data(tmp_path):
    """TRL's labels say where the prompt ends, with nothing else to be done."""
    rows = {"prompt": ["w5 w9 w33 "] * 4 + ["w44 "] * 4, "completion": ["w12 w60", "w7"] * 4}
    config = molora.MoloraConfig.from_method("smear", r=2, target_modules=["up_proj"])
    trainer = SFTTrainer(
        tiny_llama(),
        SFTConfig(tmp_path, **{**QUIET, "max_steps": 2, "per_device_train_batch_size": 4}),
        train_dataset=Dataset.from_dict(rows),
        processing_class=tokenizer(),
        peft_config=config,
    )
    seen = []
    layer = trainer.model.get_base_model().model.layers[0].mlp.up_proj

    def note(module, args):
        given, hidden = module.routing_context.given(), args[0]
        mask = module.routing_context.token_mask("attention_mask", hidden)
        prompt = given.tokens(hidden.shape[:-1], mask, hidden.device, "site").prompt.view(
            given.targets.shape
        )
        seen.append((given.targets, prompt, given.masks["attention_mask"]))

    layer.register_forward_pre_hook(note)
    trainer.train()
    assert len(seen) == 2
    for targets, prompt, real in seen:
        assert torch.equal(prompt, (targets == -100) & real)
        assert set(prompt.sum(-1).tolist()) <= {1, 3}
