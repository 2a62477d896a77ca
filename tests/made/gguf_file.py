"""A GGUF file of a few tensors, as ggml's programs read it."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

# name -> (type of ggml, dimensions from the outermost in, bytes)
Tensors = Mapping[str, tuple[int, tuple[int, ...], bytes]]
ALIGNMENT = 32


def text(value: str) -> bytes:
    """Length and bytes."""
    return struct.pack("<Q", len(value.encode())) + value.encode()


def gguf_bytes(architecture: str, tensors: Tensors, values: Mapping[str, Any] | None = None) -> bytes:
    """The whole file. values: further texts and uint32 of its header."""
    known = {"general.architecture": architecture, "tokenizer.ggml.tokens": ["a", "b"], "x": 1.5} | dict(values or {})
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(known))
    for name, value in known.items():
        head += text(name) + _value(value)
    data = b""
    for name, (kind, shape, held) in tensors.items():
        head += text(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *reversed(shape))
        head += struct.pack("<IQ", kind, len(data))
        data += held + b"\0" * (-len(held) % ALIGNMENT)
    return head + b"\0" * (-len(head) % ALIGNMENT) + data


def write_gguf(path: Path, architecture: str, tensors: Tensors) -> None:
    """To disk."""
    path.write_bytes(gguf_bytes(architecture, tensors))


def dense(values: np.ndarray) -> tuple[int, tuple[int, ...], bytes]:
    """A tensor in fp32."""
    return 0, values.shape, values.astype("<f4").tobytes()


def _value(value: Any) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", 8) + text(value)
    if isinstance(value, list):
        return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(text, value))
    return struct.pack("<If", 6, value) if isinstance(value, float) else struct.pack("<II", 4, value)
