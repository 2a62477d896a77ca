"""Lays out the built operators as a kernel for the package `kernels`: `python examples/hf_kernel/layout.py OUT`.

    OUT/build.toml
    OUT/build/torch-stable-abi211-cpu-x86_64-linux/    __init__.py, _ops.so, metadata.json

The name of the folder says what the library needs: LibTorch's stable ABI of torch 2.11 or later, and this machine. (The
shorter `torch-cpu` is for kernels without compiled code: it would be chosen on any machine.)
"""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OPERATORS = ROOT / "mpq_kernels" / "_ops.so"
STABLE_ABI = "211"  # of torch: setup.py, TORCH_TARGET_VERSION
LEAST_KERNELS = "0.17.0"


def variant() -> str:
    """Name of the folder for this machine."""
    return f"torch-stable-abi{STABLE_ABI}-cpu-{platform.machine()}-{platform.system().lower()}"


def write(out: Path) -> Path:
    """Write the kernel to `out`, which may be there from before; returns the folder of the variant."""
    if not OPERATORS.exists():
        raise SystemExit(f"{OPERATORS.name} was not built: make install")
    general = tomllib.loads((ROOT / "examples" / "hf_kernel" / "build.toml").read_text())["general"]
    folder = out / "build" / variant()
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / "examples" / "hf_kernel" / "build.toml", out)
    shutil.copy(ROOT / "examples" / "hf_kernel" / "module.py", folder / "__init__.py")
    shutil.copy(OPERATORS, folder)
    digest = hashlib.sha256(OPERATORS.read_bytes() + (folder / "__init__.py").read_bytes()).hexdigest()
    metadata = {
        "id": f"_{general['name'].replace('-', '_')}_cpu_{digest[:12]}",
        "name": general["name"],
        "version": general["version"],
        "license": general["license"],
        "kernels-minver": LEAST_KERNELS,
        "python-depends": [],
        "backend": {"type": "cpu"},
    }
    (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
    return folder


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/hf_kernel/layout.py OUT")
    print(write(Path(sys.argv[1])))
