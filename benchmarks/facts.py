"""Where and with what a figure was measured: every results file begins with these facts."""

from __future__ import annotations

import datetime
import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from mpq_kernels.version import VERSION

PEER_PACKAGES = ("humming-kernels", "gemlite", "bitsandbytes", "torchao", "hqq", "cuda-bindings", "matplotlib")


def facts(device: torch.device) -> dict[str, Any]:
    """Where and with what the numbers were measured."""
    from mpq_kernels.cli.doctor import examine

    state = examine()
    about = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": str(device),
        "gpus": state["gpus"]["devices"],
        "processor": state["machine"]["processor"],
        "system": platform.system() + " " + platform.release(),
        "threads": torch.get_num_threads(),
        "isa": state["compiled"]["operators"]["isa"],
        "load_average_before": load_average(),
        "packages": state["packages"],
        "mpq_kernels": VERSION,
        "commit": commit(),
    }
    if device.type == "cuda":
        about["packages"] = about["packages"] | {name: _version(name) for name in PEER_PACKAGES}
        about |= {"driver": _driver(), "cuda": torch.version.cuda, "nvcc": state["nvcc"]}
        about["cudnn"] = torch.backends.cudnn.version()
    return about


def commit() -> str | None:
    """Of the checkout, or MPQ_COMMIT where the checkout has no history."""
    words = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    done = subprocess.run(words, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return done.stdout.strip() or os.environ.get("MPQ_COMMIT") or None


def load_average() -> float | None:
    """Of the last minute."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _driver() -> str | None:
    """As nvidia-smi gives it."""
    path = shutil.which("nvidia-smi")
    if path is None:
        return None
    words = [path, "--query-gpu=driver_version,clocks.max.sm,clocks.max.mem", "--format=csv,noheader"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.SubprocessError) as error:
        return f"nvidia-smi: {error}"
    return done.stdout.strip() or None
