"""Methods side by side: the same data, the same training, and adapters of equal size.

    python train/compare_methods.py --config configs/sft/quickstart.yaml
    python train/compare_methods.py --config configs/sft/quickstart.yaml \
        --methods lora mola hydralora --seeds 0 1 2 --output_dir outputs/comparison

Each method trains on what the YAML of configs/sft names and then answers its evaluation part by
greedy generation; the table has the exact match of each. `own` is the YAML's own adapter. The first
method's size is the measure: the ranks of the others are chosen to come near to it. The output
directory gets comparison.json, after each run, and every adapter.

All methods train alike. A method's best learning rate may be another one, so sweep --learning_rate
before you conclude anything from a difference.
"""

import json
import statistics
import time
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import get_peft_model
from trl import SFTTrainer

from arguments import AdapterArguments, Arguments, parse_arguments
from completion_trainer import CompletionTrainer
from evaluation import evaluate_model, generate_answers
from models import locate_model, save_dequantized
from quickstart import ReasoningArguments, write_examples
from rank_matching import SizedConfig, match_rank, sized
from sft import build_trainer, load_base, load_data, load_run_tokenizer
from task_ids import readers

OWN = "own"


@dataclass
class CompareArguments(ReasoningArguments):
    """What the comparison adds to the arguments of train/sft.py."""

    reasoning_tasks: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "As in train/quickstart.py, instead of `dataset`, `tasks`."},
    )
    methods: list[str] = field(
        default_factory=lambda: [OWN, "lora"],
        metadata={"help": "Published methods (`molora methods`); 'own': the file's own adapter."},
    )
    equal_size: bool = field(
        default=True,
        metadata={
            "help": "Choose ranks by which all have as many trainable parameters as the first; "
            "else each has its own rank."
        },
    )
    seeds: list[int] = field(
        default_factory=lambda: [0], metadata={"help": "One training of each method per seed."}
    )

    def __post_init__(self) -> None:
        for name in ("methods", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name}={values!r} must name one or more, each once.")


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        parameters: trainable ones, routers included.
        minutes: of training.
        accuracy: exact match in 0..1 for each task, and "mean".
    """

    method: str
    seed: int
    r: Any
    parameters: int
    minutes: float
    accuracy: dict[str, float]


def prepare(arguments: Arguments, options: CompareArguments) -> Dataset:
    """Make what the runs have in common, and return the examples to evaluate on.

    Raises:
        ValueError: there is nothing to evaluate on.
    """
    model, data, training = arguments.model, arguments.data, arguments.training
    training.output_dir = training.output_dir or "outputs/comparison"
    output = Path(training.output_dir)
    if options.reasoning_tasks:
        paths = write_examples(options, training.seed, output / "data")
        data.dataset = {"path": str(paths["train"]), "eval_path": str(paths["held_out"])}
    if locate_model(model.model_name_or_path).gguf_file is not None:  # slow to read for each run
        save_dequantized(model.model_name_or_path, output / "base", training.dtype)
        model.model_name_or_path = str(output / "base")
    _, rows = load_data(arguments, load_run_tokenizer(arguments))
    if rows is None:
        raise ValueError(
            "the data has no part to evaluate on; set eval_split or eval_path in `dataset` or "
            "`tasks`."
        )
    return rows


def adapters_of(arguments: Arguments, options: CompareArguments) -> dict[str, SizedConfig]:
    """The methods' configurations, of equal size if that is asked for.

    Raises:
        ValueError: there is no such method, its size can't be set, or it reads the task of each
            example, which generation doesn't know.
    """
    model = arguments.model.model_name_or_path
    found: dict[str, SizedConfig] = {}
    for method in options.methods:
        own = arguments.adapter if method == OWN else AdapterArguments(method=method)
        config = own.config()
        if labels := readers(config):
            raise ValueError(f"{method!r} can't be compared: {', '.join(labels)} reads task_ids.")
        if found and options.equal_size:
            measure = next(iter(found.values())).parameters
            found[method] = match_rank(config, measure, model, method)
        else:
            found[method] = sized(config, model)
    return found


def check_generation(arguments: Arguments, adapters: dict[str, SizedConfig], prompt: Any) -> None:
    """Let each method generate before any has trained, so that none fails at the end of it."""
    tokenizer = load_run_tokenizer(arguments)
    base: Any = load_base(arguments)
    if not getattr(base, "is_quantized", False):  # else it is where it shall be
        base.to(arguments.training.device)
    for method, adapter in adapters.items():
        model = get_peft_model(base, deepcopy(adapter.config))
        generate_answers(model, tokenizer, [prompt], 2, description=f"Trying {method}")
        base = model.unload()


def train_once(
    arguments: Arguments, adapter: SizedConfig, method: str, seed: int, rows: Dataset, batch: int
) -> Run:
    """Train, evaluate and save one adapter."""
    run = deepcopy(arguments)
    run.adapter = AdapterArguments(adapter=adapter.config.to_dict(), routing_report=False)
    run.training.seed = seed
    run.training.output_dir = f"{arguments.training.output_dir}/{method}-{seed}"
    trainer_class = CompletionTrainer if run.training.use_cpu else SFTTrainer
    trainer = build_trainer(run, trainer_class=trainer_class)
    begin = time.monotonic()
    trainer.train()
    minutes = (time.monotonic() - begin) / 60
    trainer.save_model()
    tokenizer: Any = trainer.processing_class
    accuracy, _ = evaluate_model(trainer.model, tokenizer, rows, batch, f"{method}, seed {seed}")
    return Run(method, seed, adapter.config.r, adapter.parameters, round(minutes, 2), accuracy)


def table(runs: list[Run]) -> str:
    """Markdown: a line per method, exact match in percent, means over the seeds."""
    tasks = [task for task in runs[0].accuracy if task != "mean"]
    lines = [["method", "r", "parameters", "minutes", *tasks, "mean"]]
    lines.append(["---"] * len(lines[0]))
    for method in dict.fromkeys(run.method for run in runs):
        own = [run for run in runs if run.method == method]
        minutes = statistics.mean(run.minutes for run in own)
        cells = [method, str(own[0].r), f"{own[0].parameters:,}", f"{minutes:.1f}"]
        for task in (*tasks, "mean"):
            values = [100 * run.accuracy[task] for run in own]
            cells.append(f"{statistics.mean(values):.1f}")
        if len(own) > 1:
            cells[-1] += f" ± {statistics.stdev(values):.1f}"
        lines.append(cells)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def compare(arguments: Arguments, options: CompareArguments) -> list[Run]:
    """Everything; the runs in the order of the seeds, then of the methods."""
    rows = prepare(arguments, options)
    adapters = adapters_of(arguments, options)
    for method, adapter in adapters.items():
        print(f"{method}: r={adapter.config.r}, {adapter.parameters:,} trainable parameters")
    check_generation(arguments, adapters, rows[0]["prompt"])
    output = Path(str(arguments.training.output_dir)) / "comparison.json"
    runs: list[Run] = []
    for seed in options.seeds:
        for method, adapter in adapters.items():
            runs.append(
                train_once(arguments, adapter, method, seed, rows, options.generation_batch_size)
            )
            output.write_text(json.dumps([asdict(run) for run in runs], indent=2) + "\n")
    print(f"\n{table(runs)}\n\n{len(rows)} problems, exact match in %. Results: {output}")
    return runs


if __name__ == "__main__":
    arguments, (options,) = parse_arguments(extra=[CompareArguments])
    compare(arguments, options)
