"""Modules that stand in for nn.Linear and for experts, and how they take their place in a model in memory.

May import: backends, checkpoint, quantize, plan, dense, format.
Gives: MixedLinear, FusedLinear and its members, MixedEmbedding, Float8Linear, GroupedLinear, PackedExperts, GatedMLP,
replace.replace_linears (quantizes a model in memory), install.install_modules (empty modules for a loader).
"""

from .embedding import MixedEmbedding
from .experts import GroupedLinear, PackedExperts
from .float8 import Float8Linear
from .fused import FusedLinear
from .linear import MixedLinear

__all__ = ["Float8Linear", "FusedLinear", "GroupedLinear", "MixedEmbedding", "MixedLinear", "PackedExperts"]
