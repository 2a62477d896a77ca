"""Plans: which width every linear layer gets. A versioned JSON file, made by allocators, importers and people.

    {
      "version": 1,
      "model": "any text, for the reader",
      "default": {"bits": 3, "group_size": 64},
      "modules": {
        "lm_head": {"bits": 16},
        "re:model\\\\.layers\\\\.[0-3]\\\\..*": {"bits": 4, "symmetric": true},
        "model.layers.5.mlp.down_proj": {
          "bits": 3,
          "segments": [{"cols": [0, 128], "bits": 8}, {"cols": [128, null], "bits": 3, "group_size": 32}]
        }
      },
      "fuse": [{"name": "qkv_proj", "members": ["q_proj", "k_proj", "v_proj"]}]
    }

Which rule a module gets: its exact name; else the last regex ("re:...", must match the whole name); else `default`;
else it is kept in 16 bits. A rule that matches no module is refused, so that a typing error cannot pass unnoticed.
`mpq_kernels.plan.resolve` applies a plan to a model; nothing here needs the model or torch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    ValidationError,
    field_validator,
    model_validator,
)

from ..errors import CheckpointError, PlanError
from ..files.strict import close_names, parse_json, replace_file, short
from ..format.codes import KEPT_BITS, TILE_K
from ..format.kinds import FIXED_KINDS, ZERO_KINDS, why_not_kind
from .patterns import why_no_pattern, why_too_many

if TYPE_CHECKING:
    from pydantic._internal._model_construction import ModelMetaclass

    from ..dense.linears import LinearSpec
else:
    ModelMetaclass = type(BaseModel)  # its only public name

PLAN_VERSION = 1
MAX_PLAN_BYTES = 64 * 2**20  # permutations of every layer of a 100-layer model take about 20 MB
MAX_PROBLEMS = 20  # how many problems one message lists
REGEX = "re:"
MIN_TOWER_GROUP = 16
EXPERTS = r"re:.*\.experts\.\d+\..*"  # every linear of every expert, as checkpoints name them

CodeBits = Annotated[int, Field(strict=True, ge=1, le=8)]


def _is_kind(value: str) -> str:
    reason = why_not_kind(value)
    if reason is not None:
        raise ValueError(reason)
    return value


ZeroName = Annotated[str, AfterValidator(_is_kind), Field(json_schema_extra={"enum": [*ZERO_KINDS]})]
ScaleDtype = Literal["float16", "bfloat16", "float32"]


class _RaisesPlanError(ModelMetaclass):
    """Turns the ValidationError of a constructor call into a PlanError; nested validation does not pass here."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().__call__(*args, **kwargs)
        except ValidationError as error:
            raise PlanError(_in_words(error, cls.__name__)) from None


class _Rules(BaseModel, metaclass=_RaisesPlanError):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SegmentPlan(_Rules):
    """A rectangle of one width: rows [n0, n1) and columns [k0, k1), null for "to the end".

    group_size, symmetric and zero override the module's; naming `zero` alone makes the rectangle asymmetric.
    """

    rows: tuple[StrictInt, StrictInt | None] = (0, None)
    cols: tuple[StrictInt, StrictInt | None] = (0, None)
    bits: CodeBits
    group_size: StrictInt | None = None
    symmetric: StrictBool | None = None
    zero: ZeroName | None = None

    @field_validator("rows", "cols")
    @classmethod
    def _check_range(cls, value: tuple[int, int | None]) -> tuple[int, int | None]:
        if value[0] < 0 or (value[1] is not None and value[1] <= value[0]):
            raise ValueError(f"{list(value)} is empty or negative; need 0 <= start < end, or null for the end")
        return value

    @field_validator("cols")
    @classmethod
    def _check_cuts(cls, value: tuple[int, int | None]) -> tuple[int, int | None]:
        if value[0] % TILE_K:
            raise ValueError(f"column cuts must be multiples of {TILE_K}; {value[0]} is not")
        return value

    @field_validator("group_size")
    @classmethod
    def _check_group(cls, value: int | None) -> int | None:
        return value if value is None else _checked_group(value)

    @model_validator(mode="after")
    def _check_zero(self) -> SegmentPlan:
        if self.symmetric and self.zero is not None and self.zero not in FIXED_KINDS:
            raise ValueError(f"symmetric weights have no zero points, and zero={self.zero!r} asks for them")
        return self


