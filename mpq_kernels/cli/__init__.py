"""The command line `mpq`: one file for each command; nothing heavy is imported before a command needs it.

Exit codes: 0 done, 1 refused or failed with one message on stderr, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import typer

from . import bench, doctor, generate, inspect, kld, pack, plan, ppl, tune, verify
from .output import fail
from .plan import allocate, imports, latency, sweep

app = typer.Typer(
    name="mpq",
    help="Pack language models under a plan of bit widths, look into the result, and run it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
plan.app.command("allocate")(allocate.command)
plan.app.command("methods")(allocate.methods)
plan.app.command("sweep")(sweep.command)
plan.app.command("import")(imports.command)
plan.app.command("latency")(latency.command)
app.add_typer(plan.app, name="plan")
app.command("pack")(pack.command)
app.command("inspect")(inspect.command)
app.command("verify")(verify.command)
app.command("generate")(generate.command)
app.command("ppl")(ppl.command)
app.command("kld")(kld.command)
app.command("bench")(bench.command)
app.command("tune")(tune.command)
app.command("doctor")(doctor.command)


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
