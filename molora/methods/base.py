"""What a published method is."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..registry import Registry


@dataclass(frozen=True)
class Method:
    """A published mixture of LoRA experts, as settings of this tuner.

    Attributes:
        name: as in `MoloraConfig.from_method(name)`.
        title: the paper's title.
        summary: one line.
        arxiv: arXiv id, or None.
        equations: the method in the library's letters.
        defaults: fields of `MoloraConfig`, as published.
        sources: where the defaults come from.
        deviations: what differs from the paper or its code, and why.
        citation: BibTeX.
        version: raised when `defaults` change their meaning.
    """

    name: str
    title: str
    summary: str
    arxiv: str | None
    equations: str
    defaults: Mapping[str, Any]
    sources: str
    deviations: str
    citation: str
    version: int = 1


METHODS: Registry[Method] = Registry("method")


def register_method(method: Method) -> Method:
    """Make a method known by its name."""
    return METHODS.register(method.name)(method)


def available_methods() -> list[str]:
    """The names that `MoloraConfig.from_method` takes, sorted."""
    return METHODS.names()
