"""Several projections of one input as one packed weight, of different widths: q/k/v, gate/up.

The model keeps its modules. `FusedLinear` owns the packed tensors; each projection becomes a `FusedMember`, which holds
no tensor of its own:

    parent.qkv_proj  FusedLinear    rows  | q 3 bits | k 3 bits | v 4 bits |
    parent.q_proj    FusedMember    rows  ^^^^^^^^^^^^

The first member that is called with an x runs the whole weight in one call and keeps the other members' rows until they
ask for them with the same x; when that is not certain, a member runs its own rows, which gives the same bits. In a
graph of torch.compile backends/rows.py sees to it that the whole is computed once; torch.export runs this very code.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Unpack

import torch
from torch import nn

from ..backends.base import Product
from ..backends.rows import product_name
from ..errors import FormatError
from ..format.layout import Member, WeightLayout
from ..format.weights import PackedWeight
from .linear import PACKED_NAMES, LayerOptions, MixedLinear, PackedOptions, mark_initialized


def check_members(layout: WeightLayout, members: Sequence[Member]) -> None:
    """Raise FormatError unless the members tile the rows, in order, on cuts between row bands."""
    cuts = {segment.n0 for segment in layout.segments} | {layout.out_features}
    row = 0
    for member in members:
        if member.n0 != row or member.n1 <= member.n0 or member.n1 not in cuts:
            raise FormatError(
                f"member {member.name!r} has rows {member.n0}..{member.n1}: members must follow each other from row 0 "
                f"and end between row bands {sorted(cuts)}"
            )
        row = member.n1
    if row != layout.out_features:
        raise FormatError(f"members cover {row} of {layout.out_features} rows")
    if len({member.name for member in members}) != len(members):
        raise FormatError(f"members repeat a name: {[member.name for member in members]}")


class _Outputs:
    """Rows of one call that members have not asked for yet. Holds x weakly: a new x may get the old one's address."""

    def __init__(self, x: torch.Tensor, parts: list[torch.Tensor | None]) -> None:
        self.x = weakref.ref(x)
        self.version = x._version
        self.parts = parts

    def take(self, x: torch.Tensor, index: int) -> torch.Tensor | None:
        """The rows of member `index` if they were computed from this very x, unchanged, and not taken before."""
        if self.x() is not x or x._version != self.version:
            return None
        part, self.parts[index] = self.parts[index], None
        return part


