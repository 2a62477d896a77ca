"""`quantization_config` in a packed checkpoint's config.json: what is packed, how, and what was kept and why.

    {"quant_method": "mpq", "format_version": 2, "layout_id": "mpq2-...",
     "producer": {"name": "mpq_kernels", "version": "0.1.0"}, "quantizer": "hqq",
     "layouts": [layout, ...],                                     each once, in the order of first use
     "modules": {"model.layers.0.mlp.down_proj": {"layout": 0, "bias": false, "members": null},
                 "model.layers.0.self_attn.qkv_proj": {"layout": 1, "bias": true,
                     "members": [["q_proj", 0, 64], ["k_proj", 64, 96], ["v_proj", 96, 128]]},
                 "model.layers.1.mlp.experts.down": {"layout": 2, "bias": false,
                     "members": [["0.down_proj", 0, 64], ["1.down_proj", 64, 128]],
                     "experts": {"module": "model.layers.1.mlp.experts", "count": 2}},
                 "model.embed_tokens": {"layout": 3, "bias": false, "members": null,
                     "embedding": {"shared": ["lm_head"]}}},
     "kept": {"lm_head": "plan: 16 bits"},
     "float8": {"model.layers.2.mlp.down_proj": {"out_features": 64, "in_features": 128, "bias": false}}}

Members are the modules that a fused one replaces: name beside it, first row, end row. `experts` stands only where they
are the experts of a mixture: name of their module in the model, and how many there are. `embedding` stands only where
rows are looked up by number: names of the other modules that use the same weight. `float8` stands only where linears
are stored in that type. Source: docs/format.md.

transformers skips a quantization_config whose method it does not know, and goes on with random weights. So config.json
also says, where transformers looks for the name of a weights file, that this package must be imported (WEIGHTS_KEY).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from typing import Any

from ..errors import CheckpointError, FormatError
from ..files.strict import short
from ..format.codes import FORMAT_VERSION, LAYOUT_ID
from ..format.float8 import Float8Shape
from ..format.layout import Embedding, Experts, Member, WeightLayout, check_experts

QUANT_METHOD = "mpq"
OPTIONAL_KEYS = ("float8",)
WEIGHTS_KEY = "transformers_weights"
# transformers ends its error with it: no file can have this name, and none is looked for.
IMPORT_FIRST = "packed by mpq_kernels: `import mpq_kernels` before the model is loaded"
KEYS = ("quant_method", "format_version", "layout_id", "producer", "quantizer", "layouts", "modules", "kept")
PRODUCER_KEYS = ("name", "version")
PACK_AGAIN = "pack the model again: mpq pack SOURCE OUT --plan PLAN"
MAX_NAME = 512  # characters of a module name
MAX_EXTENT = 2**31 - 1  # rows, columns: what an int32 index in a kernel can count
MAX_NODES = 10_000_000  # JSON values in one config: bounds the time of everything below


@dataclass(frozen=True)
class PackedModule:
    """A packed linear: its layout, whether it has a bias [N], its members when it is fused, its experts if any.

    embedding: of a packed embedding, the other modules that use its weight.
    """

    name: str
    layout: WeightLayout
    bias: bool = False
    members: tuple[Member, ...] | None = None
    experts: Experts | None = None
    embedding: Embedding | None = None

    @property
    def shared(self) -> tuple[str, ...]:
        """Full names of the other modules that use this weight: those that are tied to an embedding."""
        return () if self.embedding is None else self.embedding.shared

    @property
    def parent(self) -> str:
        """Name of the module that holds this one, "" for the model itself."""
        return self.name.rpartition(".")[0]

    def replaced(self) -> list[str]:
        """Full names of the modules of the dense model that this one stands for."""
        if self.members is None:
            return [self.name]
        lead = f"{self.parent}." if self.parent else ""
        return [lead + member.name for member in self.members]

    @property
    def installed(self) -> str:
        """Name of the packed module in the model: experts lie in the module that they replace."""
        leaf = self.name.rpartition(".")[2]
        return self.name if self.experts is None else f"{self.experts.module}.{leaf}"

    @cached_property
    def tensor_names(self) -> list[str]:
        """Full names of the tensors of this module: those of the layout, then the bias."""
        names = [*self.layout.tensor_specs(), "bias"] if self.bias else list(self.layout.tensor_specs())
        return [f"{self.name}.{name}" for name in names]


@dataclass(frozen=True)
class Float8Module:
    """A linear that is stored in float8: its shape, and whether it has a bias [N]."""

    name: str
    shape: Float8Shape
    bias: bool = False

    @property
    def installed(self) -> str:
        """Name of the module in the model."""
        return self.name

    @cached_property
    def tensor_names(self) -> list[str]:
        """Full names of the tensors of this module."""
        names = [*self.shape.tensor_specs(), "bias"] if self.bias else list(self.shape.tensor_specs())
        return [f"{self.name}.{name}" for name in names]


@dataclass(frozen=True)
class PackingConfig:
    """A checked quantization_config. modules: packed name -> PackedModule, in model order. kept: module -> reason.

    floats: name -> Float8Module, in model order. producer: name and version of the program that wrote it.
    """

    modules: dict[str, PackedModule]
    kept: dict[str, str] = field(default_factory=dict)
    quantizer: str = ""
    producer: dict[str, str] = field(default_factory=lambda: dict.fromkeys(PRODUCER_KEYS, ""))
    floats: dict[str, Float8Module] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON form; the same value always gives the same text."""
        layouts: dict[WeightLayout, int] = {}
        modules: dict[str, dict[str, Any]] = {}
        for name, module in self.modules.items():
            index = layouts.setdefault(module.layout, len(layouts))
            members = None if module.members is None else [[m.name, m.n0, m.n1] for m in module.members]
            modules[name] = {"layout": index, "bias": module.bias, "members": members}
            if module.experts is not None:
                modules[name]["experts"] = {"module": module.experts.module, "count": module.experts.count}
            if module.embedding is not None:
                modules[name]["embedding"] = {"shared": list(module.embedding.shared)}
        floats = {
            name: {"out_features": m.shape.out_features, "in_features": m.shape.in_features, "bias": m.bias}
            for name, m in self.floats.items()
        }
        data: dict[str, Any] = {
            "quant_method": QUANT_METHOD,
            "format_version": FORMAT_VERSION,
            "layout_id": LAYOUT_ID,
            "producer": dict(self.producer),
            "quantizer": self.quantizer,
            "layouts": [layout.to_dict() for layout in layouts],
            "modules": modules,
            "kept": dict(self.kept),
        }
        return data | ({"float8": floats} if floats else {})

    @classmethod
    def from_dict(cls, data: Any, where: str = "quantization_config") -> PackingConfig:
        """Check a config that may come from a hostile file. Raises CheckpointError that starts with `where`.

        Time and memory are linear in the JSON text; nothing is allocated for the tensors it describes.
        """
        _check_versions(data, where)
        _check_bounds(data, where)
        if not isinstance(data["quantizer"], str):
            raise CheckpointError(f"{where}: quantizer={short(data['quantizer'])} is not a string")
        producer = data["producer"]
        if (
            not isinstance(producer, dict)
            or set(producer) != set(PRODUCER_KEYS)
            or not all(isinstance(value, str) for value in producer.values())
        ):
            raise CheckpointError(f"{where}: producer={short(producer)} is not a name and a version")
        if not isinstance(data["layouts"], list) or not isinstance(data["modules"], dict):
            raise CheckpointError(f"{where}: layouts must be a list and modules an object")
        layouts = [_Layout.parse(item, f"{where}: layout {index}") for index, item in enumerate(data["layouts"])]
        items = data["modules"].items()
        modules = {name: _module(name, item, layouts, f"{where}: module {short(name)}") for name, item in items}
        kept = data["kept"]
        if not isinstance(kept, dict) or not all(isinstance(reason, str) for reason in kept.values()):
            raise CheckpointError(f"{where}: kept must map module names to reasons")
        floats = _floats(data.get("float8", {}), where)
        _check_disjoint(modules, floats, kept, where)
        return cls(modules, dict(kept), data["quantizer"], dict(producer), floats)


