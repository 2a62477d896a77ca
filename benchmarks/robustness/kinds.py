"""The kinds of a campaign, each in the file of its name."""

from __future__ import annotations

from . import configs, faults, foreign, headers, imports, models, numbers, operators, plans, records, values
from .campaign import Kind

KINDS: dict[str, Kind] = {
    "plans": Kind("plans of ours: read, resolved, written, read again", plans.prepare, 150_000),
    "foreign": Kind("plans of other programs: read and resolved", foreign.prepare, 150_000),
    "imports": Kind("quantized checkpoints of other programs: read, dequantized", imports.prepare, 100_000, 1000),
    "headers": Kind("safetensors files: headers read, tensors mapped", headers.prepare, 300_000),
    "index": Kind("indexes of shards: files found and opened", headers.prepare_index, 120_000),
    "configs": Kind("quantization_config: packed directories opened", configs.prepare, 60_000),
    "journal": Kind("journals of packings: opened and gone on with", records.prepare_journal, 150_000),
    "manifest": Kind("manifests: read, files compared", records.prepare_manifest, 80_000),
    "values": Kind("values of packed tensors: verified, multiplied", values.prepare, 20_000, 1000),
    "texts": Kind("texts for calibration: read, tokenized", values.prepare_texts, 10_000, 1000),
    "operators": Kind("calls of the CPU's operators with hostile tensors and tables", operators.prepare, 50_000, 1000),
    "numbers": Kind("products of numbers at the edges, on every instruction set", numbers.prepare, 50_000, 1000),
    "models": Kind("config.json of models: packed and loaded", models.prepare, 6_000, 200, seconds=20.0),
    "faults": Kind(
        "kills, signals, full disks, changed files while packing, loading, running", faults.prepare, 500, 50, 30.0
    ),
}
