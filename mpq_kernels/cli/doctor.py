"""`mpq doctor`: what is installed, what the machine has, which backend works and why another does not."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import typer

from ..version import VERSION
from .options import JsonFlag
from .output import print_json, print_table

AMX_WORKS = "works: products of 16 tokens and more, of bf16 and of int8 activations, run on the tile registers"
CUDA_FILE = "_cuda.so"
PATH_KEYS = ("activations", "tokens_from", "kernel")
PACKAGES = ("torch", "triton", "transformers", "safetensors", "tokenizers", "pydantic", "typer", "numpy")


def command(as_json: JsonFlag = False) -> None:
    """Report versions, processor, GPUs, compiled parts and backends, to paste into a bug report.

    Exit code 1 when a compiled part that should load does not, or no backend works.
    """
    data = examine()
    if as_json:
        print_json(data)
    else:
        _print(data)
    if not data["healthy"]:
        raise typer.Exit(1)


def examine() -> dict[str, Any]:
    """Everything that `mpq doctor --json` prints; a part that fails becomes its reason in words."""
    backends = examine_backends()
    parts = compiled_parts(backends)
    works = any(item["reason"] is None and not item["only_on_request"] for item in backends)
    return {
        "packages": _packages(),
        "machine": _machine(),
        "gpus": _gpus(),
        "triton_configurations": _triton_configurations(),
        "nvcc": _nvcc(),
        "compiled": parts,
        "backends": backends,
        "healthy": works and not any(part["broken"] for part in parts.values()),
    }


def compiled_parts(backends: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Name -> {file, layout_id, reason, broken} of the three compiled parts, after `examine_backends`.

    reason: None when it is loaded and fits. broken: whether it should be; the CUDA kernels may be absent, and are not
    loaded where nothing can run them.
    """
    return {"operators": _operators(), "host": _host(), "cuda": _cuda(backends)}


def examine_backends() -> list[dict[str, Any]]:
    """One entry for each backend; reason None when it works here."""
    from ..errors import MPQError

    try:
        from ..backends import BACKENDS
    except MPQError as error:
        return [{"name": "all", "summary": "", "devices": [], "only_on_request": False, "reason": str(error)}]
    return [
        {
            "name": backend.name,
            "summary": backend.summary,
            "devices": list(backend.devices),
            "only_on_request": backend.only_on_request,
            "reason": backend.why_unavailable(),
        }
        for backend in BACKENDS.values()
    ]


def _operators() -> dict[str, Any]:
    from ..errors import MPQError

    try:
        import torch

        from ..backends import ops
    except (MPQError, ImportError) as error:
        nothing: dict[str, Any] = {"file": None, "layout_id": None, "isas": [], "isa": None, "amx": None, "paths": []}
        return nothing | {"reason": str(error), "broken": True}
    return {
        "file": str(ops.LIBRARY),
        "layout_id": torch.ops.mpq.layout_id(),
        "isas": torch.ops.mpq.cpu_isas().split(","),
        "isa": torch.ops.mpq.cpu_isa(),
        "amx": torch.ops.mpq.cpu_isa_refusal("amx") or AMX_WORKS,
        "paths": [dict(zip(PATH_KEYS, row.split(","), strict=True)) for row in torch.ops.mpq.cpu_paths().splitlines()],
        "reason": None,
        "broken": False,
    }


def _host() -> dict[str, Any]:
    from ..format.codes import LAYOUT_ID

    try:
        # By name at run time: there is no source file for a type checker to find.
        module = importlib.import_module("mpq_kernels._host")
    except ImportError as error:
        missing = f"{error}: build it with `pip install .` in the source tree"
        return {"file": None, "layout_id": None, "reason": missing, "broken": True}
    same = module.LAYOUT_ID == LAYOUT_ID
    reason = None if same else f"built for another layout than {LAYOUT_ID}: build it again (`pip install .`)"
    return {"file": module.__file__, "layout_id": module.LAYOUT_ID, "reason": reason, "broken": not same}


