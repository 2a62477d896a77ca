"""Writes what host.cpp and run.py need: python export.py PACKED_DIR OUT

OUT/program.pt2    the exported program, for run.py
OUT/model.pt2      the same compiled by AOTInductor, for host.cpp and run.py
OUT/expected.txt   token ids of a prompt, and the token that the model finds most likely after each
"""

import sys
from pathlib import Path

import torch

import mpq_kernels as mpq
from mpq_kernels.hf.export import compile_package, export_logits, operator_library

model = mpq.load(sys.argv[1])
out = Path(sys.argv[2])
out.mkdir(parents=True, exist_ok=True)
program = export_logits(model)
torch.export.save(program, out / "program.pt2")
compile_package(program, out / "model.pt2")
ids = torch.arange(3, 14)[None]
with torch.no_grad():
    likely = model(ids, use_cache=False).logits.argmax(-1)
(out / "expected.txt").write_text("\n".join(" ".join(map(str, row.tolist())) for row in (ids[0], likely[0])) + "\n")
print(operator_library())
