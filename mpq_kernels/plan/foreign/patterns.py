"""Regular expressions of foreign files, tried on the names of the target's linears; limits as in our own plans."""

from __future__ import annotations

from collections.abc import Iterable

from ..patterns import Pattern, compile_pattern, why_too_many
from .draft import Draft


def compile_patterns(draft: Draft, patterns: Iterable[tuple[str, str]]) -> list[Pattern]:
    """(pattern, place in the file) compiled. Raises PlanError for too many, too long and malformed ones."""
    listed = list(patterns)
    reason = why_too_many([text for text, _ in listed])
    if reason is not None:
        raise draft.fail(listed[0][1], reason)
    return [compile_pattern(text, f"{draft.where}: {place}", draft.clock) for text, place in listed]