@dataclass(frozen=True)
class _Layout:
    """A layout and its row cuts, computed once however many modules share it."""

    layout: WeightLayout
    cuts: frozenset[int]

    @classmethod
    def parse(cls, item: Any, where: str) -> _Layout:
        try:
            layout = WeightLayout.from_dict(item)
        except FormatError as error:
            raise CheckpointError(f"{where}: {error}") from error
        if max(layout.out_features, layout.in_features) > MAX_EXTENT:
            raise CheckpointError(f"{where}: {layout.out_features} x {layout.in_features} is over {MAX_EXTENT}")
        return cls(layout, frozenset(chain((layout.out_features,), (s.n0 for s in layout.segments))))


def _check_versions(data: Any, where: str) -> None:
    if not isinstance(data, Mapping):
        raise CheckpointError(f"{where}: must be an object, not {type(data).__name__}")
    if data.get("quant_method") != QUANT_METHOD:
        raise CheckpointError(
            f"{where}: quant_method={short(data.get('quant_method'))} is not {QUANT_METHOD!r}; `mpq import` "
            "makes a packed directory of one that another program quantized"
        )
    version = data.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        older = type(version) is int and version < FORMAT_VERSION
        cure = "an older version packed it, in another order" if older else "update mpq_kernels, or"
        raise CheckpointError(
            f"{where}: format_version={short(version)}, and this build reads {FORMAT_VERSION}: {cure}"
            f"{'; ' if older else ' '}{PACK_AGAIN}"
        )
    if data.get("layout_id") != LAYOUT_ID:
        raise CheckpointError(
            f"{where}: layout_id={short(data.get('layout_id'))}, and this build has {LAYOUT_ID!r}: codes or scales are "
            f"in another order; use the version that packed it, or {PACK_AGAIN}"
        )
    if set(data) - set(OPTIONAL_KEYS) != set(KEYS):
        missing, extra = sorted(set(KEYS) - set(data)), sorted(map(short, set(data) - {*KEYS, *OPTIONAL_KEYS}))
        raise CheckpointError(f"{where}: missing keys {missing}, unknown keys {extra}")


