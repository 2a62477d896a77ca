"""The table of backends as tests use it: each on a device where it works, or skipped with its own reason."""

import pytest
import torch

from mpq_kernels.backends import BACKENDS


def device_for(name: str) -> str:
    """A type of device that this backend works on here; skips the test with its own reason where there is none."""
    backend = BACKENDS[name]
    reason = backend.why_unavailable()
    if reason is not None:
        pytest.skip(f"{name}: {reason}")
    if not backend.devices or "cpu" in backend.devices:
        return "cpu"
    if not torch.cuda.is_available():
        pytest.skip(f"{name}: runs on {', '.join(backend.devices)}, of which there is none here")
    return backend.devices[0]
