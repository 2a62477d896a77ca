"""Values of packed tensors in their file, mutated: scales, zeros, words, permutations; and texts for calibration."""

from __future__ import annotations

import shutil
from pathlib import Path
from random import Random

import torch

from mpq_kernels.calibrate.calibration import Calibration
from mpq_kernels.checkpoint.packed import PackedCheckpoint
from mpq_kernels.format import reference

from .campaign import Run
from .mutate import TEXTS, mutate_bytes
from .operators import ISAS
from .world import make_packed

ROOT = Path(__file__).parents[2]
WORDS = (b"\x00\x7e", b"\x00\x7c", b"\xff\xff", b"\x80\x7f", b"\x00\x00\xc0\x7f", b"\xff\xff\xff\x7f",
         b"\x00\x00\x00\x80", b"\x01\x00", b"\x7f\x00\x00\x00", b"\xff")  # fmt: skip


def prepare(folder: Path) -> Run:
    """Cases: a packed file with changed data, its values verified, one module multiplied as `load` would."""
    packed = make_packed(folder)
    whole = (packed / "model.safetensors").read_bytes()
    places = [stored.entry for name, stored in PackedCheckpoint.open(packed).tensors.items()
              if name.rpartition(".")[2] in ("scales", "zeros", "perm", "qweight", "bias")]  # fmt: skip

    def run(chance: Random) -> str:
        path = Path("packed")
        if not path.exists():
            shutil.copytree(packed, path)
        data = bytearray(whole)
        for _ in range(chance.choice((1, 1, 2, 8))):
            entry = chance.choice(places)
            at = entry.start + chance.randrange(entry.nbytes)
            new = chance.choice((*WORDS, chance.randbytes(4), bytes(64)))[: entry.end - at]
            at -= at % len(new) if at - at % len(new) >= entry.start else 0
            data[at : at + len(new)] = new
        (path / "model.safetensors").write_bytes(data)
        opened = PackedCheckpoint.open(path)
        opened.verify_values()
        torch.ops.mpq.set_cpu_isa(chance.choice(ISAS))
        name = chance.choice(list(opened.modules))
        weight = opened.weight(name)
        layout = weight.layout
        x = torch.randn(3, layout.in_features, generator=torch.Generator().manual_seed(chance.randrange(2**31)))
        table = (layout.segment_ints(), layout.out_features, layout.in_features)
        y = torch.ops.mpq.linear(x, weight.qweight, weight.scales, weight.zeros, weight.perm, None, *table)
        good = (y.double() - reference.linear(x, weight)).abs() <= reference.error_bound(x, weight)
        assert bool((good | ~torch.isfinite(y)).all())
        assert bool(good.all()) or float(weight.scales.abs().max()) > 1e30
        return "multiplied"

    return run


def prepare_texts(folder: Path) -> Run:
    """Cases: `Calibration.from_file` and the token rows of its text, with the tokenizer of the example."""
    model = ROOT / "examples" / "gutenberg-6m"
    text = (ROOT / "examples" / "gutenberg_val.txt").read_bytes()[:4000]

    class Config:
        """What rows asks of a model's config."""

        max_position_embeddings, vocab_size = 256, 10**6

    Calibration(text=text.decode("utf-8", "ignore")).rows(model, Config)

    def run(chance: Random) -> str:
        data = mutate_bytes(chance, text)
        if chance.random() < 0.3:
            data = chance.choice(TEXTS).encode("utf-8", "surrogatepass") * chance.choice((0, 1, 50))
        path = Path("text.txt")
        path.write_bytes(data)
        rows = Calibration.from_file(path, window=chance.choice((1, 16, 256))).rows(model, Config)
        assert rows.dtype == torch.int64 and rows.dim() == 2 and int(rows.min()) >= 0
        return "read"

    return run