def _check_bounds(data: Mapping[str, Any], where: str) -> None:
    """Bound the number and the magnitude of all values, so that no later step can be made slow."""
    left, pending = MAX_NODES, [data]
    while pending:
        value: Any = pending.pop()
        if isinstance(value, Mapping):
            children: list[Any] = list(value.values())
            if not all(isinstance(key, str) for key in value):
                raise CheckpointError(f"{where}: keys must be strings")
        elif isinstance(value, list):
            children = value
        else:
            if isinstance(value, int) and abs(value) > MAX_EXTENT:
                raise CheckpointError(f"{where}: an integer is over {MAX_EXTENT}")
            continue
        left -= len(children)
        if left < 0:
            raise CheckpointError(f"{where}: more than {MAX_NODES} values")
        pending.extend(children)


def check_name(name: Any, where: str) -> str:
    """A dotted module path, or CheckpointError."""
    good = isinstance(name, str) and len(name) <= MAX_NAME and name.isprintable() and all(name.split("."))
    if not good or "/" in name or "\\" in name:
        raise CheckpointError(f"{where}: {short(name)} is not a module name")
    return str(name)


def _module(name: str, item: Any, layouts: list[_Layout], where: str) -> PackedModule:
    check_name(name, where)
    if not isinstance(item, Mapping) or set(item) - {"experts", "embedding"} != {"layout", "bias", "members"}:
        raise CheckpointError(f"{where}: expected the keys layout, bias and members, found {short(item)}")
    index = item["layout"]
    if type(index) is not int or not 0 <= index < len(layouts):
        raise CheckpointError(f"{where}: layout={short(index)} is not one of the {len(layouts)} layouts")
    if type(item["bias"]) is not bool:
        raise CheckpointError(f"{where}: bias={short(item['bias'])} is not true or false")
    rows = item["members"]
    members = None if rows is None else _members(rows, layouts[index], where)
    experts = _experts(item["experts"], layouts[index].layout, members, where) if "experts" in item else None
    embedding = None
    if "embedding" in item:
        if item["bias"] or members is not None or experts is not None:
            raise CheckpointError(f"{where}: an embedding has no bias, members or experts")
        embedding = _embedding(item["embedding"], where)
    return PackedModule(name, layouts[index].layout, item["bias"], members, experts, embedding)


