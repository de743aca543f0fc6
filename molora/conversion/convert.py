"""Checkpoints of other libraries as MoLoRA adapters."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

from peft import get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from ..architecture import empty_model
from ..checkpoint import WEIGHTS_NAME
from ..config import MoloraConfig
from ..describe import describe
from ..export.card import write_page
from ..export.folder import new_folder
from . import hydralora, moe_peft, xlora
from .checkpoint import Checkpoint, read_checkpoint
from .parts import Parts

PREFIX = "base_model.model."


class Format(NamedTuple):
    """Whether a configuration is of that format, and what takes its checkpoints apart."""

    recognises: Callable[[dict[str, Any]], bool]
    read: Callable[..., Parts]


FORMATS = {
    "moe-peft (MixLoRA, MoLA, LoRAMoE)": Format(moe_peft.recognises, moe_peft.read),
    "PEFT X-LoRA": Format(xlora.recognises, xlora.read),
    "HydraLoRA or LoRAMoE of their authors": Format(hydralora.recognises, hydralora.read),
}


@dataclass(frozen=True)
class Conversion:
    """What a checkpoint becomes.

    Attributes:
        source: what was read.
        format: who wrote it.
        config: the adapter's configuration.
        tensors: its weights by the names that PEFT saves them under.
        notes: what the user should know.
        table: what each module of the base model gets.
    """

    source: str
    format: str
    config: MoloraConfig
    tensors: dict[str, Tensor]
    notes: list[str]
    table: str

    def describe(self) -> str:
        """What would be written, for people."""
        size = sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())
        becomes = f"becomes {self.config.method}, {size / 2**20:,.1f} MiB"
        head = f"{self.source}: {self.format}, {becomes}"
        return "\n".join([head, *self.notes, self.table])

    def save(self, output: str | Path, *, overwrite: bool = False) -> Path:
        """Write the adapter; arguments, result and errors are `convert`'s."""
        with new_folder(output, overwrite) as folder:
            title, origin = f"Converted from {self.format}", f"the checkpoint `{self.source}`"
            write_page(folder, title, self.config, origin, self.notes)
            save_file(self.tensors, folder / WEIGHTS_NAME, metadata={"format": "pt"})
            self.config.save_pretrained(str(folder))
        return Path(output)


def convert(
    source: str | Path,
    output: str | Path,
    *,
    base: str | None = None,
    adapters: Sequence[str | Path] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a checkpoint of another library as a MoLoRA adapter.

        molora.convert("mixlora-checkpoint", "adapter")
        PeftModel.from_pretrained(base_model, "adapter")

    Known are MixLoRA (all three routing strategies), MoLA and LoRAMoE of moe-peft 2.0 and
    mixlora 0.2, X-LoRA of PEFT, and HydraLoRA and LoRAMoE of their authors' repositories. What a
    checkpoint says and an adapter can't express is refused by name. Nothing pickled is executed.

    Args:
        source: folder or Hub name.
        output: folder to be made; it appears when everything in it is written.
        base: folder or Hub name of the base model, of which the configuration alone is read;
            default: the one that the checkpoint names.
        adapters: of X-LoRA, the experts' folders, in the order of the classifier; default: those
            that the checkpoint names.
        overwrite: replace a folder that isn't empty.

    Returns:
        The folder.

    Raises:
        ValueError: the format isn't known, the checkpoint says something that can't be expressed,
            or doesn't fit the base model.
        FileExistsError: the folder isn't empty.
    """
    conversion = plan_conversion(source, base=base, adapters=adapters)
    for note in conversion.notes:
        warnings.warn(f"molora: {note}", stacklevel=2)
    return conversion.save(output, overwrite=overwrite)


def plan_conversion(
    source: str | Path,
    *,
    base: str | None = None,
    adapters: Sequence[str | Path] | None = None,
) -> Conversion:
    """Decide what `convert` would write; arguments and errors are its."""
    checkpoint = read_checkpoint(source)
    name = _format_of(checkpoint)
    base = base or checkpoint.config.get("base_model_name_or_path")
    if not base:
        raise ValueError(f"{source} names no base model; give base=.")
    base_model = empty_model(base)
    read = FORMATS[name].read
    if adapters is not None and read is not xlora.read:
        raise ValueError(f"adapters= is for X-LoRA; {source} holds its experts itself ({name}).")
    options: dict[str, Any] = {} if adapters is None else {"adapters": adapters}
    parts = read(checkpoint, base_model, **options)
    config = MoloraConfig.from_method(parts.method, inference_mode=True, **parts.fields)
    tensors = {PREFIX + key: tensor.contiguous() for key, tensor in parts.tensors.items()}
    table = _check(checkpoint, base_model, config, tensors, base)
    config.base_model_name_or_path = base
    return Conversion(checkpoint.source, name, config, tensors, parts.notes, table)


def _format_of(checkpoint: Checkpoint) -> str:
    """The one format that the checkpoint is of."""
    found = [name for name, its in FORMATS.items() if its.recognises(checkpoint.config)]
    if found:
        return found[0]
    kind = checkpoint.config.get("peft_type")
    hint = {
        "MOLORA": " It is a MoLoRA adapter already: PeftModel.from_pretrained loads it.",
        "LORA": " It is one LoRA adapter: molora.compose makes a mixture of several.",
    }.get(str(kind), "")
    raise ValueError(
        f"{checkpoint.source} is of an unknown format (peft_type={kind!r}); known: "
        f"{'; '.join(FORMATS)}.{hint}"
    )


def _check(
    checkpoint: Checkpoint,
    base_model: nn.Module,
    config: MoloraConfig,
    tensors: dict[str, Tensor],
    base: str,
) -> str:
    """Put the adapter into the empty base model; the table of what each module got.

    Raises:
        ValueError: the tensors aren't those that the model needs.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT's about transformers
        model = get_peft_model(cast(Any, base_model), config, low_cpu_mem_usage=True)
    needed = {key: tuple(tensor.shape) for key, tensor in get_peft_model_state_dict(model).items()}
    given = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    wrong = [key for key in needed if key in given and given[key] != needed[key]]
    missing, extra = sorted(needed.keys() - given), sorted(given.keys() - needed)
    if wrong:
        raise ValueError(
            f"{checkpoint.source} doesn't fit {base}: {wrong[0]} would "
            f"be {given[wrong[0]]}, and the model needs {needed[wrong[0]]}."
        )
    if missing:
        raise ValueError(
            f"{checkpoint.source} lacks {len(missing)} of the {len(needed)} tensors that "
            f"{base} needs, {missing[0]} among them."
        )
    if extra:
        raise ValueError(
            f"{checkpoint.source} gives {len(extra)} tensors for which "
            f"{base} has no place, {extra[0]} among them."
        )
    return describe(model)
