"""The command line: `molora methods | describe | convert | extract | compose | merge | export |
report`.

A command is a module with `add(commands)`, which adds its parser and sets what it calls.
"""

import argparse
import sys
import warnings

from . import compose, convert, deploy, describe, extract, methods

COMMANDS = (methods, describe, convert, extract, compose, deploy)


def main(arguments: list[str] | None = None) -> int:
    """Run a command; wrong input is one line on standard error and exit status 2."""
    options = _parser().parse_args(arguments)
    try:
        with warnings.catch_warnings():
            # PEFT 0.21 reads a name that transformers 5.23 has renamed
            message = "`is_gradient_checkpointing` is deprecated"
            warnings.filterwarnings("ignore", message, FutureWarning)
            warnings.showwarning = _show
            print(options.command(options))
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        sys.stderr.close()
        return 0
    except (ValueError, OSError) as error:
        print(f"molora: {error}", file=sys.stderr)
        return 2
    return 0


def _show(message: Warning | str, *where: object, **more: object) -> None:
    """A warning as the line that it is, without the place in the code that raised it."""
    print(message, file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="molora", description="Mixtures of LoRA experts.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    return parser
