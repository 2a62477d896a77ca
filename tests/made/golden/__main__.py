"""`python -m tests.made.golden [NAME ...]`: make golden files again, with the libraries of the group `oracles`."""

import importlib
import sys
from pathlib import Path

MAKERS = [path.stem for path in sorted(Path(__file__).parent.glob("[!_]*.py"))]

for name in sys.argv[1:] or [maker.replace("_", "-") for maker in MAKERS]:
    module = importlib.import_module(f"tests.made.golden.{name.replace('-', '_')}")
    module.make().save(name)
    print(name)
