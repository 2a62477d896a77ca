"""`mpq tune`: measure the Triton kernels' configurations on this machine's GPU and keep the fastest."""

from __future__ import annotations


def command() -> None:
    """Measure configurations of the Triton kernels on the current GPU and store the fastest in the user's cache.

    Takes minutes: every candidate is compiled. Layers read the result when their process starts.
    """
    from ..backends.triton import why_unavailable
    from ..errors import UnsupportedError

    reason = why_unavailable()
    if reason is not None:
        raise UnsupportedError(f"nothing to tune, the Triton backend does not work here: {reason}")
    from ..backends.triton import configs, tune

    name, measure = tune.tune_device()
    print(f"{name}: {len(configs.TOKEN_CLASSES)} classes of tokens")
    tune.store(name, tune.tune(measure, print))
    print(f"stored in {configs.cache_file()}")
