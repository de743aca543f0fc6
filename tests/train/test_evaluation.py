import json

import pytest
import torch
from peft import get_peft_model

from data import load_mixture
from evaluation import EXTRA_TOKENS, evaluate_model, format_table, generate_answers, main
from molora import MoloraConfig

NEW_TOKENS = 5
PROMPTS = ["a", "what is it?", "abc", "one two three four", "zz", "12 plus 3 is"]


@pytest.fixture
def model(tiny_model, tokenizer, randomize):
    base = tiny_model("llama", vocab_size=len(tokenizer), max_position_embeddings=256)
    config = MoloraConfig(num_experts=4, top_k=2, r=2, target_modules="all-linear")
    return randomize(get_peft_model(base, config)).train()


@torch.no_grad()
def greedy(model, tokenizer, text: str) -> str:
    """One prompt, no cache, no batch."""
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    start = ids.shape[1]
    for _ in range(NEW_TOKENS):
        token = model(input_ids=ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, token], dim=1)
        if token.item() == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids[0, start:], skip_special_tokens=True).strip()


@pytest.mark.parametrize("batch_size", [1, 4, 32])
def test_answers_are_those_of_one_prompt_at_a_time(batch_size, model, tokenizer):
    answers = generate_answers(model, tokenizer, PROMPTS, NEW_TOKENS, batch_size)
    assert model.training  # as it was
    model.eval()
    assert answers == [greedy(model, tokenizer, prompt) for prompt in PROMPTS]
    assert len(set(answers)) > 1


def test_messages_go_through_the_chat_template(model, tokenizer):
    chat = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    answers = generate_answers(model, tokenizer, chat, NEW_TOKENS)
    model.eval()
    texts = [f"user: {prompt}</s>assistant: " for prompt in PROMPTS]
    assert answers == [greedy(model, tokenizer, text) for text in texts]


def test_accuracy_of_a_models_own_answers(model, tokenizer, write_rows):
    # A reference is what the model says, if it stops there; this one may go on, so the reference
    # is made as long as evaluation lets an answer be.
    limit = len("x" * NEW_TOKENS) + EXTRA_TOKENS
    own = generate_answers(model, tokenizer, PROMPTS, limit)
    rows = [{"prompt": p, "completion": "x" * NEW_TOKENS, "task": "x"} for p in PROMPTS]
    mixture = load_mixture(None, write_rows("rows.jsonl", rows))
    scores, answers = evaluate_model(model, tokenizer, mixture)
    assert dict(zip(mixture["prompt"], answers, strict=True)) == dict(
        zip(PROMPTS, own, strict=True)
    )
    assert scores == {"mean": 0.0, "x": 0.0}


def test_the_table_ends_with_the_mean():
    columns = {
        "base": {"mean": 0.1, "sums": 0.2, "a": 0.0},
        "tuned": {"mean": 0.75, "sums": 1, "a": 0.5},
    }
    assert format_table(columns).splitlines() == [
        "exact match, %    base   tuned",
        "sums              20.0   100.0",
        "a                  0.0    50.0",
        "mean              10.0    75.0",
    ]


def test_the_script_writes_its_answers(
    model, model_folder, tokenizer, write_rows, tmp_path, capsys
):
    model.save_pretrained(tmp_path / "adapter")
    data = write_rows("rows.jsonl", [{"prompt": p, "completion": "12345"} for p in PROMPTS])
    output = tmp_path / "out" / "answers.json"
    main(
        ["--model", str(model_folder), "--adapter", str(tmp_path / "adapter"), "--data", data]
        + ["--format", "plain", "--dtype", "float32", "--output", str(output)]
    )
    record = json.loads(output.read_text())
    mixture = load_mixture(None, data)
    assert record["answers"] == generate_answers(model, tokenizer, mixture["prompt"], 9)
    assert record["accuracy"] == {"mean": 0.0, "all": 0.0}
    assert "mean" in capsys.readouterr().out
