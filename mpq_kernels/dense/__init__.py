"""The dense model: its checkpoint on disk, its linears and experts, and which stored tensor feeds which of them.

May import: files, format. Knows nothing of plans and of packed weights.
Gives: DenseCheckpoint, LinearSpec, names.list_linears, experts.model_experts.
"""

from .checkpoint import DenseCheckpoint
from .linears import LinearSpec

__all__ = ["DenseCheckpoint", "LinearSpec"]
