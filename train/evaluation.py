"""Exact match per task of a model, with or without an adapter, by greedy generation.

    python train/evaluation.py --model MODEL --data held_out.jsonl --output answers.json
    python train/evaluation.py --model MODEL --adapter outputs/mola --data held_out.jsonl

The data has the columns that train/sft.py reads: `prompt`, `completion` and, optionally, `task`.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import evaluate
import torch
from peft import PeftModel
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

import molora  # noqa: F401  registers MOLORA, so that PEFT can read the adapter
from data import apply_format, load_mixture
from models import choose_dtype, load_model, load_tokenizer

METRICS = Path(__file__).parent / "metrics"
EXTRA_TOKENS = 4  # beyond the longest reference, so that a longer answer is seen to be longer


@torch.no_grad()
def generate_answers(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Any],
    max_new_tokens: int,
    batch_size: int = 32,
    description: str = "Generating",
) -> list[str]:
    """Greedy answers, in the prompts' order, generated with the KV cache.

    Args:
        prompts: text, or lists of messages for the tokenizer's chat template.
        max_new_tokens: longest answer.
        batch_size: prompts per batch; prompts of like length share a batch.
    """
    texts = [
        prompt
        if isinstance(prompt, str)
        else tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        for prompt in prompts
    ]
    chat = bool(texts) and not isinstance(prompts[0], str)
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    device = next(model.parameters()).device
    answers = [""] * len(texts)
    was_training = model.training
    model.eval()
    with tqdm(total=len(texts), desc=description, unit="example") as progress:
        for start in range(0, len(order), batch_size):
            indices = order[start : start + batch_size]
            batch = tokenizer(
                [texts[i] for i in indices],
                return_tensors="pt",
                padding=True,
                padding_side="left",
                add_special_tokens=not chat,  # the template has written its own
            ).to(device)
            output = model.generate(
                **batch,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                use_cache=True,
                pad_token_id=tokenizer.pad_token_id,
            )
            new = output[:, batch["input_ids"].shape[1] :]
            for i, text in zip(
                indices, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True
            ):
                answers[i] = text.strip()
            progress.update(len(indices))
    model.train(was_training)
    return answers


def reference_text(completion: Any) -> str:
    """The text of a completion, which is text or one message."""
    return completion if isinstance(completion, str) else completion[0]["content"]


def exact_match(
    predictions: Sequence[str], references: Sequence[str], tasks: Sequence[str]
) -> dict[str, float]:
    """Accuracy in 0..1 for each task, and "mean", in which each task counts once."""
    metric = evaluate.load(str(METRICS / "exact_match"), keep_in_memory=True)
    return metric.compute(predictions=predictions, references=references, tasks=tasks)


def evaluate_model(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: Any,
    batch_size: int = 32,
    description: str = "Generating",
) -> tuple[dict[str, float], list[str]]:
    """Accuracies and answers on `rows`, which have the columns prompt, completion and task."""
    references = [reference_text(completion) for completion in rows["completion"]]
    longest = max(len(ids) for ids in tokenizer(references, add_special_tokens=False)["input_ids"])
    answers = generate_answers(
        model, tokenizer, rows["prompt"], longest + EXTRA_TOKENS, batch_size, description
    )
    return exact_match(answers, references, rows["task"]), answers


def format_table(columns: Mapping[str, Mapping[str, float]]) -> str:
    """A line per task, the mean last, in percent; a column per model."""
    first = next(iter(columns.values()))
    tasks = [*(task for task in first if task != "mean"), "mean"]
    title = "exact match, %"
    width = max(map(len, [title, *tasks]))
    lines = [f"{title:<{width}}  " + "  ".join(f"{name:>6}" for name in columns)]
    for task in tasks:
        values = (scores[task] for scores in columns.values())
        lines.append(f"{task:<{width}}  " + "  ".join(f"{100 * v:6.1f}" for v in values))
    return "\n".join(lines)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Exact match per task by greedy generation.")
    parser.add_argument("--model", required=True, help="Hub name, folder or GGUF file")
    parser.add_argument("--adapter", help="folder of an adapter on it")
    parser.add_argument("--data", required=True, help="file, folder or dataset of the Hub")
    parser.add_argument("--split", default="train")
    parser.add_argument("--only-tasks", nargs="+", metavar="TASK")
    parser.add_argument("--format", default="auto", help="auto, chat or plain")
    parser.add_argument("--system-prompt")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--output", type=Path, help="write accuracies and answers to this JSON")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = _parse(arguments)
    tokenizer = load_tokenizer(options.model)
    source = {"path": options.data, "split": options.split}
    rows = load_mixture(None, source, only_tasks=options.only_tasks)
    assert rows is not None  # only the evaluation part may be missing
    rows = apply_format(rows, options.format, tokenizer.chat_template, options.system_prompt)
    model: Any = load_model(options.model, choose_dtype(options.dtype))
    if options.adapter is not None:
        model = PeftModel.from_pretrained(model, options.adapter)
    if torch.cuda.is_available():
        model.to("cuda")
    scores, answers = evaluate_model(model, tokenizer, rows, options.batch_size)
    print(format_table({"model": scores}))
    if options.output is not None:
        record = {"accuracy": scores, "tasks": rows["task"][:], "answers": answers}
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
