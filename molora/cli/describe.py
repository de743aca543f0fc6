"""`molora describe`."""

import argparse
import warnings
from pathlib import Path
from typing import Any

from ..architecture import empty_model
from .assignments import read_assignment


def add(commands: Any) -> None:
    """Add the command's parser."""
    describe = commands.add_parser(
        "describe", help="print what each module of a model would get from a configuration"
    )
    describe.add_argument(
        "--model", required=True, help="model folder, Hub name or GGUF file; no weights are read"
    )
    source = describe.add_mutually_exclusive_group()
    source.add_argument("--method", help="a published method")
    source.add_argument("--adapter", help="folder of a saved adapter, or its adapter_config.json")
    describe.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="override a field of MoloraConfig, for example --set num_experts=triangle:2-8",
    )
    describe.add_argument("--every-site", action="store_true", help="one line per module")
    describe.set_defaults(command=_describe)


def _describe(options: argparse.Namespace) -> str:
    from peft import get_peft_model

    from ..describe import describe

    config = _config(options)
    base = empty_model(options.model)
    with warnings.catch_warnings():
        # PEFT's calls of deprecated parts of transformers are no matter of who reads the table.
        warnings.simplefilter("ignore", FutureWarning)
        model = get_peft_model(base, config, low_cpu_mem_usage=True)
    return describe(model, every_site=options.every_site)


def _config(options: argparse.Namespace) -> Any:
    from ..config import MoloraConfig

    fields = MoloraConfig.__dataclass_fields__
    overrides = dict(read_assignment(text, "field", fields) for text in options.set)
    if options.method is not None:
        return MoloraConfig.from_method(options.method, **overrides)
    if options.adapter is None:
        return MoloraConfig(**{"target_modules": "all-linear", **overrides})
    path = Path(options.adapter)
    saved = MoloraConfig.from_pretrained(str(path.parent if path.suffix == ".json" else path))
    if not isinstance(saved, MoloraConfig):  # PEFT returns what the file says it is
        raise ValueError(f"{path} holds a {saved.peft_type.value} adapter; a MOLORA one is needed.")
    return MoloraConfig(**{**saved.to_dict(), **overrides})
