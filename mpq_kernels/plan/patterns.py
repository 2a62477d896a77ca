r"""Regular expressions of a plan, ours or another program's, tried on names of linears within a limit of time.

A backtracking matcher takes exponential time on an expression made for that, and nothing stops Python's own, while it
works, but a signal to the main thread. So Python's `re` says what an expression is, and the `regex` package matches,
which gives up at a time. Both mean the same by every expression that passes here:

    {  only in a repeat such as {2} or {1,3}    elsewhere the one takes it literally, the other for a fuzzy match
    [: never                                    a class of characters to the one, a set of them to the other
    ASCII, no \x, \u, \U, \N               names need no others, and ranges of all characters take long to compile
    the counts of all repeats, multiplied: at most MAX_REPEATS, since the one that matches writes repeats out
"""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import PlanError
from ..files.strict import short

if TYPE_CHECKING:
    import regex  # a requirement of transformers too; imported for plans that have expressions

MAX_REGEXES = 1000  # each is tried on every module name; exact names are looked up and have no limit
MAX_REGEX_CHARS = 1000
MAX_REGEXES_CHARS = 100_000  # of all together: compiling takes up to 10 us for each
MAX_REPEATS = 100_000  # each takes about 600 bytes
# The expressions of one plan have so many seconds of the processor together, besides FREE_SECONDS for each try: a plain
# one takes 1 us on a name.
MATCH_SECONDS = 2.0
FREE_SECONDS = 5e-6
ESCAPED = re.compile(r"\\.", re.DOTALL)
REPEAT = re.compile(r"\{(\d*)(,?)(\d*)\}")


@dataclass
class Clock:
    """What is left of the seconds that the expressions of one plan may take together."""

    left: float = MATCH_SECONDS


@dataclass(frozen=True)
class Pattern:
    """A compiled expression. place: where it stands, for messages. Each method raises PlanError when time is up."""

    text: str
    place: str
    compiled: regex.Pattern[str]
    clock: Clock = field(default_factory=Clock)

    def fullmatch(self, name: str) -> bool:
        """Whether it matches the whole name."""
        return self._try(self.compiled.fullmatch, name)

    def match(self, name: str) -> bool:
        """Whether it matches the beginning of the name."""
        return self._try(self.compiled.match, name)

    def search(self, name: str) -> bool:
        """Whether it matches anywhere in the name."""
        return self._try(self.compiled.search, name)

    def _try(self, method: Any, name: str) -> bool:
        begin = time.thread_time()
        try:
            found = self.clock.left > 0 and method(name, timeout=self.clock.left) is not None
        except (TimeoutError, MemoryError):
            self.clock.left = 0
        self.clock.left -= max(0.0, time.thread_time() - begin - FREE_SECONDS)
        if self.clock.left <= 0:
            raise PlanError(
                f"{self.place}: the regular expressions took longer than {MATCH_SECONDS:g} s on the names of the "
                f"model's linears, up to {short(self.text)}; nested repeats can take forever: name the modules instead"
            )
        return found


def why_no_pattern(text: str) -> str | None:
    """None for an expression that can be compiled, else the reason why not."""
    if len(text) > MAX_REGEX_CHARS:
        return f"a regex of {len(text)} characters, more than {MAX_REGEX_CHARS}"
    if not text.isascii() or any(escape[1] in "xuUN" for escape in ESCAPED.findall(text)):
        return f"{short(text)}: a regex of names is ASCII, without \\x, \\u, \\U and \\N"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sets that a later Python may read otherwise
            re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        return f"{short(text)} is not a regular expression: {error}"
    bare = ESCAPED.sub("", text)
    repeats = REPEAT.findall(bare)
    if "{" in REPEAT.sub("", bare) or any(not low and not high for low, _, high in repeats) or "[:" in bare:
        return f"{short(text)}: a {{ outside of repeats such as {{1,3}}, and [: in a set, mean nothing in a name"
    count = 1
    for low, _, high in repeats:
        count *= max(1, int(high or low))
        if count > MAX_REPEATS:
            return f"{short(text)}: its repeats, multiplied, are more than {MAX_REPEATS}"
    return None


def why_too_many(texts: Sequence[str]) -> str | None:
    """None for as many expressions as one plan may have, else the reason why not."""
    if len(texts) > MAX_REGEXES:
        return f"{len(texts)} regexes, and more than {MAX_REGEXES} regexes are not tried: name the modules instead"
    if sum(map(len, texts)) > MAX_REGEXES_CHARS:
        return f"regexes of {sum(map(len, texts))} characters together, more than {MAX_REGEXES_CHARS}"
    return None


def compile_pattern(text: str, place: str, clock: Clock) -> Pattern:
    """An expression that `why_no_pattern` has nothing against. Raises PlanError for any other."""
    import regex

    reason = why_no_pattern(text)
    if reason is None:
        try:
            return Pattern(text, place, regex.compile(text, regex.VERSION0, cache_pattern=False), clock)
        except (regex.error, OverflowError, RecursionError, MemoryError) as error:
            reason = f"{short(text)} is too much for a regular expression: {error}"
    raise PlanError(f"{place}: {reason}")
