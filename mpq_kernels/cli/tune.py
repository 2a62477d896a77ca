"""`mpq tune`: measure the Triton kernels' configurations on this machine's GPU and keep the fastest."""

from __future__ import annotations

from .options import JsonFlag, QuietFlag
from .output import note, print_json


def command(as_json: JsonFlag = False, quiet: QuietFlag = False) -> None:
    """Measure configurations of the Triton kernels on the current GPU and store the fastest in the user's cache.

    Takes minutes: every candidate is compiled. Layers read the result when their process starts.
    """
    from dataclasses import asdict

    from ..backends.triton import why_unavailable
    from ..errors import UnsupportedError

    reason = why_unavailable()
    if reason is not None:
        raise UnsupportedError(f"nothing to tune, the Triton backend does not work here: {reason}")
    from ..backends.triton import configs, tune

    def say(line: str) -> None:
        note(line, quiet or as_json)

    name, measure = tune.tune_device()
    say(f"{name}: {len(configs.TOKEN_CLASSES)} classes of tokens")
    rows = tune.tune(measure, say)
    tune.store(name, rows)
    file = configs.cache_file()
    if as_json:
        chosen = [{"tokens": tokens, **asdict(row)} for tokens, row in zip(configs.TOKEN_CLASSES, rows, strict=True)]
        print_json({"device": name, "file": str(file), "configurations": chosen})
    else:
        print(f"stored in {file}")
