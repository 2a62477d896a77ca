"""The CUDA kernels of csrc/cuda: tensor cores, every width, group and segment, compute capability 8.0 and later.

The library is loaded once a device is there to run it; `why_unavailable` says in words why it cannot. The kernels count
on tensor cores that multiply subnormal operands exactly (csrc/cuda/unpack.cuh): every device shows that it does before
it gets its first layer.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch

from ..errors import UnsupportedError
from ..format.codes import FORMATS, LAYOUT_ID
from ..format.weights import QuantizedBlock, QuantizedWeight
from ..format.words import pack_weight
from . import ops  # noqa: F401  (defines the operators)
from .base import Backend

LIBRARY = Path(__file__).parents[1] / "_cuda.so"
OLDEST_CAPABILITY = (8, 0)


@cache
def why_unavailable() -> str | None:
    """None when the CUDA kernels work on every visible device, else the reason. Touches the devices."""
    if not LIBRARY.exists():
        return f"this build has no {LIBRARY.name}: put nvcc 12.4 or later on the PATH and build again (`pip install .`)"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA"
    if not torch.cuda.is_available():
        return "no CUDA device"
    reason = _load() or _why_not_driver(*torch.ops.mpq.cuda_versions())
    for index in range(torch.cuda.device_count()):
        reason = reason or _why_not_device(index)
    return reason


def warmup(device: torch.device | str | int | None = None) -> None:
    """Load every CUDA kernel onto `device` (default: the current one), so that no later call does.

    Raises UnsupportedError where the kernels cannot run.
    """
    reason = why_unavailable()
    if reason is not None:
        raise UnsupportedError(f"no CUDA kernels to warm up: {reason}")
    index = torch.device("cuda", device).index if isinstance(device, int) else torch.device(device or "cuda").index
    torch.ops.mpq.cuda_warmup(torch.cuda.current_device() if index is None else index)


def _load() -> str | None:
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        return f"{LIBRARY.name} does not load under torch {torch.__version__} ({error})"
    built = torch.ops.mpq.cuda_layout_id()
    if built != LAYOUT_ID:
        return (
            f"{LIBRARY.name} was built for layout {built}, this package has {LAYOUT_ID}: build again (`pip install .`)"
        )
    return None


def _why_not_driver(runtime: int, driver: int) -> str | None:
    """Why a driver does not serve the CUDA runtime in the library. Versions: 1000 major + 10 minor.

    A driver serves every minor version of its own major version, and all older ones.
    https://docs.nvidia.com/deploy/cuda-compatibility/
    """
    if driver // 1000 >= runtime // 1000:
        return None
    built, served = (f"{version // 1000}.{version % 1000 // 10}" for version in (runtime, driver))
    return (
        f"{LIBRARY.name} was built with CUDA {built}, and the driver serves CUDA {served}: update the driver, or build "
        f"again with nvcc {driver // 1000}.x (`CUDA_HOME=... pip install .`)"
    )


def _why_not_device(index: int) -> str | None:
    name, capability = torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
    if capability < OLDEST_CAPABILITY:
        return f"cuda:{index} ({name}) has compute capability {capability[0]}.{capability[1]}; the kernels need 8.0"
    try:
        torch.ops.mpq.cuda_warmup(index)
        exact = all(_is_exact(index, dtype) for dtype in (torch.float16, torch.bfloat16))
    except RuntimeError as error:
        return f"the kernels do not run on cuda:{index} ({name}): {error}"
    return None if exact else f"the tensor cores of cuda:{index} ({name}) do not multiply subnormal operands exactly"


def _is_exact(index: int, dtype: torch.dtype) -> bool:
    """Whether every code of every width comes back from a product with one-hot tokens."""
    scales, zeros = torch.ones(64, 1, dtype=torch.float16), torch.zeros(64, 1, dtype=torch.uint8)
    for bits, rule in FORMATS.items():
        codes = (torch.arange(64 * 64).view(64, 64) * 37 % (rule.max_code + 1)).to(torch.uint8)
        packed = pack_weight(QuantizedWeight.uniform(QuantizedBlock(bits, codes, scales, zeros)))
        moved = packed.to(f"cuda:{index}")
        x = torch.eye(64, dtype=dtype, device=f"cuda:{index}")
        for tokens in (8, 16, 32, 64):  # every kernel that multiplies tiles
            y = torch.ops.mpq.linear(
                x[:tokens], moved.qweight, moved.scales, moved.zeros, None, None, moved.layout.segment_ints(), 64, 64
            )
            if not torch.equal(y.T.cpu(), codes[:, :tokens].to(dtype)):
                return False
    return True


BACKEND = Backend(
    name="cuda",
    summary="CUDA kernels on packed weights; a dense product for many tokens",
    devices=("cuda",),
    linear=torch.ops.mpq.linear.default,
    grouped=torch.ops.mpq.grouped_linear.default,
    dequantize=torch.ops.mpq.dequantize.default,
    embedding=torch.ops.mpq.embedding.default,
    silu_mul_linear=torch.ops.mpq.silu_mul_linear.default,
    why_unavailable=why_unavailable,
)