class WeightPlan(_Rules):
    """How one weight is quantized. bits 1..8, or 16 to keep it as it is.

    group_size: codes along K that share a scale, -1 for all of K. zero: the storage kind (format/kinds.py). symmetric:
    none, or half if `zero` says so. segments: rectangles that tile the weight, each of its own width (`bits` is then
    unused). perm: K integers; packed column j is column perm[j] of the weight, and segments cut the packed columns.
    dtype: with 8 bits, the float type that the weight is stored in instead of codes, with a scale for each row; the
    other fields are then unused.
    """

    bits: Annotated[int, Field(strict=True, json_schema_extra={"enum": [*range(1, 9), KEPT_BITS]})]
    group_size: StrictInt = 64
    symmetric: StrictBool = False
    zero: ZeroName = "int"
    scale_dtype: ScaleDtype = "float16"
    segments: tuple[SegmentPlan, ...] | None = None
    perm: tuple[StrictInt, ...] | None = None
    dtype: Literal["float8_e4m3fn"] | None = None

    @field_validator("bits")
    @classmethod
    def _check_bits(cls, value: int) -> int:
        if value != KEPT_BITS and not 1 <= value <= 8:
            raise ValueError(f"bits={value} is neither 1..8 nor {KEPT_BITS} (kept as it is)")
        return value

    @field_validator("group_size")
    @classmethod
    def _check_group(cls, value: int) -> int:
        return _checked_group(value)

    @model_validator(mode="after")
    def _check_fields(self) -> WeightPlan:
        if self.kept and (self.segments is not None or self.perm is not None):
            extra = "segments" if self.segments is not None else "perm"
            raise ValueError(f"bits={KEPT_BITS} keeps the weight as it is, so it cannot have {extra}")
        if self.dtype is not None and (self.bits != 8 or self.segments is not None or self.perm is not None):
            raise ValueError(f"dtype={self.dtype!r} takes 8 bits, and has neither segments nor perm")
        if self.segments is not None and not self.segments:
            raise ValueError("segments is an empty list; leave it out for one width over the whole weight")
        if self.symmetric and self.zero not in (*FIXED_KINDS, "int"):  # "int" goes without saying
            raise ValueError(f"symmetric weights have no zero points, and zero={self.zero!r} asks for them")
        return self

    @property
    def kept(self) -> bool:
        """Whether the weight stays as it is."""
        return self.bits == KEPT_BITS


class FusePlan(_Rules):
    """Linears of one parent module that read the same input and become one packed weight, rows in this order."""

    name: str
    members: tuple[str, ...]

    @model_validator(mode="after")
    def _check_names(self) -> FusePlan:
        for name in (self.name, *self.members):
            if not name or "." in name or not name.isprintable():
                raise ValueError(f"{short(name)} is not the name of a child of one module, such as 'q_proj'")
        if len(self.members) < 2:
            raise ValueError(f"a fused weight needs at least two members, not {list(self.members)}")
        if len({self.name, *self.members}) != 1 + len(self.members):
            raise ValueError(f"{self.name!r} and its members {list(self.members)} repeat a name")
        return self


