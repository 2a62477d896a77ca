"""The command line `mpq`: one file for each command; nothing heavy is imported before a command needs it.

Exit codes: 0 done, 1 refused or failed with one message on stderr, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from ..version import VERSION
from . import bench, doctor, eval, export, generate, imports, inspect, kld, pack, plan, ppl, serve, tune, verify
from .choices import Command
from .output import fail

COMMANDS: dict[str, Callable[..., Any]] = {
    "pack": pack.command,
    "import": imports.command,
    "inspect": inspect.command,
    "verify": verify.command,
    "export": export.command,
    "generate": generate.command,
    "serve": serve.command,
    "ppl": ppl.command,
    "kld": kld.command,
    "eval": eval.command,
    "bench": bench.command,
    "tune": tune.command,
    "doctor": doctor.command,
}

app = typer.Typer(
    name="mpq",
    help="Pack language models under a plan of bit widths, look into the result, and run it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(plan.app, name="plan")
for _name, _command in COMMANDS.items():
    app.command(_name, cls=Command)(_command)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"mpq_kernels {VERSION}")
        raise typer.Exit


@app.callback()
def program(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """What stands before a command; it has a text of its own (`help` above)."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. argv: arguments without the program's name (None: sys.argv)."""
    from ..errors import MPQError

    try:
        app(args=None if argv is None else list(argv), prog_name="mpq")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except MPQError as error:
        return fail("\n".join([str(error), *getattr(error, "__notes__", ())]))
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader (`| head`) has gone; what is still buffered must not raise again when Python flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.filename is None and error.strerror is None:
            raise  # not about a file: a library's own error, of which the traceback says more
        return fail(f"{error.filename or 'input or output'}: {error.strerror or error}")
    return 0
