"""Fixtures: poisoned memory, every instruction set of the CPU backend in turn."""

import pytest
import torch
from cli_cases import run, space  # noqa: F401  (fixtures of the command-line tests)

import mpq_kernels.ops  # noqa: F401  (registers the operators)

ISAS = torch.ops.mpq.cpu_isas().split(",")


@pytest.fixture(autouse=True)
def poison():
    """torch.empty gives NaN, so that an output element which nobody wrote is found; every test has the same seed."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=ISAS)
def isa(request):
    """Each instruction set that works on this processor."""
    before = torch.ops.mpq.cpu_isa()
    torch.ops.mpq.set_cpu_isa(request.param)
    yield request.param
    torch.ops.mpq.set_cpu_isa(before)
