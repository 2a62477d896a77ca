"""Regular expressions of foreign files, tried on the names of the target's linears; limits are those of our own plans.

Python's matcher can take exponential time on a hostile expression, and nothing here bounds it; Ctrl-C ends it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from ...files.strict import short
from ..plan import MAX_REGEX_CHARS, MAX_REGEXES
from .draft import Draft


def compile_patterns(draft: Draft, patterns: Iterable[tuple[str, str]]) -> list[re.Pattern[str]]:
    """(pattern, place in the file) compiled. Raises PlanError for too many, too long and malformed ones."""
    out: list[re.Pattern[str]] = []
    for pattern, place in patterns:
        if len(out) == MAX_REGEXES:
            raise draft.fail(place, f"more than {MAX_REGEXES} regular expressions; name the modules instead")
        if len(pattern) > MAX_REGEX_CHARS:
            raise draft.fail(place, f"a regular expression of {len(pattern)} characters, more than {MAX_REGEX_CHARS}")
        try:
            out.append(re.compile(pattern))
        except (re.error, OverflowError, RecursionError) as error:
            raise draft.fail(place, f"{short(pattern)} is not a regular expression: {error}") from error
    return out
