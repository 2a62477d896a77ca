"""Runs both forms of the model without mpq_kernels: python run.py OPERATOR_LIBRARY OUT"""

import sys
from pathlib import Path

import torch

library, out = sys.argv[1], Path(sys.argv[2])
torch.ops.load_library(library)
prompt, expected = (list(map(int, line.split())) for line in (out / "expected.txt").read_text().splitlines())
runs = {"exported": torch.export.load(out / "program.pt2").module()}
if (out / "model.pt2").exists():
    runs["compiled"] = torch._inductor.aoti_load_package(str(out / "model.pt2"))
for name, run in runs.items():
    for batch in (1, 3):
        ids = torch.tensor([prompt] * batch)
        found = run(ids, torch.ones_like(ids)).argmax(-1).tolist()
        assert found == [expected] * batch, (name, found)
    print(name, *found[0])
assert not any(module.startswith(("mpq_kernels", "transformers")) for module in sys.modules)
