"""`mpq plan`: one file for each command, named after it; `import` is in imports.py, a word that Python keeps.

resolved.py is what they share: a plan applied to the linears of a model, and how that is printed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import typer

from ..choices import Command
from . import allocate, check, diff, imports, latency, methods, show, size, sweep, uniform, validate

COMMANDS: dict[str, Callable[..., Any]] = {
    "uniform": uniform.command,
    "check": check.command,
    "validate": validate.command,
    "show": show.command,
    "size": size.command,
    "diff": diff.command,
    "allocate": allocate.command,
    "methods": methods.command,
    "sweep": sweep.command,
    "latency": latency.command,
    "import": imports.command,
}

app = typer.Typer(help="Write a plan, check it against a model, and look at what it does.", no_args_is_help=True)
for _name, _command in COMMANDS.items():
    app.command(_name, cls=Command)(_command)