class FusedLinear(MixedLinear):
    """A packed weight whose rows belong to several projections of the same input."""

    def __init__(
        self,
        layout: WeightLayout,
        members: Sequence[Member],
        bias: bool = False,
        **options: Unpack[LayerOptions],
    ) -> None:
        check_members(layout, members)
        super().__init__(layout, bias, **options)
        self.members = tuple(members)
        self._outputs: _Outputs | None = None
        # Of each member: first row and number of rows in each packed tensor (None: the whole), and its shape.
        self._member_rows = []
        for member in self.members:
            rows, parts = layout.rows(member.n0, member.n1)
            if not parts["zeros"][1]:
                parts["zeros"] = (0, 0)
            cuts = tuple(parts.get(name) for name in PACKED_NAMES)
            self._member_rows.append((cuts, (rows.segment_ints(), rows.out_features, rows.in_features)))

    @classmethod
    def from_members(
        cls,
        weight: PackedWeight,
        members: Sequence[Member],
        bias: torch.Tensor | None = None,
        **options: Unpack[PackedOptions],
    ) -> FusedLinear:
        """Fused layer over existing packed tensors, without a copy. bias: [N] or None."""
        layer = cls(weight.layout, members, bias is not None, device="meta", **options)
        layer.assign(weight, bias)
        return layer

    def forward(self, x: torch.Tensor, gate: torch.Tensor | None = None, *, index: int | None = None) -> torch.Tensor:
        """x: (..., K) fp32, fp16 or bf16. Returns (..., N) in x.dtype, or the rows of member `index` alone."""
        if index is None:
            return super().forward(x, gate)
        member, buffers, whole = self.members[index], self._buffers, self._parameters["bias"]
        if self._is_one_of_a_graph(x):
            tensors = (buffers["qweight"], buffers["scales"], buffers["zeros"], buffers["perm"])
            shape = (self._segments, self.out_features, self.in_features)
            y: torch.Tensor = torch.ops.mpq.linear_rows(
                self._product_name, x, *tensors, whole, *shape, member.n0, member.n1
            )
            return y
        cuts, shape = self._member_rows[index]
        tensors = (buffers["qweight"], buffers["scales"], buffers["zeros"], buffers["perm"])
        weight = tuple(
            tensor if tensor is None or cut is None else tensor.narrow(0, *cut)
            for tensor, cut in zip(tensors, cuts, strict=True)
        )
        bias = None if whole is None else whole[member.n0 : member.n1]
        return self._run(x, weight, bias, shape)

    def project(self, x: torch.Tensor, index: int) -> torch.Tensor:
        """Rows of member `index` of this layer applied to x: (..., K) -> (..., n1 - n0).

        The layer is called as a module, so that hooks of others, such as those that bring offloaded tensors, run.
        """
        # Under Dynamo, and where x does not count its in-place changes, there is no telling one x from another.
        if torch.compiler.is_dynamo_compiling() or x.is_inference() or (torch.is_grad_enabled() and x.requires_grad):
            return self(x, index=index)
        held = self._outputs
        part = held.take(x, index) if held is not None else None
        if part is None:
            y = self(x)
            parts: list[torch.Tensor | None] = [y[..., m.n0 : m.n1] for m in self.members]
            part, parts[index] = parts[index], None
            held = self._outputs = _Outputs(x, parts)
        if all(p is None for p in held.parts):  # type: ignore[union-attr]
            self._outputs = None
        return part  # type: ignore[return-value]

    def _is_one_of_a_graph(self, x: torch.Tensor) -> bool:
        """Whether Dynamo traces this call, for a graph that will run as it comes out of torch.compile."""
        if not torch.compiler.is_dynamo_compiling() or torch.compiler.is_exporting() or self._product_name is None:
            return False
        if self._buffers["qweight"].device != self._device:  # type: ignore[union-attr]
            return False
        bias = self._parameters["bias"]
        return not torch.is_grad_enabled() or not (x.requires_grad or (bias is not None and bias.requires_grad))

    def _take_products(self, linear: Product, grouped: Product) -> None:
        super()._take_products(linear, grouped)
        self._product_name = product_name(self._linear)

    def __getstate__(self) -> dict[str, object]:
        state = {key: value for key, value in super().__getstate__().items() if key != "_product_name"}
        return {**state, "_outputs": None}


class FusedMember(nn.Module):
    """A projection whose rows live in a FusedLinear. Stands where the nn.Linear stood; has no state of its own."""

    _is_hf_initialized = True  # as MixedLinear's

    def __init__(self, fused: FusedLinear, index: int) -> None:
        super().__init__()
        self._fused = (fused,)  # in a tuple, so that it is not registered as a child a second time
        self.index = index
        member = fused.members[index]
        self.in_features, self.out_features = fused.in_features, member.n1 - member.n0

    @property
    def fused(self) -> FusedLinear:
        """The layer that owns the tensors."""
        return self._fused[0]

    @property
    def packed(self) -> PackedWeight:
        """This projection's rows of the packed weight, as views."""
        member = self.fused.members[self.index]
        return self.fused.packed.rows(member.n0, member.n1)

    @property
    def weight(self) -> torch.Tensor:
        """Stand-in [N, K], as MixedLinear.weight."""
        return self.fused.stand_in(self.out_features)

    @property
    def bias(self) -> torch.Tensor | None:
        """This projection's part of the bias, or None."""
        member, bias = self.fused.members[self.index], self.fused.bias
        return None if bias is None else mark_initialized(bias[member.n0 : member.n1])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (..., K) fp32, fp16 or bf16. Returns (..., N) in x.dtype."""
        return self.fused.project(x, self.index)

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """W [N, K] of this projection, as MixedLinear.dequantize."""
        member = self.fused.members[self.index]
        return self.fused.dequantize(dtype)[member.n0 : member.n1]

    def extra_repr(self) -> str:
        """Shape, rows and owner."""
        member = self.fused.members[self.index]
        bits = "|".join(dict.fromkeys(str(s.bits) for s in self.packed.layout.segments))
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bits={bits}, "
            f"rows {member.n0}..{member.n1} of a fused weight"
        )
