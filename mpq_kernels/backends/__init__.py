"""Which code multiplies by packed weights, chosen once for each module and device, never for each call.

BACKENDS is in order of preference. A backend that is absent or cannot serve a weight says why in words, and `select`
repeats every reason: nothing is substituted in silence.

May import: format. Gives: BACKENDS, Backend, select; ops.py has the operators, and each backend is a file or a folder.
"""

from __future__ import annotations

from ..errors import UnsupportedError
from ..format.layout import WeightLayout
from . import cpu, cuda, reference, triton
from .base import ACTIVATIONS, Backend

BACKENDS: dict[str, Backend] = {b.name: b for b in (cuda.BACKEND, triton.BACKEND, cpu.BACKEND, reference.BACKEND)}


def select(layout: WeightLayout, device_type: str, want: str | None = None, activations: str = "exact") -> Backend:
    """The backend called `want`, or the first that serves this layout on this type of device ("cpu", "cuda").

    activations: "exact", or "int8" for kernels that round x. Raises UnsupportedError with the reason of every backend
    that was asked.
    """
    if activations not in ACTIVATIONS:
        raise UnsupportedError(f"activations={activations!r} is not one of {', '.join(ACTIVATIONS)}")
    if want is not None and want not in BACKENDS:
        raise UnsupportedError(f"there is no backend {want!r}; there are {', '.join(BACKENDS)}")
    reasons = []
    for backend in BACKENDS.values() if want is None else (BACKENDS[want],):
        if want is None and backend.only_on_request:
            reasons.append(f"{backend.name}: only when asked for ({backend.summary})")
            continue
        reason = backend.why_not(layout, device_type, activations)
        if reason is None:
            return backend
        reasons.append(f"{backend.name}: {reason}")
    mode = "" if activations == "exact" else f" with {activations} activations"
    raise UnsupportedError(f"no backend for packed weights on {device_type}{mode}. " + "; ".join(reasons))


__all__ = ["ACTIVATIONS", "BACKENDS", "Backend", "select"]
