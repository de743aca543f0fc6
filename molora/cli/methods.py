"""`molora methods`, `molora methods NAME`."""

import argparse
from typing import Any


def add(commands: Any) -> None:
    """Add the command's parser."""
    methods = commands.add_parser("methods", help="list the published methods, or print one")
    methods.add_argument("name", nargs="?", help="print this method's equations and citation")
    methods.set_defaults(command=_methods)


def _methods(options: argparse.Namespace) -> str:
    from ..methods import METHODS

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
