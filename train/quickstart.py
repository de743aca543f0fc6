"""The whole way on two CPU cores, with no network: fine-tune, evaluate, save, reload, generate.

    accelerate launch --config_file configs/accelerate/cpu.yaml \
        train/quickstart.py --config configs/sft/quickstart.yaml

SmolLM2-135M-Instruct learns a mixture of reasoning_gym's procedural tasks. In the output directory
it leaves evaluation.json (exact match per task before and after), run.json (times and sizes), the
adapter, and the base model as an ordinary folder.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from arguments import Arguments, parse_arguments
from completion_trainer import CompletionTrainer
from data import load_mixture
from evaluation import evaluate_model, format_table
from models import load_model, load_tokenizer, save_dequantized
from reasoning_tasks import make_examples
from sft import build_trainer

ROOT = Path(__file__).resolve().parents[1]
HELD_OUT_SEED_OFFSET = 1_000_000  # far from the training seed, so that no stream of examples meets


@dataclass
class ReasoningArguments:
    """A mixture of procedural tasks, made on the spot."""

    reasoning_tasks: dict[str, Any] = field(
        metadata={"help": "reasoning_gym task -> its settings, as `make_examples` takes them."}
    )
    train_examples: int = field(default=120, metadata={"help": "Training examples per task."})
    held_out_examples: int = field(default=20, metadata={"help": "Held-out examples per task."})
    generation_batch_size: int = field(default=64, metadata={"help": "Prompts per batch."})


@dataclass
class QuickstartArguments(ReasoningArguments):
    """What the quickstart adds to the arguments of train/sft.py."""

    reload_examples: int = field(
        default=16, metadata={"help": "Held-out examples that the reloaded model answers again."}
    )


class Clock:
    """Announces stages and remembers how long each took."""

    def __init__(self) -> None:
        self.start = time.monotonic()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        begin = time.monotonic()
        print(f"\n[{begin - self.start:5.0f} s] {name}", flush=True)
        yield
        self.seconds[name] = round(time.monotonic() - begin, 1)


def write_examples(options: ReasoningArguments, seed: int, folder: Path) -> dict[str, Path]:
    """Write the two splits as JSONL; no prompt is in both.

    Raises:
        ValueError: a task isn't known or has too few different examples.
    """
    splits: dict[str, list[dict[str, str]]] = {"held_out": [], "train": []}
    for task, settings in options.reasoning_tasks.items():
        held_out = make_examples(
            task, settings, options.held_out_examples, seed + HELD_OUT_SEED_OFFSET
        )
        prompts = {row["prompt"] for row in held_out}
        splits["held_out"] += held_out
        splits["train"] += make_examples(task, settings, options.train_examples, seed, prompts)
    check_no_overlap(splits["train"], splits["held_out"])
    folder.mkdir(parents=True, exist_ok=True)
    paths = {name: folder / f"{name}.jsonl" for name in splits}
    for name, rows in splits.items():
        paths[name].write_text("".join(f"{json.dumps(answer_line(row))}\n" for row in rows))
    return paths


def answer_line(row: dict[str, str]) -> dict[str, str]:
    """The row in the fixed template: the question, then a line that the answer completes."""
    return {
        **row,
        "prompt": f"{row['prompt']}\nAnswer:",
        "completion": f" {row['completion']}",
    }


def check_no_overlap(train: list[dict[str, str]], held_out: list[dict[str, str]]) -> None:
    """Raise `ValueError` where a held-out prompt is also a training prompt."""
    common = {row["prompt"] for row in train} & {row["prompt"] for row in held_out}
    if common:
        raise ValueError(f"{len(common)} held-out prompts are also trained on: {min(common)!r}")


def read_split(path: Path) -> Dataset:
    rows = load_mixture(None, str(path))
    assert rows is not None  # only an evaluation part may be missing
    return rows


def answers_of_new_process(base: Path, adapter: Path, data: Path, dtype: str) -> list[str]:
    """Answers of a process that knows only the saved base, the saved adapter and the prompts."""
    output = data.with_name("reloaded.json")
    command = [sys.executable, str(ROOT / "train" / "evaluation.py")]
    command += ["--model", str(base), "--adapter", str(adapter), "--data", str(data)]
    command += ["--format", "plain", "--dtype", dtype, "--output", str(output)]
    subprocess.run(command, check=True)
    return json.loads(output.read_text())["answers"]


def run(arguments: Arguments, options: QuickstartArguments) -> dict[str, dict[str, float]]:
    """Everything; returns what evaluation.json holds.

    Raises:
        RuntimeError: the reloaded adapter answers otherwise than the one that was trained.
    """
    clock, training = Clock(), arguments.training
    output = Path(training.output_dir or "outputs/quickstart")
    base_folder, adapter_folder = output / "base", output / "adapter"
    print(
        f"{arguments.model.model_name_or_path} in {training.dtype} on {torch.get_num_threads()} "
        f"threads, {training.max_steps} steps of "
        f"{training.per_device_train_batch_size * training.gradient_accumulation_steps} examples"
    )
    with clock.stage("Making examples"):
        paths = write_examples(options, training.seed, output / "data")
        held_out = read_split(paths["held_out"])
    with clock.stage("Reading the base model"):
        save_dequantized(arguments.model.model_name_or_path, base_folder, training.dtype)
        arguments.model.model_name_or_path = str(base_folder)
        arguments.data.dataset = str(paths["train"])
        tokenizer = load_tokenizer(str(base_folder))
        model = load_model(str(base_folder), training.dtype)
    size = options.generation_batch_size
    with clock.stage("Evaluating the base model"):
        base_scores, _ = evaluate_model(model, tokenizer, held_out, size, "Base model")
    with clock.stage("Training"):
        trainer = build_trainer(arguments, model, CompletionTrainer)
        trainer.train()
        trainer.save_model(str(adapter_folder))
    with clock.stage("Evaluating the tuned model"):
        tuned_scores, _ = evaluate_model(trainer.model, tokenizer, held_out, size, "Tuned model")
    with clock.stage("Reloading the adapter in a new process"):
        again = output / "data" / "reload.jsonl"
        lines = paths["held_out"].read_text().splitlines(keepends=True)
        step = max(1, len(lines) // options.reload_examples)
        again.write_text("".join(lines[::step][: options.reload_examples]))
        reloaded = answers_of_new_process(base_folder, adapter_folder, again, training.dtype)
        _, answers = evaluate_model(trainer.model, tokenizer, read_split(again), 32, "Same prompts")
        if reloaded != answers:
            raise RuntimeError(f"the reloaded adapter answers {reloaded}, before it was {answers}.")
        print(f"The reloaded adapter gives the same {len(answers)} answers.")
    scores = {"base": base_scores, "tuned": tuned_scores}
    print(f"\n{format_table(scores)}")
    write_results(output, scores, clock, arguments, trainer.model)
    return scores


def write_results(
    output: Path,
    scores: dict[str, dict[str, float]],
    clock: Clock,
    arguments: Arguments,
    model: Any,
) -> None:
    """evaluation.json and run.json."""
    trainable, total = model.get_nb_trainable_parameters()
    facts = {
        "dtype": arguments.training.dtype,
        "threads": torch.get_num_threads(),
        "steps": arguments.training.max_steps,
        "trainable_parameters": trainable,
        "all_parameters": total,
        "seconds": {**clock.seconds, "total": round(time.monotonic() - clock.start, 1)},
    }
    for name, value in (("evaluation.json", scores), ("run.json", facts)):
        (output / name).write_text(json.dumps(value, indent=2) + "\n")
    gain = 100 * (scores["tuned"]["mean"] - scores["base"]["mean"])
    print(
        f"\nMean exact match +{gain:.1f} points in {facts['seconds']['total'] / 60:.1f} minutes. "
        f"Results: {output / 'evaluation.json'}; adapter: {output / 'adapter'}"
    )


def main() -> None:
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise SystemExit("train/quickstart.py runs in one process; for more use train/sft.py.")
    arguments, (options,) = parse_arguments(extra=[QuickstartArguments])
    run(arguments, options)


if __name__ == "__main__":
    main()