class Plan(_Rules):
    """A plan for a whole model; see the module's text for the JSON form."""

    version: Annotated[int, Field(strict=True)] = PLAN_VERSION
    model: str | None = None
    default: WeightPlan | None = None
    modules: dict[str, WeightPlan] = Field(default_factory=dict)
    fuse: tuple[FusePlan, ...] = ()

    @field_validator("version")
    @classmethod
    def _check_version(cls, value: int) -> int:
        if value != PLAN_VERSION:
            raise ValueError(f"version {value}; this package reads {PLAN_VERSION}")
        return value

    @field_validator("modules")
    @classmethod
    def _check_patterns(cls, value: dict[str, WeightPlan]) -> dict[str, WeightPlan]:
        patterns = [key.removeprefix(REGEX) for key in value if key.startswith(REGEX)]
        reason = why_too_many(patterns) or next(filter(None, map(why_no_pattern, patterns)), None)
        if reason is not None:
            raise ValueError(reason)
        return value

    @classmethod
    def uniform(
        cls,
        model: str | os.PathLike[str] | Sequence[LinearSpec],
        bits: int,
        group_size: int = 64,
        symmetric: bool = False,
        zero: ZeroName = "int",
        scale_dtype: ScaleDtype = "float16",
        lm_head: int = KEPT_BITS,
        towers: int = KEPT_BITS,
        embeddings: int = KEPT_BITS,
    ) -> Plan:
        """One rule for every linear, experts too, and the output head in `lm_head` bits (16: kept). Routers are kept.

        towers: bits of vision and audio towers and of projectors, 16 to keep them; where group_size does not divide the
        K of one, its groups are smaller.
        embeddings: bits of the token embeddings, those with at least half as many rows as the one with most (16: kept).
        A head that is tied to one, and whose own bits are 16 or the same, shares its packed weight.
        model: a Hugging Face directory, or what `packable` lists of it. Raises PlanError for a bad rule,
        CheckpointError for a bad directory. Whether group_size divides every other K is checked by `resolve`.
        """
        rule = WeightPlan(bits=bits, group_size=group_size, symmetric=symmetric, zero=zero, scale_dtype=scale_dtype)
        if isinstance(model, (str, os.PathLike)):
            from ..dense.checkpoint import DenseCheckpoint  # needs torch; plans as such do not

            model = DenseCheckpoint.open(model).packable()
        if all(spec.embedding for spec in model):
            raise PlanError("the model has no linear layers, so there is nothing to quantize")
        head = rule.model_copy(update={"bits": WeightPlan(bits=lm_head).bits})
        rules = {spec.name: head for spec in model if spec.is_head}
        rules |= {spec.name: WeightPlan(bits=KEPT_BITS) for spec in model if spec.router}
        rules |= tower_rules(model, rule.model_copy(update={"bits": towers}))
        if embeddings != KEPT_BITS:
            most = max((spec.out_features for spec in model if spec.embedding), default=0)
            if not most:
                raise PlanError(f"embeddings={embeddings}: the model has no embedding that can be packed")
            looked_up = rule.model_copy(update={"bits": WeightPlan(bits=embeddings).bits})
            for spec in model:
                if spec.embedding and 2 * spec.out_features >= most:
                    rules[spec.name] = looked_up
                    if lm_head in (KEPT_BITS, embeddings):
                        rules = {name: given for name, given in rules.items() if name not in spec.shared}
        return cls(default=rule, modules=rules)

    @classmethod
    def from_dict(cls, data: Any, where: str = "plan") -> Plan:
        """A plan from parsed JSON. Raises PlanError that lists every problem with its path."""
        if isinstance(data, Mapping) and data.get("version", PLAN_VERSION) != PLAN_VERSION:
            raise PlanError(f"{where}: version {short(data['version'])}; this package reads {PLAN_VERSION}")
        if isinstance(data, Mapping) and "version" not in data:
            raise PlanError(f'{where}: has no version; add "version": {PLAN_VERSION}')
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise PlanError(_in_words(error, where)) from None

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a JSON file. Raises PlanError naming the file, and each problem in it with its path."""
        path = Path(path)
        try:
            with path.open("rb") as file:
                data = file.read(MAX_PLAN_BYTES + 1)
        except OSError as error:
            raise PlanError(f"{path}: the plan cannot be read ({error.strerror or error})") from error
        if len(data) > MAX_PLAN_BYTES:
            raise PlanError(f"{path}: larger than {MAX_PLAN_BYTES} bytes, the limit for a plan")
        try:
            return cls.from_dict(parse_json(data, str(path)), str(path))
        except CheckpointError as error:
            raise PlanError(str(error)) from error

    def with_rules(self, rules: Mapping[str, WeightPlan]) -> Plan:
        """The same plan with these rules for exact names."""
        return self.model_copy(update={"modules": self.modules | dict(rules)})

    def to_json(self) -> str:
        """Text of the file: exact names sorted, then regexes in their order, which decides; one rule on a line."""
        data = self.model_dump(mode="json")
        rules = data.pop("modules")
        names = sorted(key for key in rules if not key.startswith(REGEX))
        names += [key for key in rules if key.startswith(REGEX)]
        lines = [f"    {json.dumps(key)}: {_dump(rules[key])}" for key in names]
        fuse = [f"    {_dump(rule)}" for rule in data.pop("fuse")]
        head = [f"  {json.dumps(key)}: {_dump(value)}" for key, value in data.items()]
        parts = [*head, _block("modules", "{}", lines), _block("fuse", "[]", fuse)]
        return "{\n" + ",\n".join(parts) + "\n}\n"

    def to_file(self, path: str | os.PathLike[str]) -> None:
        """Write the JSON form to a temporary name beside `path`, fsync, rename. The same plan gives the same bytes.

        Raises OSError; whatever was at `path` is then untouched.
        """
        replace_file(Path(path), self.to_json().encode())


def tower_rules(linears: Sequence[LinearSpec], rule: WeightPlan) -> dict[str, WeightPlan]:
    """The same rule for every linear of towers and projectors, whose K is seldom a multiple of a usual group_size.

    Where it is not, the group is the largest divisor below, at least MIN_TOWER_GROUP, else all of K. PlanError.
    """
    rule = WeightPlan(**rule.model_dump())

    def fitted(columns: int) -> WeightPlan:
        fit = (size for size in range(rule.group_size, MIN_TOWER_GROUP - 1, -1) if columns % size == 0)
        return rule if rule.kept else rule.model_copy(update={"group_size": next(fit, -1)})

    return {spec.name: fitted(spec.in_features) for spec in linears if spec.tower}


def _checked_group(value: int) -> int:
    if value != -1 and value < 1:
        raise ValueError(f"group_size={value} is neither positive nor -1 (one group over all columns)")
    return value


def _without_nulls(value: Any) -> Any:
    """A rule without the keys that are null by default; cut ends such as [64, null] stay."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _dump(value: Any) -> str:
    return json.dumps(_without_nulls(value))


