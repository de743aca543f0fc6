"""The command line: `molora methods`, `molora methods NAME`, `molora describe`."""

import argparse
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn


def main(arguments: list[str] | None = None) -> int:
    """Run a command; wrong input is one line on standard error and exit status 2."""
    options = _parser().parse_args(arguments)
    try:
        print(options.command(options))
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        sys.stderr.close()
        return 0
    except (ValueError, OSError) as error:
        print(f"molora: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="molora", description="Mixtures of LoRA experts.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    methods = commands.add_parser("methods", help="list the published methods, or print one")
    methods.add_argument("name", nargs="?", help="print this method's equations and citation")
    methods.set_defaults(command=_methods)
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
    return parser


def _methods(options: argparse.Namespace) -> str:
    from .methods import METHODS

    if options.name is None:
        names = METHODS.names()
        width = max(map(len, names))
        return "\n".join(f"{name:<{width}}  {METHODS.get(name).summary}" for name in names)
    method = METHODS.get(options.name)
    arxiv = f" (arXiv:{method.arxiv})" if method.arxiv else ""
    defaults = "\n".join(f"  {name} = {value!r}" for name, value in method.defaults.items())
    return "\n\n".join(
        [
            f"{method.name}: {method.summary}\n{method.title}{arxiv}",
            f"Equations\n{method.equations}",
            f"Defaults\n{defaults}\n{method.sources}",
            f"Deviations\n{method.deviations}",
            f"Citation\n{method.citation}",
        ]
    )


def _describe(options: argparse.Namespace) -> str:
    from peft import get_peft_model

    from .describe import describe

    config = _config(options)
    base = _empty_model(options.model)
    with warnings.catch_warnings():
        # PEFT's calls of deprecated parts of transformers are no matter of who reads the table.
        warnings.simplefilter("ignore", FutureWarning)
        model = get_peft_model(base, config, low_cpu_mem_usage=True)
    return describe(model, every_site=options.every_site)


def _config(options: argparse.Namespace) -> Any:
    from .config import MoloraConfig

    overrides = dict(_override(text) for text in options.set)
    if options.method is not None:
        return MoloraConfig.from_method(options.method, **overrides)
    if options.adapter is None:
        return MoloraConfig(**{"target_modules": "all-linear", **overrides})
    path = Path(options.adapter)
    saved = MoloraConfig.from_pretrained(str(path.parent if path.suffix == ".json" else path))
    if not isinstance(saved, MoloraConfig):  # PEFT returns what the file says it is
        raise ValueError(f"{path} holds a {saved.peft_type.value} adapter; a MOLORA one is needed.")
    return MoloraConfig(**{**saved.to_dict(), **overrides})


def _override(text: str) -> tuple[str, Any]:
    from .config import MoloraConfig
    from .registry import unknown_name_message

    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--set {text!r} is not of the form FIELD=VALUE.")
    if name not in MoloraConfig.__dataclass_fields__:
        raise ValueError(unknown_name_message("field", name, MoloraConfig.__dataclass_fields__))
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def _empty_model(source: str) -> nn.Module:
    """The model's architecture on the meta device."""
    import transformers

    path = Path(source)
    if not path.exists() and source.startswith(("/", "./", "../")):
        raise ValueError(f"there is no model at {source}.")
    if path.suffix == ".gguf":
        config = transformers.AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name)
    else:
        config = transformers.AutoConfig.from_pretrained(source)
    names = config.architectures or []
    cls = next((getattr(transformers, name, None) for name in names), None)
    with torch.device("meta"):
        if cls is not None:
            return cls(config)
        return transformers.AutoModelForCausalLM.from_config(config)


if __name__ == "__main__":
    raise SystemExit(main())
