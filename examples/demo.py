"""Packs a small trained model under a mixed plan, checks it, writes with it, and compares it with uniform widths.

    checkpoint + plan --pack--> demo_output/<plan> --verify--> load --> perplexity, speed, text

Run by `make demo`; needs no network and no GPU. Perplexity is over the first 20,000 tokens of gutenberg_val.txt, three
books that the model never saw, by the convention of `mpq_kernels.evaluate.perplexity`. Speed is greedy decoding of one
sequence. Models compute in fp32; for the original's speed its own bf16 is shown too.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import mpq_kernels as mpq
from mpq_kernels.checkpoint.packed import PackedCheckpoint
from mpq_kernels.cli.doctor import examine
from mpq_kernels.dense.checkpoint import DenseCheckpoint
from mpq_kernels.evaluate.perplexity import perplexity
from mpq_kernels.evaluate.speed import generation_speed

EXAMPLES = Path(__file__).resolve().parent
MODEL = EXAMPLES / "gutenberg-6m"
TEXT = EXAMPLES / "gutenberg_val.txt"
MIXED_PLAN = EXAMPLES / "mixed_plan.json"
OUTPUT = EXAMPLES.parent / "demo_output"
PROMPT = "The old house stood at the end of the road, and"
PPL_TOKENS = 20_000
SPEED_TOKENS = 64
HEADER = ("plan", "bits/weight", "linears, bytes", "files, bytes", "perplexity", "tokens/s")


@dataclass(frozen=True)
class Row:
    """One line of the table. bpw: stored bits for each linear weight. linear_bytes, file_bytes: as stored."""

    plan: str
    bpw: float
    linear_bytes: int
    file_bytes: int
    ppl: float
    tokens_per_s: float

    def cells(self) -> tuple[str, ...]:
        """The line in words."""
        sizes = (f"{self.bpw:.3f}", f"{self.linear_bytes:,}", f"{self.file_bytes:,}")
        return (self.plan, *sizes, f"{self.ppl:.2f}", f"{self.tokens_per_s:.0f}")


def plans() -> dict[str, mpq.Plan]:
    """Name -> plan of every packed model of the demo."""
    uniform = {f"uniform {bits} bits": mpq.Plan.uniform(MODEL, bits=bits, group_size=64) for bits in (4, 3, 2)}
    return {"mixed plan": mpq.Plan.from_file(MIXED_PLAN), **uniform}


def pack_and_verify(name: str, plan: mpq.Plan) -> PackedCheckpoint:
    """Pack MODEL under a plan into OUTPUT and read the result back, values included."""
    out = OUTPUT / name.replace(" ", "-")
    start = time.perf_counter()
    report = mpq.pack(MODEL, out, plan, quantizer="hqq", overwrite=True)
    checkpoint = PackedCheckpoint.open(out)
    checkpoint.verify_values()
    seconds = time.perf_counter() - start
    print(f"  {name}: {len(report.modules)} packed weights, {report.bpw:.3f} bits each, verified, {seconds:.1f} s")
    return checkpoint


def measure_ppl(model: Any, tokenizer: Any) -> float:
    """Perplexity of a model on TEXT."""
    return perplexity(model, tokenizer, TEXT.read_text(encoding="utf-8"), window=256, max_tokens=PPL_TOKENS).ppl


def measure_speed(model: Any, tokenizer: Any) -> float:
    """Generated tokens/s."""
    return generation_speed(model, tokenizer, PROMPT, SPEED_TOKENS).generated_tokens_per_s


def original_rows(tokenizer: Any) -> list[Row]:
    """The dense model; its weights are the same in both dtypes, so its perplexity is measured once."""
    source = DenseCheckpoint.open(MODEL)
    linears = sum(source.tensors[spec.tensor].entry.nbytes for spec in source.linears() if not spec.is_head)
    files = sum(file.stat().st_size for file in source.files.files)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    ppl = measure_ppl(model, tokenizer)
    rows = [Row("original, run in fp32", 16.0, linears, files, ppl, measure_speed(model, tokenizer))]
    model = model.to(torch.bfloat16)
    return [*rows, Row("original, run in bf16", 16.0, linears, files, ppl, measure_speed(model, tokenizer))]


def packed_row(name: str, checkpoint: PackedCheckpoint, tokenizer: Any) -> Row:
    """A packed model, sizes recomputed from its tensors."""
    size = checkpoint.size()
    model = mpq.load(checkpoint.path, dtype=torch.float32)
    ppl, speed = measure_ppl(model, tokenizer), measure_speed(model, tokenizer)
    return Row(name, size.packed.bits_per_weight, size.packed.total_bytes, size.files, ppl, speed)


def write_text(checkpoint: PackedCheckpoint, tokenizer: Any) -> str:
    """PROMPT and 60 tokens more, sampled by the packed model."""
    model = mpq.load(checkpoint.path, dtype=torch.float32)
    torch.manual_seed(1)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=60, do_sample=True, temperature=0.7, pad_token_id=0)
    return str(tokenizer.decode(ids[0], skip_special_tokens=True))


def print_rows(rows: list[Row]) -> None:
    """The table, as Markdown."""
    lines = [HEADER, *(row.cells() for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rule = ["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])]
    for index, line in enumerate(lines):
        cells = [line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]
        print("| " + " | ".join(cells) + " |")
        if not index:
            print("|" + "|".join(rule) + "|")


def main() -> None:
    """The whole demo."""
    start = time.perf_counter()
    logging.disable_progress_bar()
    OUTPUT.mkdir(exist_ok=True)
    machine, isa = examine()["machine"], torch.ops.mpq.cpu_isa()
    print(f"{machine['processor']}, {machine['cores']} cores, {isa} kernels, torch {torch.__version__}\n")
    print(f"packing {MODEL.name} into {OUTPUT.name}/")
    packed = {name: pack_and_verify(name, plan) for name, plan in plans().items()}
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    print(f"\n{write_text(packed['mixed plan'], tokenizer)}\n    (written by the model packed under the mixed plan)\n")
    rows = original_rows(tokenizer)
    rows += [packed_row(name, checkpoint, tokenizer) for name, checkpoint in packed.items()]
    print_rows(rows)
    print(f"\n{time.perf_counter() - start:.0f} s in all")


if __name__ == "__main__":
    main()
