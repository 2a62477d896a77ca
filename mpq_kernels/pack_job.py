"""What packing writes: tensors grouped into units, units into files, and the config that describes them.

    Unit     a packed module, or one kept tensor: its specs are known at once, its tensors are made when they are due
    Shard    the units of one output file
    PackJob  one checkpoint under one resolved plan

A packed module is written member by member: one dense matrix is in memory, and the scales and zeros of the module,
which are stored behind all of its codes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from . import packing
from .autoround import LearnedRounding
from .calibrate import Calibrator
from .checkpoint import PackedCheckpoint
from .errors import CheckpointError, QuantizeError
from .linearspec import LinearSpec
from .quantize import quantize_weight
from .quantize.gptq import activation_order
from .reference import dequantize
from .report import ModuleReport, PackReport, large_parameters
from .resolve import ResolvedMember, ResolvedPlan, ResolvedWeight
from .safetensors_io import Pieces, Spec, nbytes, storage_order
from .schema import PackedModule, PackingConfig
from .shards import SINGLE_FILE
from .source import SourceCheckpoint
from .version import VERSION
from .weights import TORCH_DTYPES, QuantizedWeight

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Unit:
    """Tensors that are made together: a packed module, or one kept tensor."""

    specs: dict[str, Spec]
    make: Callable[[], Mapping[str, torch.Tensor | Pieces]]


@dataclass(frozen=True)
class Shard:
    """One output file."""

    name: str
    units: tuple[Unit, ...]

    @property
    def specs(self) -> dict[str, Spec]:
        """Tensors of the file, unit by unit."""
        return {name: spec for unit in self.units for name, spec in unit.specs.items()}

    def tensors(self) -> Iterator[tuple[str, torch.Tensor | Pieces]]:
        """(name, tensor or its pieces) in storage order; a unit is made when its first tensor is due.

        The large tensors of a unit are stored side by side, so only its bias and permutation may have to wait.
        """
        owners = {name: unit for unit in self.units for name in unit.specs}
        made: dict[str, torch.Tensor | Pieces] = {}
        for name in storage_order(self.specs):
            if name not in made:
                made.update(owners[name].make())
            yield name, made.pop(name)


def index_of(shards: Sequence[Shard]) -> dict[str, Any]:
    """The index of several files, as transformers reads it."""
    total = sum(nbytes(spec) for shard in shards for spec in shard.specs.values())
    placed = {name: shard.name for shard in shards for name in shard.specs}
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(placed.items()))}


class PackJob:
    """One packing: what is to be written, and the errors measured while it is."""

    def __init__(
        self,
        source: SourceCheckpoint,
        resolved: ResolvedPlan,
        quantizer: str,
        progress: Progress | None,
        calibrator: Calibrator | LearnedRounding | None = None,
    ) -> None:
        self.source = source
        self.resolved = resolved
        self.quantizer = quantizer
        self.progress = progress
        self.calibrator = calibrator
        self.errors: dict[str, float] = {}
        self.kept = _kept_tensors(source, resolved)
        self.done = 0
        members = [member for weight in resolved.weights for member in weight.members]
        self.total = sum(source.tensors[name].entry.nbytes for name in self.kept.values())
        self.total += sum(self._weight_bytes(member.spec) for member in members)

    def shards(self, max_bytes: int) -> list[Shard]:
        """Packed modules in model order, then kept tensors by name, in files of at most `max_bytes` of tensors."""
        units = [self._packed_unit(weight) for weight in self.resolved.weights]
        units += [self._kept_unit(name, stored) for name, stored in sorted(self.kept.items())]
        names = [name for unit in units for name in unit.specs]
        if len(names) != len(set(names)):
            twice = next(name for name in names if names.count(name) > 1)
            raise CheckpointError(
                f"{self.source.path}: {twice} names a kept and a packed tensor; choose another fuse name"
            )
        groups: list[list[Unit]] = [[]]
        filled = 0
        for unit in units:
            size = sum(map(nbytes, unit.specs.values()))
            if groups[-1] and filled + size > max_bytes:
                groups.append([])
                filled = 0
            groups[-1].append(unit)
            filled += size
        if len(groups) == 1:
            return [Shard(SINGLE_FILE, tuple(groups[0]))]
        count = len(groups)
        return [Shard(f"model-{i:05}-of-{count:05}.safetensors", tuple(g)) for i, g in enumerate(groups, 1)]

    def _packed_unit(self, weight: ResolvedWeight) -> Unit:
        specs: dict[str, Spec] = {
            f"{weight.name}.{key}": (TORCH_DTYPES[dtype], shape)
            for key, (dtype, shape) in weight.layout.tensor_specs().items()
        }
        bias = self._bias_dtype(weight)
        if bias is not None:
            specs[f"{weight.name}.bias"] = (bias, (weight.layout.out_features,))
        return Unit(specs, lambda: self._pack_weight(weight))

    def _kept_unit(self, name: str, stored: str) -> Unit:
        def make() -> dict[str, torch.Tensor]:
            tensor = self.source.read(stored)
            self._advance(self.source.tensors[stored].entry.nbytes, name)
            return {name: tensor}

        tensor = self.source.tensors[stored]
        return Unit({name: (tensor.dtype, tensor.shape)}, make)

    def _pack_weight(self, weight: ResolvedWeight) -> dict[str, torch.Tensor | Pieces]:
        """Every tensor of one packed module, by full name; codes are made as they are taken, the others after them."""
        rest: dict[str, list[torch.Tensor]] = {key: [] for key in weight.layout.tensor_specs()}

        def words() -> Pieces:
            for member in weight.members:
                packed = packing.pack(self._quantize(member)).tensors()
                yield packed.pop("qweight")
                perm = packed.pop("perm", None)
                if perm is not None and not rest["perm"]:
                    rest["perm"].append(perm)
                elif perm is not None and not torch.equal(perm, rest["perm"][0]):
                    raise QuantizeError(f"{weight.name}: {member.spec.name} got a permutation of its own")
                for key, tensor in packed.items():
                    rest[key].append(tensor)

        def later(key: str) -> Pieces:
            while rest[key]:
                yield rest[key].pop(0)

        tensors: dict[str, torch.Tensor | Pieces] = {f"{weight.name}.{key}": later(key) for key in rest}
        tensors[f"{weight.name}.qweight"] = words()
        dtype = self._bias_dtype(weight)
        if dtype is not None:
            tensors[f"{weight.name}.bias"] = self._biases(weight, dtype)
        return tensors

    def _biases(self, weight: ResolvedWeight, dtype: torch.dtype) -> Pieces:
        for member in weight.members:
            bias = self.source.bias(member.spec)
            # A member without a bias adds nothing.
            yield torch.zeros(member.spec.out_features, dtype=dtype) if bias is None else bias

    def _quantize(self, member: ResolvedMember) -> QuantizedWeight:
        spec = member.spec
        perm = None if member.perm is None else torch.tensor(member.perm, dtype=torch.int32)
        weight = self.source.weight(spec)
        try:
            if isinstance(self.calibrator, LearnedRounding):
                quantized = self.calibrator.weight(spec.name)
            else:
                hessian = None if self.calibrator is None else self.calibrator.hessian(spec.name)
                if hessian is not None and perm is None and member.layout.permuted:
                    perm = activation_order(hessian)
                quantized = quantize_weight(weight, member.layout, perm, self.quantizer, spec.name, hessian)
        except QuantizeError as error:
            raise QuantizeError(f"{self.source.tensors[spec.tensor]}: {error}") from error
        if quantized.layout != member.layout:
            raise QuantizeError(f"{spec.name}: quantizer {self.quantizer!r} made another layout than the plan asks for")
        restored = dequantize(quantized)
        self.errors[spec.name] = relative_error(weight, restored)
        if isinstance(self.calibrator, Calibrator):
            self.calibrator.set_weight(spec.name, restored)
        self._advance(self._weight_bytes(spec), spec.name)
        return quantized

    def _weight_bytes(self, spec: LinearSpec) -> int:
        return spec.out_features * spec.in_features * self.source.tensors[spec.tensor].dtype.itemsize

    def _advance(self, count: int, name: str) -> None:
        self.done += count
        if self.progress is not None:
            self.progress(self.done, self.total, name)

    def _bias_dtype(self, weight: ResolvedWeight) -> torch.dtype | None:
        biases = [m.spec.bias_tensor for m in weight.members if m.spec.bias_tensor is not None]
        dtypes = {self.source.tensors[name].dtype for name in biases}
        if len(dtypes) > 1:
            raise CheckpointError(f"{self.source.path}: the biases fused into {weight.name} have dtypes {dtypes}")
        return dtypes.pop() if dtypes else None

    def config(self) -> dict[str, Any]:
        """config.json of the output: that of the source, and how its weights are packed."""
        modules = {}
        for weight in self.resolved.weights:
            members = weight.member_rows() if weight.fused else None
            modules[weight.name] = PackedModule(
                weight.name, weight.layout, self._bias_dtype(weight) is not None, members, weight.experts
            )
        packing_config = PackingConfig(modules, dict(self.resolved.kept), self.quantizer, f"mpq_kernels {VERSION}")
        # auto_map names code files; none is carried along.
        config = {key: value for key, value in self.source.config.items() if key != "auto_map"}
        if not {config.get("dtype"), config.get("torch_dtype")} - {None, "auto"}:
            # Without it, transformers would take the first floating tensor's dtype, which may be that of scales.
            config["dtype"] = str(self.source.dtype).removeprefix("torch.")
        config["quantization_config"] = packing_config.to_dict()
        return config

    def report(self, out: Path, written: PackedCheckpoint, companions: Sequence[Path]) -> PackReport:
        """Sizes as they are on disk, errors as measured."""
        size = written.size()
        return PackReport(
            out_dir=str(out),
            quantizer=self.quantizer,
            modules=tuple(self._module_report(weight) for weight in self.resolved.weights),
            kept=dict(self.resolved.kept),
            packed=size.packed,
            kept_bytes=size.kept,
            bias_bytes=size.bias,
            file_bytes=size.files,
            source_bytes=sum(tensor.entry.nbytes for tensor in self.source.tensors.values()),
            files=tuple(file.name for file in written.files.files),
            copied=tuple(path.name for path in companions),
            left=self.source.left_files(),
            large=large_parameters(self.source, self.resolved, self.kept),
        )

    def _module_report(self, weight: ResolvedWeight) -> ModuleReport:
        names = tuple(member.spec.name for member in weight.members)
        size = weight.layout.size()
        return ModuleReport(
            weight.name,
            names,
            size.codes / size.weights,
            size.bits_per_weight,
            size.total_bytes,
            {name: self.errors[name] for name in names},
        )


def in_free_order(resolved: ResolvedPlan) -> ResolvedPlan:
    """The same plan with a permutation of K, to be chosen from the calibration, in every weight that leaves it free.

    Its sizes are exact: a permutation takes K integers, whatever they are. Weights with a permutation in the plan, and
    those whose columns differ in width or kind, stay as they are: there the plan says which column is which.
    """

    def free(weight: ResolvedWeight) -> bool:
        return not weight.layout.permuted and all(len(band) == 1 for band in weight.layout.bands())

    def permuted(weight: ResolvedWeight) -> ResolvedWeight:
        members = tuple(replace(m, layout=replace(m.layout, permuted=True)) for m in weight.members)
        return replace(weight, members=members, layout=replace(weight.layout, permuted=True))

    return replace(resolved, weights=tuple(permuted(w) if free(w) else w for w in resolved.weights))


def relative_error(weight: torch.Tensor, restored: torch.Tensor) -> float:
    """||W - restored W|| / ||W|| (Frobenius), summed in fp64; 0 for a weight of zeros that stays so."""
    wanted = weight.float()
    off = torch.linalg.vector_norm(wanted - restored, dtype=torch.float64).item()
    norm = torch.linalg.vector_norm(wanted, dtype=torch.float64).item()
    if norm == 0.0:
        return 0.0 if off == 0.0 else math.inf
    return float(off / norm)


def _kept_tensors(source: SourceCheckpoint, resolved: ResolvedPlan) -> dict[str, str]:
    """Name in the output -> stored name, of every tensor that stays as it is.

    The tied embedding always stays: it is looked up by row even where the head is packed.
    """
    packed = [member.spec for weight in resolved.weights for member in weight.members]
    dropped = {spec.tensor for spec in packed} | {spec.bias_tensor for spec in packed}
    kept = {name: name for name in source.tensors if name not in dropped}
    tied = source.model_map
    if tied.tied_source is not None and tied.tied_target is not None:
        kept.pop(tied.tied_source, None)
        kept[tied.tied_target] = tied.tied_source
    return kept
