"""Checkpoints of other programs, mutated: configs, headers, metadata, values; GGUF files byte by byte."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save

from mpq_kernels.format.reference import dequantize
from mpq_kernels.imports.formats import AUTO, FORMATS, find_format
from mpq_kernels.imports.gguf_file import TYPES
from mpq_kernels.imports.stored import Stored

from .campaign import Run
from .headers import mutate_file
from .mutate import mutate_bytes, mutate_json

GOLDEN = Path(__file__).parents[2] / "tests" / "imports" / "golden"
KNOWN = ("bits", "group_size", "sym", "checkpoint_format", "gptq", "gptq_v2", "gptq_p", "version", "gemm", "gemv",
         "quant_method", "awq", "auto-round", "compressed-tensors", "config_groups", "targets", "weights", "num_bits",
         "Linear", "re:m", "format", "pack-quantized", "int-quantized", "packing_format", "mode", "hqq", "torchao",
         "quanto", "m", "_type", "_data", "target_dtype", "int4", "Int8Tensor", "desc_act", "actorder")  # fmt: skip
Case = tuple[str, dict[str, Any], dict[str, str] | None, dict[str, torch.Tensor]]


def _cases() -> list[Case]:
    """(format, quantization_config, metadata, tensors) of every golden weight."""
    out = []
    for path in sorted(GOLDEN.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            tensors: dict[str, dict[str, torch.Tensor]] = {}
            for key in file.keys():  # noqa: SIM118  (it is no dict)
                case, _, name = key.partition("|")
                tensors.setdefault(case, {})[name] = file.get_tensor(key)
            for case, row in json.loads(file.metadata()["cases"]).items():
                out.append((path.stem, row["config"], row.get("metadata"), tensors[case]))
    return out


def _gguf(config: dict[str, Any], blocks: torch.Tensor) -> bytes:
    """A file of one weight."""
    name, kind = b"blk.0.ffn_up.weight", config["type"]
    head = b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + struct.pack("<Q", 20) + b"general.architecture"
    head += struct.pack("<IQ", 8, 5) + b"qwen2" + struct.pack("<Q", len(name)) + name
    head += struct.pack("<IQQIQ", 2, config["cols"], len(blocks), kind, 0)
    return head + b"\0" * (-len(head) % 32) + blocks.numpy().tobytes()


def _changed(chance: Random, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Other values, shapes or dtypes of some tensors."""
    out = dict(tensors)
    for name in chance.sample(list(out), chance.choice((0, 0, 1, min(2, len(out))))):
        tensor = out[name]
        changes = (
            lambda t: t.reshape(-1)[: max(1, t.numel() // 2)],
            lambda t: t.reshape(-1),
            lambda t: t[None],
            lambda t: t.float() if not t.is_floating_point() else t.to(torch.int32),
            lambda t: torch.full_like(t, float("nan")) if t.is_floating_point() else torch.full_like(t, 2**6 - 1),
            lambda t: torch.zeros_like(t),
            lambda t: t.double(),
            lambda t: torch.empty(0, dtype=t.dtype),
            lambda t: -t if t.dtype in (torch.int32, torch.int64, torch.int8) else t,
        )
        out[name] = chance.choice(changes)(tensor).contiguous()
    if chance.random() < 0.1:
        out.pop(chance.choice(list(out)))
    return out


def prepare(folder: Path) -> Run:
    """Cases: a directory opened, its format found out or said, every weight read and dequantized."""
    cases = _cases()
    assert {name for name, *_ in cases} >= set(FORMATS) - {"mxfp4"}  # decoded.py reads its headers
    assert TYPES

    def run(chance: Random) -> str:
        name, config, metadata, tensors = chance.choice(cases)
        home = Path("import")
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir()
        said: bytes = json.dumps({"quantization_config": config}).encode()
        if chance.random() < 0.5:
            said = mutate_json(chance, {"quantization_config": config}, KNOWN)
        (home / "config.json").write_bytes(said)
        if name == "gguf":
            whole = _gguf(config, tensors["m.weight"])
            (home / "model.gguf").write_bytes(mutate_bytes(chance, whole) if chance.random() < 0.9 else whole)
        else:
            if metadata is not None and chance.random() < 0.5:
                metadata = {
                    key: mutate_json(chance, json.loads(value), KNOWN).decode("utf-8", "replace")
                    for key, value in metadata.items()
                }
            whole = save(_changed(chance, tensors), metadata)
            (home / "model.safetensors").write_bytes(mutate_file(chance, whole) if chance.random() < 0.3 else whole)
        stored = Stored.open(home)
        likely = name if name in FORMATS else "compressed-tensors"
        form = find_format(stored, chance.choice((AUTO, likely, likely, chance.choice(list(FORMATS)))))
        found = FORMATS[form].read(stored)
        for weight in found.weights.values():
            made = weight.read(stored.files)
            assert dequantize(made).shape == (weight.layout.out_features, weight.layout.in_features)
        return "read"

    return run
