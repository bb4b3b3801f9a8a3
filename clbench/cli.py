"""The command line: parse, call one function, print.

Everything heavy is imported inside the command that needs it, so that `--help` and `list` answer at once. Errors a user
can cause end as one sentence on stderr; exit codes: 0 done, 2 bad usage or input, 1 failed while running, 130 interrupted.
"""

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clbench.errors import ClbenchError, InputError, unknown_name

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["app", "main"]

RUNS = Path("results/runs")

app = typer.Typer(
    name="clbench",
    help="Continual-learning benchmark suite: run a method on a scenario, watch every iteration, compare results.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
data_app = typer.Typer(help="What data is there, and how to get what is not.")
app.add_typer(data_app, name="data")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    try:
        code = app(args=argv, prog_name="clbench", standalone_mode=False)
    except ClbenchError as error:
        return _fail(str(error), error.exit_code)
    except typer.TyperException as error:  # wrong usage: unknown option, missing value
        message = error.format_message().strip()
        return _fail(message[:1].lower() + message[1:], 2)
    except (KeyboardInterrupt, typer.Abort):
        return _fail("interrupted", 130)
    except BrokenPipeError:  # the reader of our output went away (`clbench list runs | head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return code if isinstance(code, int) else 0


def _fail(message: str, code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code
