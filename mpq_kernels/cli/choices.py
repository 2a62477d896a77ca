"""Options with fixed values, made from the tables that define the values: help lists them, another one is wrong usage.

Some of those tables live beside code that needs torch. So a table is imported when a value of its option is read or the
help of its command is printed, and `mpq --help` imports none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, get_type_hints

import typer
from typer.core import TyperCommand
from typer.models import OptionInfo


class OneOf:
    """Parser of an option: one of the names that `read` gives; with `several`, names with commas between them."""

    __name__ = "name"  # what help shows in place of a type

    def __init__(self, read: Callable[[], Iterable[str]], several: bool = False) -> None:
        self.read, self.several = read, several

    @property
    def names(self) -> tuple[str, ...]:
        """The values, in the order of their table. Imports the table."""
        return tuple(self.read())

    def __call__(self, text: str) -> str:
        """The text itself. Raises typer.BadParameter with all names for an unknown one."""
        from ..files.strict import close_names

        names = self.names
        for name in text.split(",") if self.several else (text,):
            if name not in names:
                raise typer.BadParameter(f"{name!r} is not one of {', '.join(names)}{close_names(name, names)}")
        return text


class Command(TyperCommand):
    """A command whose help ends the text of such options with their values."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """As typer does it. Imports the tables of this command's options."""
        found = choices(self.callback)
        for param in self.params:
            if isinstance(param, typer.core.TyperOption) and param.name in found:
                one_of = found.pop(param.name)
                what = "Any of" if one_of.several else "One of"
                param.help = f"{(param.help or '').rstrip()} {what} {', '.join(one_of.names)}.".lstrip()
        super().format_help(ctx, formatter)


def choices(command: Callable[..., Any] | None) -> dict[str, OneOf]:
    """Parameter -> its parser, of the options of a command function that have fixed values."""
    hints = {} if command is None else get_type_hints(command, include_extras=True)
    found = {}
    for name, hint in hints.items():
        for info in getattr(hint, "__metadata__", ()):
            if isinstance(info, OptionInfo) and isinstance(info.parser, OneOf):
                found[name] = info.parser
    return found
