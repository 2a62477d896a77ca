"""Fixtures: poisoned memory, every instruction set of the CPU backend in turn."""

import pytest
import torch

import mpq_kernels.backends.ops  # noqa: F401  (registers the operators)
from tests.made.commands import run, space  # noqa: F401  (fixtures of the command-line tests)
from tests.made.compiled import fresh, without_inductor  # noqa: F401  (fixtures of tests that compile)

ISAS = torch.ops.mpq.cpu_isas().split(",")


@pytest.fixture(autouse=True)
def poison():
    """torch.empty gives NaN, so that an output element which nobody wrote is found; every test has the same seed and
    the instruction set of the process, whatever an earlier one chose.
    """
    torch.ops.mpq.set_cpu_isa(ISAS[0])
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


# Those with an instruction for int8 or bf16 products differ from the others in these only.
EXACT_ISAS = [name for name in ISAS if not name.endswith(("vnni", "amx", "bf16"))]
INT8_ISAS = [name for name in ISAS if not name.endswith("bf16")]
PAIR_ISAS = [name for name in ISAS if name in ("amx", "avx512bf16")]


@pytest.fixture(params=EXACT_ISAS)
def isa(request):
    """Each instruction set that works on this processor, for exact products."""
    yield from _use(request.param)


@pytest.fixture(params=PAIR_ISAS or [torch.ops.mpq.cpu_isa()])
def bf16_isa(request):
    """Each with an instruction for bf16 products, else the one that serves bf16; `isa` has the others."""
    yield from _use(request.param)


@pytest.fixture(params=INT8_ISAS)
def int8_isa(request):
    """Each instruction set that works on this processor, for products with int8 activations."""
    yield from _use(request.param)


@pytest.fixture
def int8_isas():
    """The same in one test, which sets each in turn, so that what it compares with is computed once."""
    before = torch.ops.mpq.cpu_isa()
    yield INT8_ISAS
    torch.ops.mpq.set_cpu_isa(before)


def _use(name):
    before = torch.ops.mpq.cpu_isa()
    torch.ops.mpq.set_cpu_isa(name)
    yield name
    torch.ops.mpq.set_cpu_isa(before)
