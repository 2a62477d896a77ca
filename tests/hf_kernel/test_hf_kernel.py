"""The kernel that `make hf-kernel` lays out, loaded by Hugging Face's `kernels`. `make test-hf-kernel` has it."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mpq_kernels.backends.ops  # noqa: F401  (registers the operators)
from mpq_kernels.format.codes import LAYOUT_ID
from mpq_kernels.format.words import pack_weight
from tests.made.weights import mixed_weight

kernels = pytest.importorskip("kernels", reason="needs kernels: make test-hf-kernel")

ROOT = Path(__file__).resolve().parents[2]
CODE = """
import sys, torch
from pathlib import Path
from kernels import get_local_kernel
kernel = get_local_kernel(Path(sys.argv[1]), backend="cpu")
assert "mpq_kernels" not in sys.modules
given = torch.load(sys.argv[2])
out = {"layout": kernel.layout_id(), "y": kernel.linear(*given), "int8": kernel.linear_int8(*given)}
out["dense"] = kernel.dequantize(*given[1:5], *given[6:], torch.float32)
torch.save(out, sys.argv[3])
"""


def layout():
    """hf_kernel/layout.py, which is no part of the package."""
    spec = importlib.util.spec_from_file_location("layout", ROOT / "examples" / "hf_kernel" / "layout.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def laid_out(tmp_path_factory):
    out = tmp_path_factory.mktemp("kernel")
    return out, layout().write(out)


def test_loaded_alone_it_gives_the_same_bits(laid_out, tmp_path):
    packed, x = pack_weight(mixed_weight(permuted=True)), torch.randn(5, 320)
    shape = packed.layout.segment_ints(), packed.layout.out_features, packed.layout.in_features
    given = (x, packed.qweight, packed.scales, packed.zeros, packed.perm, None, *shape)
    torch.save(given, tmp_path / "given")
    command = [sys.executable, "-c", CODE, laid_out[0], tmp_path / "given", tmp_path / "out"]
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    out = torch.load(tmp_path / "out")
    assert out["layout"] == LAYOUT_ID
    assert torch.equal(out["y"], torch.ops.mpq.linear(*given))
    assert torch.equal(out["int8"], torch.ops.mpq.linear_int8(*given))
    assert torch.equal(out["dense"], torch.ops.mpq.dequantize(*given[1:5], *shape, torch.float32))


def test_beside_the_package(laid_out):
    """Operators that are registered are not registered again."""
    kernel = kernels.get_local_kernel(laid_out[0], backend="cpu")
    assert kernel.linear is torch.ops.mpq.linear and set(kernel.__all__) <= set(dir(kernel))


def test_metadata_is_what_the_package_reads(laid_out):
    from kernels._rust import Build, Metadata

    metadata = Metadata.read_from_file(laid_out[1] / "metadata.json")
    assert str(metadata.name) == "mpq-kernels" and metadata.version == 1 and metadata.license == "Apache-2.0"
    assert metadata.python_depends == [] and str(metadata.kernels_minver) == layout().LEAST_KERNELS
    assert [str(b).lower() for b in Build.open(laid_out[0]).general.backends] == ["cpu"]
    assert json.loads((laid_out[1] / "metadata.json").read_text())["id"].startswith("_mpq_kernels_cpu_")


def test_other_machines_are_refused(laid_out, tmp_path):
    """The name of the folder keeps the library from machines that it is not for."""
    other = tmp_path / "build" / "torch-stable-abi299-cpu-x86_64-linux"
    other.parent.mkdir()
    other.symlink_to(laid_out[1])
    with pytest.raises(FileNotFoundError, match="too new|does not match"):
        kernels.get_local_kernel(tmp_path, backend="cpu")