def _embedding(item: Any, where: str) -> Embedding:
    if not isinstance(item, Mapping) or set(item) != {"shared"} or not isinstance(item["shared"], list):
        raise CheckpointError(f"{where}: embedding={short(item)} is not a list of modules that share the weight")
    return Embedding(tuple(check_name(name, f"{where}: embedding") for name in item["shared"]))


def _experts(item: Any, layout: WeightLayout, members: tuple[Member, ...] | None, where: str) -> Experts:
    if not isinstance(item, Mapping) or set(item) != {"module", "count"} or type(item["count"]) is not int:
        raise CheckpointError(f"{where}: experts={short(item)} is not a module and a count")
    if members is None or len(members) % max(item["count"], 1):
        raise CheckpointError(f"{where}: {item['count']} experts must have equally many members each")
    try:
        check_experts(layout, item["count"])
    except FormatError as error:
        raise CheckpointError(f"{where}: {error}") from error
    return Experts(check_name(item["module"], f"{where}: experts"), item["count"])


def _floats(items: Any, where: str) -> dict[str, Float8Module]:
    """The linears in float8. Raises CheckpointError."""
    if not isinstance(items, Mapping):
        raise CheckpointError(f"{where}: float8 must map module names to shapes")
    out = {}
    for name, item in items.items():
        check_name(name, f"{where}: float8")
        if not isinstance(item, Mapping) or set(item) != {"out_features", "in_features", "bias"}:
            raise CheckpointError(f"{where}: float8 {short(name)}: {short(item)} is no shape and bias")
        rows, cols, bias = item["out_features"], item["in_features"], item["bias"]
        if type(rows) is not int or type(cols) is not int or min(rows, cols) < 1 or type(bias) is not bool:
            raise CheckpointError(f"{where}: float8 {short(name)}: {short(item)} is no shape and bias")
        out[name] = Float8Module(name, Float8Shape(rows, cols), bias)
    return out


def _members(rows: Any, layout: _Layout, where: str) -> tuple[Member, ...]:
    if not isinstance(rows, list) or not rows:
        raise CheckpointError(f"{where}: members must be null or a list of [name, n0, n1]")
    members, row = [], 0
    for item in rows:
        if not isinstance(item, list) or len(item) != 3 or type(item[1]) is not int or type(item[2]) is not int:
            raise CheckpointError(f"{where}: member {short(item)} is not [name, n0, n1]")
        name, n0, n1 = item
        check_name(name, f"{where}: member")
        if n0 != row or n1 <= n0:
            raise CheckpointError(f"{where}: member {short(name)} has rows {n0}..{n1} where rows from {row} are due")
        if n1 not in layout.cuts:
            raise CheckpointError(f"{where}: member {short(name)} ends at row {n1}, inside a segment of the layout")
        members.append(Member(name, n0, n1))
        row = n1
    if row != layout.layout.out_features:
        raise CheckpointError(f"{where}: members cover {row} of {layout.layout.out_features} rows")
    return tuple(members)


def _check_disjoint(
    modules: Mapping[str, PackedModule], floats: Mapping[str, Float8Module], kept: Mapping[str, str], where: str
) -> None:
    """Every name has one meaning: packed, in float8, replaced by a fused module, tied to an embedding, or kept."""
    seen: dict[str, str] = {}
    for role, names in (
        ("packed", list(modules)),
        ("in float8", list(floats)),
        ("a member", [name for module in modules.values() if module.members for name in module.replaced()]),
        ("the user of an embedding's weight", [name for module in modules.values() for name in module.shared]),
        ("kept", list(kept)),
    ):
        for name in names:
            if name in seen:
                raise CheckpointError(f"{where}: {short(name)} is {seen[name]} and also {role}")
            seen[name] = role
