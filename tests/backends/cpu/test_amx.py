"""AMX: chosen by itself where it works, refused with a reason, the right instructions, the bits of the other kernels.

That its kernels compute the right thing on machines without AMX is shown by tests/cpp/test_tiles.cpp.
"""

import itertools
import platform
import re
import shutil
import subprocess
import sys

import pytest
import torch

from mpq_kernels.backends import ops
from mpq_kernels.format.words import pack_weight
from tests.made.weights import mixed_weight, random_weight

REFUSAL = torch.ops.mpq.cpu_isa_refusal("amx")


def product(isa, x, packed):
    weight = (packed.qweight, packed.scales, packed.zeros, packed.perm)
    layout = packed.layout
    torch.ops.mpq.set_cpu_isa(isa)
    return torch.ops.mpq.linear_int8(x, *weight, None, layout.segment_ints(), layout.out_features, layout.in_features)


@pytest.mark.skipif(bool(REFUSAL), reason=f"amx: {REFUSAL}")
def test_the_bits_of_avx512vnni(int8_isas):
    weights = (mixed_weight(permuted=True), random_weight(1100, 256, 4, 32), random_weight(70, 640, 3, 80))
    for weight, tokens in itertools.product(weights, (15, 16, 17, 33, 129, 401)):
        packed = pack_weight(weight)
        x = torch.randn(tokens, packed.layout.in_features)
        assert torch.equal(product("amx", x, packed), product("avx512vnni", x, packed))


@pytest.mark.skipif(not REFUSAL, reason="this machine has AMX")
def test_a_refusal_says_why_and_changes_nothing(int8_isas):
    before = torch.ops.mpq.cpu_isa()
    with pytest.raises(RuntimeError, match=re.escape(f"amx cannot be used here: {REFUSAL}; choose one of {before}")):
        torch.ops.mpq.set_cpu_isa("amx")
    assert torch.ops.mpq.cpu_isa() == before and "amx" not in int8_isas


def test_the_first_that_works_is_the_default():
    code = "import torch, mpq_kernels.backends.ops; print(torch.ops.mpq.cpu_isa(), torch.ops.mpq.cpu_isas())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    default, names = done.stdout.split()
    assert default == names.split(",")[0] and (default == "amx") == (not REFUSAL)
    assert all(torch.ops.mpq.cpu_isa_refusal(name) == "" for name in names.split(","))


@pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="AMX is of x86-64")
@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump (binutils)")
def test_machine_code():
    """Signed x times unsigned codes, and bf16, into four registers of sums, for full steps and tails; nothing else."""
    text = subprocess.run(["objdump", "-d", str(ops.LIBRARY)], capture_output=True, text=True, check=True).stdout
    found = set(re.findall(r"\t((?:ldtilecfg|sttilecfg|tilerelease|tilezero|tileload|tilestore|tdp)\w*)", text))
    assert found == {"ldtilecfg", "tilerelease", "tilezero", "tileloadd", "tilestored", "tdpbsud", "tdpbf16ps"}
    for name in ("tdpbsud", "tdpbf16ps"):
        products = set(re.findall(rf"\t{name} %tmm(\d),%tmm(\d),%tmm(\d)", text))
        assert products == {(codes, x, sums) for codes, x in ("54", "76") for sums in "0123"}
