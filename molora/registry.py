"""Open registries: a name, a class, and a clear error for anything else.

A router, gate, expert parametrisation, loss or published method registers itself with a decorator
and is then named in `MoloraConfig`. A user's own script can register classes the same way, as long
as it is imported before the config that names them is built or loaded.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from typing import Any, Generic, TypeVar

from .value_types import wanted_type

T = TypeVar("T")


def unknown_name_message(kind: str, name: object, known: Iterable[str]) -> str:
    """Say which name is unknown, which are known, and which one was probably meant."""
    known = sorted(known)
    close = get_close_matches(str(name), known, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"unknown {kind} {name!r}; known: {', '.join(known)}.{hint}"


class Registry(Generic[T]):
    """Classes (or records) of one kind, by name."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that registers what it decorates under `name`; a name is taken only once."""

        def decorate(entry: T) -> T:
            known = self._entries.get(name)
            # Re-running a notebook cell defines the same class anew: let it replace itself.
            if known is not None and _origin(known) != _origin(entry):
                raise ValueError(f"{self.kind} {name!r} is already registered as {known!r}")
            self._entries[name] = entry
            return entry

        return decorate

    def names(self) -> list[str]:
        """The registered names, sorted."""
        return sorted(self._entries)

    def get(self, name: str) -> T:
        """The entry of that name; `ValueError` names the known ones."""
        if not isinstance(name, str) or name not in self._entries:
            raise ValueError(unknown_name_message(self.kind, name, self._entries))
        return self._entries[name]

    def name_of(self, entry: T) -> str:
        """The name under which an entry is registered, or else its own."""
        known = (name for name, value in self._entries.items() if value is entry)
        return next(known, getattr(entry, "__name__", repr(entry)))

    def build(self, name: str, options: Mapping[str, Any], **arguments: Any) -> Any:
        """Construct the class called `name` with the caller's arguments and the user's options.

        Raises:
            ValueError: the name is unknown, an option isn't a keyword of that class, is missing or
                has a value of the wrong type.
        """
        cls: Any = self.get(name)
        self._check_options(name, options_of(cls), options)
        try:
            return cls(**arguments, **options)
        except TypeError as error:
            if not options:
                raise
            raise ValueError(
                f"{self.kind} {name!r} refuses the options {dict(options)}: {error}"
            ) from error

    def _check_options(
        self, name: str, accepted: dict[str, inspect.Parameter], options: Mapping[str, Any]
    ) -> None:
        takes = ", ".join(sorted(accepted)) or "no options"
        for option, value in options.items():
            if option not in accepted:
                raise ValueError(
                    f"{self.kind} {name!r} has no option {option!r}; it takes: {takes}."
                )
            wanted = wanted_type(value, accepted[option].annotation)
            if wanted is not None:
                raise ValueError(
                    f"{self.kind} {name!r}: option {option}={value!r} must be {wanted}."
                )
        for option in sorted(accepted.keys() - options.keys()):
            if accepted[option].default is inspect.Parameter.empty:
                raise ValueError(
                    f"{self.kind} {name!r} needs the option {option!r}; it takes: {takes}."
                )


def options_of(cls: Any) -> dict[str, inspect.Parameter]:
    """The keyword-only parameters of a class's constructor: what a user may set in the config."""
    parameters = inspect.signature(cls).parameters
    return {n: p for n, p in parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}


def _origin(entry: object) -> tuple[str, str]:
    return getattr(entry, "__module__", ""), getattr(entry, "__qualname__", repr(entry))
