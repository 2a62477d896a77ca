"""How transformers makes a model's parameters of stored tensors, followed by its own tables and code.

    stored tensors                           operations             parameters
    embed_out.weight                         (renamed)              lm_head.weight
    attn.qkv.weight                          Chunk                  q_proj.weight, k_proj.weight, v_proj.weight
    experts.<i>.w1.weight, .w3.weight        stack, Concatenate     experts.gate_up_proj

No family is named here. Shapes come from running a conversion without values; values are made when they are asked for,
of one matrix or of one expert at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from ..errors import CheckpointError
from ..files.shards import StoredTensor

Reader = Callable[..., torch.Tensor]  # (name) -> a stored tensor; (name, i) -> its i-th matrix alone, [1, ...]
STACK = "MergeModulelist"  # the operation that makes one tensor of a list, along a new first dimension
# Operations that treat every expert alike where all their dimensions are others than the first.
EXPERTWISE = {"Chunk", "Concatenate", "Interleave", "Split", "Transpose"}
PASSING = {"Inkling2LoopDequantizeExperts"}  # gives back a weight that comes without scales


@dataclass(frozen=True, eq=False)
class Conversion:
    """Stored tensors of which transformers makes parameters together.

    model: on the meta device, before anything is packed. converter: transformers' own. first: the parameter that it is
    known by. sources: pattern of the converter -> names, in transformers' order.
    """

    model: Any
    converter: Any
    first: str
    sources: dict[str, tuple[str, ...]]
    stored: Mapping[str, StoredTensor]

    @property
    def operations(self) -> tuple[tuple[str, int | None], ...]:
        """(name, dimension) of what is done, in order."""
        return tuple((type(op).__name__, getattr(op, "dim", None)) for op in self.converter.operations)

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of all stored tensors."""
        return tuple(name for names in self.sources.values() for name in names)

    def run(self, tensors: Mapping[str, list[torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Parameter -> value, of the tensors of each pattern. Raises whatever an operation raises."""
        converter = deepcopy(self.converter)
        for op in converter.operations:
            if getattr(op, "check_dims", False):  # it compares with the parameter, and may be given one expert of it
                op.check_dims = False
                if self.stored[self.tensors[0]].shape == tuple(self.model.get_parameter(self.first).shape):
                    op.dim1 = op.dim0  # nothing to transpose
        for pattern, held in tensors.items():
            for tensor in held:
                converter.add_tensor(self.first, self.first, pattern, tensor)
        made = converter.convert(self.first, model=self.model, config=self.model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Parameter -> shape; empty where `problem` says why the conversion cannot be followed."""
        return self._tried[0]

    @property
    def problem(self) -> str | None:
        """None, or why the conversion cannot be followed without values."""
        return self._tried[1]

    @cached_property
    def _tried(self) -> tuple[dict[str, tuple[int, ...]], str | None]:
        try:
            made = self.run(self._read(self._empty))
        except Exception as error:  # operations of any kind, on tensors of any shape
            names = ", ".join(name for name, _ in self.operations)
            return {}, f"transformers' conversion of {self.tensors[0]} ({names}) fails: {error}"
        return {name: tuple(value.shape) for name, value in made.items()}, None

    def one_expert(self, count: int) -> bool:
        """Whether expert i of `count` can be made of the i-th tensors, or of the i-th parts of the tensors, alone."""
        return all(self._expertwise(place, op, count) for place, op in enumerate(self.converter.operations))

    def _expertwise(self, place: int, op: Any, count: int) -> bool:
        kind = type(op).__name__
        whole = {name: [self.stored[each].shape for each in names] for name, names in self.sources.items()}
        if kind == STACK:
            return place == 0 and op.dim == 0 and all(len(shapes) == count for shapes in whole.values())
        if kind in PASSING:
            return len(self.sources) == 1
        dims = [getattr(op, name) for name in ("dim", "dim0", "dim1") if hasattr(op, name)]
        apart = self.operations[0][0] == STACK or all(
            len(shapes) == 1 and len(shapes[0]) == 3 and shapes[0][0] == count for shapes in whole.values()
        )
        return kind in EXPERTWISE and apart and bool(dims) and all(dim in (1, 2, -1, -2) for dim in dims)

    def value(self, target: str, read: Reader, expert: int | None = None) -> torch.Tensor:
        """A parameter; of all experts in it only one, with a first dimension of 1, where `expert` says so."""
        return self.run(self._read(read, expert))[target]

    def _read(self, read: Reader, expert: int | None = None) -> dict[str, list[torch.Tensor]]:
        if expert is None:
            return {pattern: [read(name) for name in names] for pattern, names in self.sources.items()}
        return {
            pattern: [read(names[0], expert) if len(names) == 1 else read(names[expert])]
            for pattern, names in self.sources.items()
        }

    def _empty(self, name: str) -> torch.Tensor:
        tensor = self.stored[name]
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


@dataclass(frozen=True, eq=False)
class Origin:
    """Where a parameter comes from: one stored tensor as it is, or what a conversion makes of several.

    tensors: all that are read. conversion, target: None and "" for a tensor as it is. expert: only this one of the
    experts in the parameter.
    """

    tensors: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    conversion: Conversion | None = None
    target: str = ""
    expert: int | None = None

    @property
    def tensor(self) -> str:
        """The first of the stored tensors."""
        return self.tensors[0]

    def read(self, read: Reader) -> torch.Tensor:
        """The value, of the stored tensors that `read` gives."""
        if self.conversion is None:
            return read(self.tensor) if self.expert is None else read(self.tensor, self.expert)
        return self.conversion.value(self.target, read, self.expert)

    def of_expert(self, index: int, count: int) -> Origin | None:
        """The origin of one expert of a 3-D parameter; None where it cannot be made without the others."""
        conversion, tensors = self.conversion, self.tensors
        if conversion is not None:
            if not conversion.one_expert(count):
                return None
            tensors = tuple(names[index] if len(names) == count else names[0] for names in conversion.sources.values())
        return replace(self, tensors=tensors, shape=(1, *self.shape[1:]), expert=index)


@dataclass(frozen=True)
class Origins:
    """Where all of a model comes from. by_parameter: of each parameter or buffer that has an origin.

    failed: parameter -> the conversion that makes it, where that cannot be followed without values.
    """

    by_parameter: dict[str, Origin]
    failed: dict[str, Conversion]


def find_origins(model: Any, stored: Mapping[str, StoredTensor]) -> Origins:
    """Match stored tensors with the parameters of a model on the meta device, as transformers does when it loads.

    Raises CheckpointError where this version of transformers has its tables elsewhere.
    """
    table = Table(model)
    plain: dict[str, Origin] = {}
    groups: dict[str, tuple[Any, dict[str, list[str]]]] = {}
    for name in table.in_order(stored):
        target, pattern = table.target(name)
        if target not in table.state:
            continue
        if pattern is None:
            plain.setdefault(target, Origin((name,), stored[name].shape, stored[name].dtype))
        else:
            groups.setdefault(target, (table.by_pattern[pattern], {}))[1].setdefault(pattern, []).append(name)
    out, failed = dict(plain), {}
    for first, (converter, held) in groups.items():
        # In the converter's own order: that of its patterns.
        sources = {pattern: tuple(held[pattern]) for pattern in converter.source_patterns if pattern in held}
        conversion = Conversion(model, converter, first, sources, stored)
        if conversion.problem is not None:
            failed[first] = conversion
        dtype = stored[conversion.tensors[0]].dtype
        for target, shape in conversion.shapes.items():
            out[target] = Origin(conversion.tensors, shape, dtype, conversion, target)
    return Origins(out, failed)


class Table:
    """transformers' renamings and converters of a model: stored name -> parameter."""

    def __init__(self, model: Any) -> None:
        """Raises CheckpointError where this version of transformers has its tables elsewhere."""
        try:
            from transformers.conversion_mapping import get_model_conversion_mapping
            from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key
            from transformers.core_model_loading import rename_source_key as rename
        except ImportError as error:
            raise CheckpointError(
                f"this version of transformers keeps its table of renamed tensors elsewhere ({error}): use one that "
                "docs/support.md names"
            ) from error
        transforms = get_model_conversion_mapping(model)
        self.renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        self.converters = [t for t in transforms if isinstance(t, WeightConverter)]
        self.by_pattern = {pattern: c for c in self.converters for pattern in c.source_patterns}
        self.state: dict[str, Any] = model.state_dict()
        self.prefix: str = model.base_model_prefix
        self._rename, self._key = rename, dot_natural_key

    def in_order(self, names: Iterable[str]) -> list[str]:
        """In the order of transformers, on which some of its renamings depend."""
        return sorted(names, key=self._key)

    def target(self, name: str) -> tuple[str, str | None]:
        """(the parameter that a stored tensor becomes or is part of, the pattern of the converter that makes it)."""
        found, pattern = self._rename(name, self.renamings, self.converters, self.prefix, self.state)
        if found not in self.state and name in self.state:  # it has the model's own name already
            found, pattern = self._rename(name, [], [], self.prefix, self.state)
        return found, pattern

    def spellings(self, parameter: str) -> tuple[str, str]:
        """A parameter's name without the base model's prefix, and with it."""
        return parameter.removeprefix(f"{self.prefix}."), f"{self.prefix}.{parameter}"
