"""Typed errors. Every message says what is wrong, where, why, and what to do about it."""

from __future__ import annotations


class MPQError(Exception):
    """Base of every error that this package raises on purpose."""


class FormatError(MPQError, ValueError):
    """A width, group size, segment or tensor does not fit the packed layout (docs/format.md)."""


class PlanError(MPQError, ValueError):
    """A plan is malformed or does not fit the model that it is applied to."""


class QuantizeError(MPQError, ValueError):
    """A weight cannot be quantized as asked: NaN or Inf in it, a scale out of range, an unknown method."""


class CheckpointError(MPQError, ValueError):
    """A checkpoint on disk is missing, truncated, malformed, unsafe or of an unknown version."""


class UnsupportedError(MPQError, RuntimeError):
    """No backend, or not this one, can do what was asked; the message lists every reason."""