def _cuda(backends: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The library of CUDA kernels, which the backend loads once torch finds a device to run it."""
    import torch

    from ..format.codes import LAYOUT_ID

    file = Path(__file__).parents[1] / CUDA_FILE
    loaded = hasattr(torch.ops.mpq, "cuda_layout_id")
    layout_id = torch.ops.mpq.cuda_layout_id() if loaded else None
    found: dict[str, Any] = {"file": str(file) if file.exists() else None, "layout_id": layout_id}
    if not file.exists():
        return found | {"reason": "not built: that takes nvcc 12.4 or later (`pip install .`)", "broken": False}
    if layout_id == LAYOUT_ID:
        return found | {"reason": None, "broken": False}
    why = next((item["reason"] for item in backends if item["name"] in ("cuda", "all")), None)
    device = torch.version.cuda is not None and torch.cuda.is_available()
    return found | {"reason": f"not loaded: {why}", "broken": device}


def _triton_configurations() -> str:
    """Where the Triton kernels' configurations come from: `mpq tune`, or the table of the package."""
    from ..errors import MPQError

    try:
        from ..backends.triton import configs

        file = configs.cache_file()
        devices = sorted(configs.read(file)) if file.exists() else []
    except (MPQError, ImportError, OSError) as error:
        return f"unknown ({error})"
    if not devices:
        return "the package's table (no `mpq tune` has been run)"
    return f"measured for {', '.join(devices)} ({file})"


def _packages() -> dict[str, str | None]:
    import torch

    own = {"mpq_kernels": VERSION, "python": platform.python_version()}
    # Which build of torch it is (+cpu, +cu130) stands only in the module.
    return own | {name: _version(name) for name in PACKAGES} | {"torch": str(torch.__version__)}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _machine() -> dict[str, Any]:
    import torch

    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "system": platform.platform(),
        "processor": _processor(),
        "cores": affinity,
        "torch_threads": torch.get_num_threads(),
    }


def _processor() -> str:
    """Marketing name of the processor where the system tells it, else its architecture."""
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _gpus() -> dict[str, Any]:
    """CUDA devices that torch sees, or why it sees none."""
    import torch

    if not torch.cuda.is_available():
        built = "was built without CUDA" if torch.version.cuda is None else f"has CUDA {torch.version.cuda}, finds none"
        return {"devices": [], "reason": f"torch {torch.__version__} {built}"}
    names = []
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        names.append(f"{torch.cuda.get_device_name(index)} (sm_{major}{minor})")
    return {"devices": names, "reason": None}


def _nvcc() -> str | None:
    """Last line of `nvcc --version`, None when there is no nvcc."""
    home = os.environ.get("CUDA_HOME")
    path = shutil.which("nvcc") or (shutil.which("nvcc", path=f"{home}/bin") if home else None)
    if path is None:
        return None
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return f"{path} does not run ({error})"
    return f"{path}: {done.stdout.strip().splitlines()[-1] if done.stdout.strip() else 'no version'}"


def _print(data: dict[str, Any]) -> None:
    print_table(None, ["<package", "<version"], [[k, v or "not installed"] for k, v in data["packages"].items()])
    rows = list(data["machine"].items())
    gpus = data["gpus"]
    rows.append(("gpus", ", ".join(gpus["devices"]) or f"none: {gpus['reason']}"))
    rows.append(("triton configurations", data["triton_configurations"]))
    rows.append(("nvcc", data["nvcc"] or "not found (only needed to build the CUDA kernels)"))
    print_table(None, ["<machine", "<"], rows)
    parts = [[n, p["layout_id"], p["file"] or "", p["reason"] or "loaded"] for n, p in data["compiled"].items()]
    print_table(None, ["<compiled part", "<layout", "<file", "<state"], parts)
    operators = data["compiled"]["operators"]
    if operators["isa"]:
        print(f"instruction sets: {', '.join(operators['isas'])}; using {operators['isa']}")
        print(f"amx: {operators['amx']}\n")
        paths = [[p["activations"], p["tokens_from"], p["kernel"]] for p in operators["paths"]]
        print_table(None, ["<activations", "tokens, from", "<kernels on this processor"], paths)
    rows = []
    for item in data["backends"]:
        state = item["reason"] or ("works, only when asked for" if item["only_on_request"] else "works")
        rows.append([item["name"], ", ".join(item["devices"]) or "any", state, item["summary"]])
    print_table(None, ["<backend", "<devices", "<state", "<what it is"], rows)
