"""How long work tells how far it is."""

from collections.abc import Callable

Progress = Callable[[int, int, str], None]  # (done, total, name of what was just done); units are the caller's
