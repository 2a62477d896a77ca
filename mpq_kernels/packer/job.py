"""One checkpoint under one resolved plan: its parts (parts.py), how each is made, and the config and the report.

A part is read, quantized, packed, written, and let go of before the next one: one dense matrix is in memory at a time,
and of a file that is mapped only the tensor that is being read.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..calibrate import auto_round
from ..calibrate.auto_round import LearnedRounding
from ..calibrate.experts import in_walk_order
from ..calibrate.hessians import Calibrator
from ..calibrate.trial import check_walk
from ..checkpoint.config import IMPORT_FIRST, WEIGHTS_KEY, Float8Module, PackedModule, PackingConfig
from ..checkpoint.packed import PackedCheckpoint
from ..dense.checkpoint import DenseCheckpoint
from ..dense.conversions import Origin
from ..dense.decoded import DecodedTensor
from ..dense.linears import LinearSpec
from ..errors import CheckpointError, QuantizeError
from ..files.safetensors import Spec, nbytes
from ..format.float8 import FLOAT8, float8_error, to_float8
from ..format.reference import dequantize, weight_error
from ..format.weights import TORCH_DTYPES, PackedWeight, QuantizedWeight
from ..format.words import pack_weight
from ..plan.plan import Plan
from ..plan.resolve import ResolvedMember, ResolvedPlan, ResolvedWeight, float8_shape, resolve
from ..progress import Progress
from ..quantize import QUANTIZERS, check_weight, quantize_weight
from ..quantize.gptq import activation_order
from ..version import VERSION
from .journal import Finished
from .kept import kept_tensors
from .parts import Made, Part, Shard, Unit, digest, into_shards
from .refuse import check_recognised
from .report import ModuleReport, PackReport, large_parameters


class PackJob:
    """One packing: what is to be written, and the errors measured while it is."""

    def __init__(
        self,
        source: DenseCheckpoint,
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
        self.zero_groups: dict[str, int] = {}  # packed linear -> groups stored as zeros, where there are any
        self.perm: tuple[str, torch.Tensor] | None = None  # packed weight, and the permutation of its members
        self.before = hashlib.sha256()  # what the codes of the next part depend on besides its own
        self.kept = kept_tensors(source, resolved)
        self.done = 0
        members = [member for weight in resolved.weights for member in weight.members]
        self.total = sum(nbytes((kept.dtype, kept.shape)) for kept in self.kept.values())
        self.total += sum(self._weight_bytes(member.spec) for member in members)
        self.total += sum(self._weight_bytes(spec) for spec in resolved.floats.values())

    def shards(self, max_bytes: int) -> list[Shard]:
        """Packed modules in model order, those in float8, kept tensors by name: in files of `max_bytes` of tensors."""
        together = isinstance(self.calibrator, LearnedRounding)
        self.before = hashlib.sha256(repr(self.resolved.weights).encode() if together else b"")
        units = [self._packed_unit(weight) for weight in self.resolved.weights]
        units += [self._float8_unit(spec) for spec in self.resolved.floats.values()]
        units += [self._kept_unit(name, kept) for name, kept in sorted(self.kept.items())]
        try:
            return into_shards(units, max_bytes)
        except CheckpointError as error:
            raise CheckpointError(f"{self.source.path}: {error}") from error

    def _key(self, member: ResolvedMember, places: Mapping[str, tuple[int, int]], bias: torch.dtype | None) -> str:
        """Key of a linear's part: what the plan asks of it, and of all others on which its codes depend.

        With a text those are all that are quantized before it, since it is calibrated on what they make; auto-round
        tunes all of them together.
        """
        text = f"{[(name, count) for name, (_, count) in places.items()]} {bias} {member}".encode()
        if member.spec.embedding:  # quantized without the text, and not on the way of the calibration
            return hashlib.sha256(text).hexdigest()
        if isinstance(self.calibrator, Calibrator):
            self.before.update(text)
        return hashlib.sha256(self.before.digest() + text).hexdigest()

    def _packed_unit(self, weight: ResolvedWeight) -> Unit:
        specs: dict[str, Spec] = {
            f"{weight.name}.{key}": (TORCH_DTYPES[dtype], shape)
            for key, (dtype, shape) in weight.layout.tensor_specs().items()
        }
        bias = self._bias_dtype(weight)
        if bias is not None:
            specs[f"{weight.name}.bias"] = (bias, (weight.layout.out_features,))
        filled = dict.fromkeys(specs, 0)
        parts: list[Part] = []
        for member in weight.members:
            counts = {key: math.prod(shape) for key, (_, shape) in member.layout.tensor_specs().items()}
            if parts:
                counts.pop("perm", None)  # one for all members, written with the first
            if bias is not None:
                counts["bias"] = member.spec.out_features
            places = {f"{weight.name}.{key}": (filled[f"{weight.name}.{key}"], count) for key, count in counts.items()}
            for name, (_, count) in places.items():
                filled[name] += count
            made = partial(self._pack_member, weight, member)
            restored = partial(self._restore_member, weight, member)
            digests = partial(self._digests, member.spec)
            key = self._key(member, places, bias)
            parts.append(Part(f"packed {member.spec.name}", key, places, made, restored, digests))
        return Unit(specs, tuple(parts))

    def _kept_unit(self, name: str, kept: Origin) -> Unit:
        size = nbytes((kept.dtype, kept.shape))

        def digests() -> dict[str, str]:
            return {kept.tensor: digest([self.source.made(kept)])}

        def restore(tensors: Mapping[str, torch.Tensor], done: Finished) -> None:
            self._advance(size, name)

        def make() -> Made:
            value = self.source.made(kept)
            made = Made({name: value}, {kept.tensor: digest([value])})
            self._advance(size, name)
            return made

        places, spec = {name: (0, math.prod(kept.shape))}, (kept.dtype, kept.shape)
        return Unit({name: spec}, (Part(f"kept {name}", f"{kept.tensor} {spec}", places, make, restore, digests),))

    def _float8_unit(self, spec: LinearSpec) -> Unit:
        """A linear that the plan keeps in float8."""
        specs: dict[str, Spec] = {f"{spec.name}.{key}": s for key, s in float8_shape(spec).tensor_specs().items()}
        if spec.bias_tensor is not None:
            specs[f"{spec.name}.bias"] = (self.source.tensors[spec.bias_tensor].dtype, (spec.out_features,))

        def restore(tensors: Mapping[str, torch.Tensor], done: Finished) -> None:
            self._note(spec, 0.0 if done.error is None else done.error, 0)

        def make() -> Made:
            dense, bias = self.source.weight(spec), self.source.bias(spec)
            check_weight(dense, str(self.source.tensors[spec.tensor]))
            codes, scales = to_float8(dense)
            error = float8_error(dense, codes, scales)[0]
            tensors = {f"{spec.name}.qweight": codes, f"{spec.name}.scales": scales}
            tensors |= {} if bias is None else {f"{spec.name}.bias": bias}
            self._note(spec, error, 0)
            return Made(tensors, self._digests(spec, dense), error)

        places = {name: (0, math.prod(shape)) for name, (_, shape) in specs.items()}
        digests, key = partial(self._digests, spec), f"{FLOAT8} {specs}"
        return Unit(specs, (Part(f"float8 {spec.name}", key, places, make, restore, digests),))

    def _pack_member(self, weight: ResolvedWeight, member: ResolvedMember) -> Made:
        spec = member.spec
        quantized, inputs, error, zero_groups = self._codes(member)
        packed = pack_weight(quantized).tensors()
        del quantized
        if "perm" in packed:
            perm = packed.pop("perm")
            if self.perm is None or self.perm[0] != weight.name:
                self.perm = (weight.name, perm)
                packed["perm"] = perm
            elif not torch.equal(perm, self.perm[1]):
                raise QuantizeError(f"{weight.name}: {spec.name} got a permutation of its own")
        tensors = {f"{weight.name}.{key}": tensor for key, tensor in packed.items()}
        dtype, bias = self._bias_dtype(weight), self.source.bias(spec)
        if dtype is not None:  # a member without a bias adds nothing
            tensors[f"{weight.name}.bias"] = torch.zeros(spec.out_features, dtype=dtype) if bias is None else bias
        self._note(spec, error, zero_groups)
        return Made(tensors, inputs, error, zero_groups)

    def _codes(self, member: ResolvedMember) -> tuple[QuantizedWeight, dict[str, str], float, int]:
        """The codes of a linear; sha256 of what they are made of, their error, groups that are stored as zeros."""
        spec = member.spec
        dense = self.source.weight(spec)
        quantized, error = self._quantize(member, dense)
        zero_groups = sum(block.zero_groups for _, _, block in quantized.blocks)
        inputs = self._digests(spec, dense)
        del dense
        self.source.release_weight(spec)
        return quantized, inputs, error, zero_groups

    def _restore_member(
        self, weight: ResolvedWeight, member: ResolvedMember, tensors: Mapping[str, torch.Tensor], done: Finished
    ) -> None:
        spec = member.spec
        if f"{weight.name}.perm" in tensors:
            self.perm = (weight.name, tensors[f"{weight.name}.perm"])
        if isinstance(self.calibrator, Calibrator) and not spec.embedding:
            keys = [key for key in member.layout.tensor_specs() if key != "perm"]
            own = {key: tensors[f"{weight.name}.{key}"] for key in keys}
            if member.layout.permuted:
                assert self.perm is not None and self.perm[0] == weight.name
                own["perm"] = self.perm[1]
            self.calibrator.enter(spec.name)
            self.calibrator.set_weight(spec.name, dequantize(PackedWeight(member.layout, **own)))
        self._note(spec, 0.0 if done.error is None else done.error, done.zero_groups)

    def _note(self, spec: LinearSpec, error: float, zero_groups: int) -> None:
        self.errors[spec.name] = error
        if zero_groups:
            self.zero_groups[spec.name] = zero_groups
        self._advance(self._weight_bytes(spec), spec.name)

    def _digests(self, spec: LinearSpec, dense: torch.Tensor | None = None) -> dict[str, str]:
        """sha256 of what is read for a linear. dense: its weight, where it has been read already."""
        out = {spec.tensor: digest([self.source.weight(spec) if dense is None else dense])}
        bias = self.source.bias(spec)
        if bias is not None and spec.bias_tensor is not None:
            out[spec.bias_tensor] = digest([bias])
        return out

    def _quantize(self, member: ResolvedMember, weight: torch.Tensor) -> tuple[QuantizedWeight, float]:
        """The quantized weight [N, K] and its relative error."""
        spec = member.spec
        perm = None if member.perm is None else torch.tensor(member.perm, dtype=torch.int32)
        try:
            if spec.embedding:  # rows are looked up: there are no inputs to calibrate on
                method = QUANTIZERS[self.quantizer].for_embeddings or self.quantizer
                quantized = quantize_weight(weight, member.layout, perm, method, spec.name)
            elif isinstance(self.calibrator, LearnedRounding):
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
        if isinstance(self.calibrator, Calibrator) and not spec.embedding:
            self.calibrator.set_weight(spec.name, dequantize(quantized))
        return quantized, weight_error(weight, quantized).relative

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

    def packing(self) -> PackingConfig:
        """How the weights of the output are packed."""
        modules = {}
        for weight in self.resolved.weights:
            members = weight.member_rows() if weight.fused else None
            modules[weight.name] = PackedModule(
                weight.name,
                weight.layout,
                self._bias_dtype(weight) is not None,
                members,
                weight.experts,
                weight.embedding,
            )
        floats = {
            name: Float8Module(name, float8_shape(spec), spec.bias_tensor is not None)
            for name, spec in self.resolved.floats.items()
        }
        producer = {"name": "mpq_kernels", "version": VERSION}
        return PackingConfig(modules, dict(self.resolved.kept), self.quantizer, producer, floats)

    def carried(self) -> list[str]:
        """Files of the source that are carried along."""
        return self.source.other_files()

    def left(self) -> dict[str, str]:
        """Files of the source that are not, and why."""
        return self.source.left_files()

    def config(self) -> dict[str, Any]:
        """config.json of the output: that of the source, and how its weights are packed."""
        # auto_map names code files; none is carried along.
        config = {key: value for key, value in self.source.config.items() if key != "auto_map"}
        if not {config.get("dtype"), config.get("torch_dtype")} - {None, "auto"}:
            # Without it, transformers would take the first floating tensor's dtype, which may be that of scales.
            config["dtype"] = str(self.source.dtype).removeprefix("torch.")
        config[WEIGHTS_KEY] = IMPORT_FIRST
        config["quantization_config"] = self.packing().to_dict()
        return config

    def report(
        self, out: Path, written: PackedCheckpoint, carried: Sequence[str], unused: Sequence[str], resumed: int
    ) -> PackReport:
        """Sizes as they are on disk, errors as measured. carried: files, unused: tensors, resumed: parts."""
        size = written.size()
        return PackReport(
            out_dir=str(out),
            quantizer=self.quantizer,
            modules=(
                *(self._module_report(weight) for weight in self.resolved.weights),
                *(self._float8_report(spec) for spec in self.resolved.floats.values()),
            ),
            kept=dict(self.resolved.kept),
            packed=size.packed,
            kept_bytes=size.kept,
            bias_bytes=size.bias,
            file_bytes=size.files,
            source_bytes=sum(tensor.entry.nbytes for tensor in self.source.tensors.values()),
            files=tuple(file.name for file in written.files.files),
            copied=tuple(carried),
            left=self.left(),
            unused=tuple(unused),
            decoded=tuple(
                name
                for name, origin in self.kept.items()
                if any(isinstance(self.source.tensors[stored], DecodedTensor) for stored in origin.tensors)
            ),
            large=large_parameters(self.source, self.resolved, self.kept),
            parts=len(self.kept)
            + len(self.resolved.floats)
            + sum(len(weight.members) for weight in self.resolved.weights),
            resumed=resumed,
            unreached=tuple(self.calibrator.unreached) if isinstance(self.calibrator, Calibrator) else (),
            zero_groups=self.zero_groups,
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

    def _float8_report(self, spec: LinearSpec) -> ModuleReport:
        size, name = float8_shape(spec).size(), spec.name
        return ModuleReport(name, (name,), 8.0, size.bits_per_weight, size.total_bytes, {name: self.errors[name]})


def prepare(
    source: DenseCheckpoint,
    plan: Plan,
    quantizer: str,
    calibrated: bool,
    act_order: bool = False,
    allow_dense: bool = False,
    sample: Mapping[str, torch.Tensor] | None = None,
) -> ResolvedPlan:
    """The plan on the source's linears, in the order in which they are packed.

    No weight is read, but by the trial of a calibration where the model cannot be tried without them (trial.py).

    quantizer: a key of quantize.QUANTIZERS. calibrated: whether it looks at a text; act_order: whether it then chooses
    the order of the columns. allow_dense: go on where most of the model's matrices are not known as linears. sample:
    what it looks at in place of a text.

    Raises PlanError for a plan that does not fit, QuantizeError for what the quantizer or its calibration cannot do,
    CheckpointError for a model of which too little would be packed.
    """
    if not allow_dense:
        check_recognised(source)
    resolved, row = resolve(plan, source.packable()), QUANTIZERS[quantizer]
    if row.whole_model:
        auto_round.check_plan(resolved, source)
    if not calibrated or not resolved.weights:
        return resolved
    ordered = in_walk_order(in_free_order(resolved) if act_order else resolved, source)
    check_walk(source, ordered, sample)
    return resolved if row.whole_model else ordered


def in_free_order(resolved: ResolvedPlan) -> ResolvedPlan:
    """The same plan with a permutation of K, to be chosen from the calibration, in every weight that leaves it free.

    Its sizes are exact: a permutation takes K integers, whatever they are. Weights with a permutation in the plan, and
    those whose columns differ in width or kind, stay as they are: there the plan says which column is which. So do
    experts: those of one module are stored with one order of K, and each reads inputs of its own; and embeddings, which
    read none.
    """

    def free(weight: ResolvedWeight) -> bool:
        return (
            weight.experts is None
            and weight.embedding is None
            and not weight.layout.permuted
            and all(len(band) == 1 for band in weight.layout.bands())
        )

    def permuted(weight: ResolvedWeight) -> ResolvedWeight:
        members = tuple(replace(m, layout=replace(m.layout, permuted=True)) for m in weight.members)
        return replace(weight, members=members, layout=replace(weight.layout, permuted=True))

    return replace(resolved, weights=tuple(permuted(w) if free(w) else w for w in resolved.weights))
