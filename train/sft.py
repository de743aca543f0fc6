"""Fine-tune a mixture of LoRA experts with TRL's SFTTrainer.

    accelerate launch train/sft.py --config configs/sft/mola.yaml
    accelerate launch --config_file configs/accelerate/fsdp2.yaml train/sft.py --config FILE.yaml
    accelerate launch train/sft.py --config FILE.yaml --learning_rate 1e-4 --report_to trackio
    accelerate launch train/sft.py --config FILE.yaml --resume_from_checkpoint latest

A YAML may set the fields of train/arguments.py and every argument of TRL's SFTConfig; a flag on the
command line overrides it. Where a router or a loss reads the task of each example, the tasks are
numbered; output_dir/task_ids.json keeps the numbers. Where it reads the modality of each token, the
data is tokenised and has a column modality_ids (configs/sft/moiie.yaml).
"""

from pathlib import Path

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTTrainer

from arguments import Arguments, parse_arguments
from data import Part, apply_format, load_mixture
from models import load_model, load_tokenizer
from molora import RoutingCallback, RoutingLabelCollator
from task_ids import add_task_ids, ids_of_run, keep_task_ids
from token_rows import columns_for_routing, cut, is_tokenised


def load_data(
    arguments: Arguments, tokenizer: PreTrainedTokenizerBase
) -> tuple[Dataset, Dataset | None]:
    """The examples to train on and those to evaluate on, formatted."""
    data = arguments.data

    def load(part: Part) -> Dataset | None:
        rows = load_mixture(
            data.tasks, data.dataset, part, data.only_tasks, seed=arguments.training.seed
        )
        if rows is None:
            return None
        rows = apply_format(rows, data.format, tokenizer.chat_template, data.system_prompt)
        return cut(rows, arguments.training) if is_tokenised(rows) else rows

    return load("train"), load("eval")


def load_run_tokenizer(arguments: Arguments) -> PreTrainedTokenizerBase:
    """The tokenizer of a run."""
    return load_tokenizer(
        arguments.model.model_name_or_path,
        arguments.model.revision,
        trust_remote_code=arguments.training.trust_remote_code,
    )


def load_base(arguments: Arguments) -> PreTrainedModel:
    """The base model of a run."""
    model = arguments.model
    return load_model(
        model.model_name_or_path,
        arguments.training.dtype,
        revision=model.revision,
        attn_implementation=model.attn_implementation,
        load_in_4bit=model.load_in_4bit,
        load_in_8bit=model.load_in_8bit,
        trust_remote_code=arguments.training.trust_remote_code,
    )


def build_trainer(
    arguments: Arguments,
    model: PreTrainedModel | None = None,
    trainer_class: type[SFTTrainer] = SFTTrainer,
) -> SFTTrainer:
    """The trainer of a run; `model` is the base model where it is already loaded."""
    training = arguments.training
    tokenizer = load_run_tokenizer(arguments)
    train_rows, eval_rows = load_data(arguments, tokenizer)
    config = arguments.adapter.config()
    order, chosen = arguments.data.tasks, arguments.data.task_ids
    task_ids = ids_of_run(config, train_rows, training, order, chosen)
    columns = columns_for_routing(config, train_rows, training)
    if eval_rows is not None:
        columns_for_routing(config, eval_rows, training)
    if task_ids is not None:
        columns.append("task_ids")
        train_rows = add_task_ids(train_rows, task_ids)
        eval_rows = None if eval_rows is None else add_task_ids(eval_rows, task_ids)
    if columns:
        training.remove_unused_columns = False  # the model's forward doesn't name them
    set_seed(training.seed)  # TRL makes the adapter before the Trainer sets its seed
    if model is None:
        model = load_base(arguments)
    trainer = trainer_class(
        model=model,
        args=training,
        train_dataset=train_rows,
        eval_dataset=eval_rows if training.eval_strategy != "no" else None,
        processing_class=tokenizer,
        peft_config=config,
        callbacks=[RoutingCallback(per_site=False, report=arguments.adapter.routing_report)],
    )
    if columns:
        trainer.data_collator = RoutingLabelCollator(trainer.data_collator, *columns)
    if task_ids is not None:
        keep_task_ids(
            task_ids,
            training.output_dir or "",
            resumed=training.resume_from_checkpoint is not None,
            writes=trainer.is_world_process_zero(),
        )
    return trainer


def checkpoint_to_resume(value: str | None, output_dir: str | None) -> str | None:
    """A checkpoint's folder: the one named, or with "latest" the last one of the run.

    Raises:
        FileNotFoundError: there is none.
    """
    if value != "latest":
        if value is not None and not Path(value).is_dir():
            raise FileNotFoundError(f"resume_from_checkpoint={value!r}: there is no such folder.")
        return value
    started = output_dir is not None and Path(output_dir).is_dir()
    last = get_last_checkpoint(output_dir) if started else None
    if last is None:
        raise FileNotFoundError(
            f"resume_from_checkpoint='latest': {output_dir!r} has no checkpoint."
        )
    return last


def main(arguments: list[str] | None = None) -> None:
    parsed, _ = parse_arguments(arguments)
    training = parsed.training
    checkpoint = checkpoint_to_resume(training.resume_from_checkpoint, training.output_dir)
    trainer = build_trainer(parsed)
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()  # the adapter, in output_dir


if __name__ == "__main__":
    main()