def _block(key: str, brackets: str, lines: list[str]) -> str:
    body = "\n" + ",\n".join(lines) + "\n  " if lines else ""
    return f'  "{key}": {brackets[0]}{body}{brackets[1]}'


def _json_path(location: tuple[int | str, ...]) -> str:
    path = ""
    for part in location:
        plain = isinstance(part, str) and part.isidentifier()
        path += f".{part}" if plain else f"[{short(part)}]"
    return path.lstrip(".") or "the whole"


def _in_words(error: ValidationError, where: str) -> str:
    problems = []
    for item in error.errors(include_url=False)[:MAX_PROBLEMS]:
        location = item["loc"]
        if item["type"] == "extra_forbidden":
            fields = [name for model in (Plan, WeightPlan, SegmentPlan, FusePlan) for name in model.model_fields]
            text = f"unknown key{close_names(str(location[-1]), fields)}"
        elif item["type"] == "missing":
            text = "is missing"
        elif item["type"] == "value_error":
            text = item["msg"].removeprefix("Value error, ")
        else:
            text = f"{item['msg'][0].lower()}{item['msg'][1:]}, not {short(item['input'])}"
        problems.append(f"{_json_path(location)}: {text}")
    rest = error.error_count() - len(problems)
    more = f"\n  and {rest} more" if rest > 0 else ""
    return f"{where}: {error.error_count()} problem(s)\n  " + "\n  ".join(problems) + more
