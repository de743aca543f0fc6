"""The model card that every export carries."""

from collections.abc import Iterable
from pathlib import Path

from ..version import __version__
from .peft_folder import Source


def write_card(
    folder: Path, title: str, source: Source, paragraphs: Iterable[str], library: str = "peft"
) -> None:
    """Write README.md with the metadata that the Hub reads."""
    config = source.config
    base = config.base_model_name_or_path
    method = f" ({config.method})" if config.method else ""
    tags = ["lora", "molora", *([config.method] if config.method else [])]
    lines = ["---", f"library_name: {library}", *([f"base_model: {base}"] if base else [])]
    lines += ["tags:", *(f"- {tag}" for tag in tags), "---", "", f"# {title}", ""]
    lines += [
        f"Written by molora {__version__} from a mixture of LoRA experts{method}"
        + (f" for `{base}`." if base else "."),
        "",
    ]
    for paragraph in paragraphs:
        lines += [paragraph, ""]
    (folder / "README.md").write_text("\n".join(lines), encoding="utf-8")
