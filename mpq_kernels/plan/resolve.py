"""A plan applied to a model: the exact layout of every packed weight, before any weight is read.

    Plan + [LinearSpec ...] --resolve--> ResolvedPlan(weights, kept)

Embeddings are packed where a plan names them; what is tied to one (an output head) shares its packed weight.

Everything that can be wrong between a plan and a model is refused here, with the module, the numbers and the cure.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from ..dense.linears import PARTS
from ..errors import FormatError, PlanError
from ..files.strict import close_names
from ..format.codes import KEPT_BITS, TILE_K, TILE_N
from ..format.float8 import FLOAT8, Float8Shape
from ..format.kinds import FIXED_KINDS, kind_of
from ..format.layout import Embedding, Experts, Member, Segment, SizeBreakdown, WeightLayout
from .patterns import Clock, compile_pattern
from .plan import EXPERTS, REGEX, FusePlan, Plan, SegmentPlan, WeightPlan

if TYPE_CHECKING:
    from ..dense.linears import LinearSpec

NO_RULE = "no rule"
PLANNED = f"plan: {KEPT_BITS} bits"


@dataclass(frozen=True)
class ResolvedMember:
    """One linear and its own layout. perm: K integers, column j of the codes is column perm[j] of the weight."""

    spec: LinearSpec
    layout: WeightLayout
    perm: tuple[int, ...] | None = None


@dataclass(frozen=True)
class ResolvedWeight:
    """One packed weight: a linear, or the linears of a fuse group above each other along N, or those of all experts.

    embedding: of one that is looked up by row, which other modules use it.
    """

    name: str
    members: tuple[ResolvedMember, ...]
    layout: WeightLayout
    fused: bool = False
    embedding: Embedding | None = None

    @property
    def experts(self) -> Experts | None:
        """The mixture that this weight is the experts of, None for any other weight."""
        part = self.members[0].spec.expert
        return None if part is None else Experts(part.module, part.count)

    def member_rows(self) -> tuple[Member, ...]:
        """Names of the members beside the fused weight, and their rows in it."""
        parent = self.name.rpartition(".")[0]
        rows, out = 0, []
        for member in self.members:
            name = member.spec.name.removeprefix(f"{parent}.") if parent else member.spec.name
            out.append(Member(name, rows, rows + member.spec.out_features))
            rows += member.spec.out_features
        return tuple(out)


@dataclass(frozen=True)
class ResolvedPlan:
    """weights: packed weights in model order. kept: name -> reason of every linear that stays as it is.

    floats: linears that are stored in float8 with a scale for each row (format/float8.py), by name.
    """

    weights: tuple[ResolvedWeight, ...]
    kept: dict[str, str]
    floats: dict[str, LinearSpec] = field(default_factory=dict)

    def size(self) -> SizeBreakdown:
        """Stored bits of all packed weights by purpose, those in float8 too, exactly as they will be on disk."""
        packed = sum((weight.layout.size() for weight in self.weights), SizeBreakdown())
        return sum((float8_shape(spec).size() for spec in self.floats.values()), packed)


def float8_shape(spec: LinearSpec) -> Float8Shape:
    """The shape of a linear that is stored in float8."""
    return Float8Shape(spec.out_features, spec.in_features)


def resolve(plan: Plan, linears: Sequence[LinearSpec]) -> ResolvedPlan:
    """Layouts of all linears under a plan, and of the embeddings that it names. `linears`: both, each in model order.

    Raises PlanError.
    """
    specs = {spec.name: spec for spec in linears}
    if len(specs) != len(linears):
        raise PlanError("the list of linears repeats a name")
    rules, named = _rules(plan, specs)
    members: dict[str, ResolvedMember] = {}
    kept: dict[str, str] = {}
    floats: dict[str, LinearSpec] = {}
    for name, spec in specs.items():
        rule = rules[name]
        if rule is not None and rule.dtype is not None:
            floats[name] = _check_float8(spec, rule)
        elif rule is not None and not rule.kept:
            members[name] = resolve_member(spec, rule)
        elif not spec.embedding or name in named:  # embeddings that no rule names are not spoken of
            kept[name] = NO_RULE if rule is None else PLANNED
    return group_members(specs, members, kept, floats, plan.fuse, named)


def group_members(
    specs: Mapping[str, LinearSpec],
    members: dict[str, ResolvedMember],
    kept: dict[str, str],
    floats: dict[str, LinearSpec],
    fuse: Sequence[FusePlan] = (),
    named: Collection[str] = (),
) -> ResolvedPlan:
    """The packed weights that linears of these layouts make up: fused ones, experts, embeddings and what shares them.

    specs: all linears and embeddings, by name in model order; each is one of `members` (to be packed), `kept` (why it
    is not) or `floats` (in float8), but for embeddings that stay as they are. named: those that have a layout of their
    own although they share a weight with an embedding. Raises PlanError.
    """
    embeddings = {
        name: Embedding(_sharing(member, members, kept, named))
        for name, member in members.items()
        if member.spec.embedding
    }
    for embedding in embeddings.values():
        for name in embedding.shared:
            members.pop(name, None)
            kept.pop(name, None)
            floats.pop(name, None)
    unfused = kept | dict.fromkeys(floats, FLOAT8)
    groups = _fuse_groups(fuse, specs, members, unfused) | _expert_groups(specs, members, kept)
    weights: dict[str, ResolvedWeight] = {}
    for name, member in members.items():
        if name not in groups:
            weights[name] = ResolvedWeight(name, (member,), member.layout, embedding=embeddings.get(name))
            continue
        fused, names = groups[name]
        if fused not in weights:  # a group stands where the model has the first of its members
            parts = tuple(members[other] for other in names)
            weights[fused] = ResolvedWeight(fused, parts, stack_layouts([p.layout for p in parts]), fused=True)
    return ResolvedPlan(tuple(weights.values()), kept, floats)


def resolve_member(spec: LinearSpec, rule: WeightPlan) -> ResolvedMember:
    """Layout of one linear under its rule. Raises PlanError."""
    if rule.kept:
        raise PlanError(f"{spec.name}: bits={KEPT_BITS} keeps the weight as it is, so it has no packed layout")
    rows, cols = spec.out_features, spec.in_features
    if rule.perm is not None:
        _check_perm(spec, rule.perm)
    boxes = _rectangles(spec, rule.segments or (SegmentPlan(bits=rule.bits),))
    segments = []
    for n0, n1, k0, k1, part in _bands(spec.name, rows, cols, boxes):
        group = part.group_size if part.group_size is not None else rule.group_size
        group = k1 - k0 if group == -1 else group
        if (k1 - k0) % group:
            where = f"K={cols}" if (k0, k1) == (0, cols) else f"columns {k0}..{k1} ({k1 - k0} of K={cols})"
            raise PlanError(
                f"{spec.name}: group_size={group} does not divide {where} (remainder {(k1 - k0) % group}): choose a "
                f"divisor{_suggest_groups(k1 - k0, group)}, -1 for one group over all columns, or bits={KEPT_BITS}"
            )
        segments.append(Segment(n0, n1, k0, k1, part.bits, group, _zero_kind(part, rule)))
    try:
        layout = WeightLayout(rows, cols, tuple(segments), rule.scale_dtype, rule.perm is not None)
    except FormatError as error:
        raise PlanError(f"{spec.name}: {error}") from error
    return ResolvedMember(spec, layout, rule.perm)


def stack_layouts(layouts: Sequence[WeightLayout]) -> WeightLayout:
    """Layout of weights above each other along N; all have the same K, scale_dtype and permutation."""
    segments: list[Segment] = []
    row = 0
    for layout in layouts:
        segments += [replace(s, n0=s.n0 + row, n1=s.n1 + row) for s in layout.segments]
        row += layout.out_features
    return replace(layouts[0], out_features=row, segments=tuple(segments))


def _check_float8(spec: LinearSpec, rule: WeightPlan) -> LinearSpec:
    """The linear, if it can be stored in float8. Raises PlanError."""
    if spec.embedding or spec.expert is not None:
        what = "an embedding" if spec.embedding else "an expert's linear"
        raise PlanError(f"{spec.name}: dtype={rule.dtype!r} is for linears alone, and this is {what}; give it bits")
    return spec


def _sharing(
    embedding: ResolvedMember, members: Mapping[str, ResolvedMember], kept: Mapping[str, str], named: Collection[str]
) -> tuple[str, ...]:
    """The modules that use the packed weight of an embedding: all that are tied to it, but for a linear that the plan
    names and gives another layout. Raises PlanError for one that is to be kept: it would need the dense weight.
    """
    spec, out = embedding.spec, []
    for name in spec.shared:
        if name in named and name in kept:
            raise PlanError(
                f"{name} is kept ({kept[name]}) and shares its weight with {spec.name}, which is packed: leave {name} "
                f"out of the plan, then both use one packed weight, or keep {spec.name} too"
            )
        own = members.get(name) if name in named else None
        if name in named and name not in members and name not in kept:  # in float8
            continue
        if own is None or (own.layout, own.perm) == (embedding.layout, embedding.perm):
            out.append(name)
    return tuple(out)


def _rules(plan: Plan, specs: Mapping[str, LinearSpec]) -> tuple[dict[str, WeightPlan | None], set[str]]:
    """(the rule of every module, those that a name or a regex gave one). PlanError for a rule that matches none.

    The default is for linears alone, and so is a regex that matches any: plans from before embeddings could be packed
    mean what they meant.
    """
    chosen = {name: None if spec.embedding else plan.default for name, spec in specs.items()}
    named: set[str] = set()
    exact: list[str] = []
    clock = Clock()
    for key, rule in plan.modules.items():
        if not key.startswith(REGEX):
            exact.append(key)
            continue
        pattern = compile_pattern(key.removeprefix(REGEX), f"modules[{key!r}]", clock)
        matched = [name for name in specs if pattern.fullmatch(name)]
        matched = [name for name in matched if not specs[name].embedding] or matched
        if not matched:
            raise PlanError(
                f"modules[{key!r}]: matches none of the model's {len(specs)} linears; a regex must match the whole "
                f"name, such as {next(iter(specs), '')!r}"
            )
        chosen.update(dict.fromkeys(matched, rule))
        named.update(matched)
    unknown = [key for key in exact if key not in specs]
    if unknown:
        listed = "\n  ".join(f"modules[{key!r}]{close_names(key, list(specs))}" for key in unknown[:10])
        more = f"\n  and {len(unknown) - 10} more" if len(unknown) > 10 else ""
        raise PlanError(f"the model has no linear of this name (is the plan for another model?):\n  {listed}{more}")
    chosen.update({key: plan.modules[key] for key in exact})
    return chosen, named.union(exact)


def _check_perm(spec: LinearSpec, perm: Sequence[int]) -> None:
    if len(perm) != spec.in_features:
        raise PlanError(f"{spec.name}: perm has {len(perm)} entries, and K={spec.in_features}")
    if sorted(perm) != list(range(spec.in_features)):
        seen: set[int] = set()
        for place, value in enumerate(perm):
            if not 0 <= value < spec.in_features or value in seen:
                why = "appears twice" if value in seen else f"is not in 0..{spec.in_features - 1}"
                raise PlanError(f"{spec.name}: perm is not a permutation: perm[{place}]={value} {why}")
            seen.add(value)


_Box = tuple[int, int, int, int, SegmentPlan]  # n0, n1, k0, k1


def _rectangles(spec: LinearSpec, parts: Iterable[SegmentPlan]) -> list[_Box]:
    rows, cols = spec.out_features, spec.in_features
    boxes = []
    for part in parts:
        n0, n1 = part.rows[0], rows if part.rows[1] is None else part.rows[1]
        k0, k1 = part.cols[0], cols if part.cols[1] is None else part.cols[1]
        if not n0 < n1 <= rows or not k0 < k1 <= cols:
            raise PlanError(
                f"{spec.name}: segment rows {n0}..{n1}, columns {k0}..{k1} does not lie in the weight of "
                f"{rows} rows and {cols} columns"
            )
        if k1 % TILE_K and k1 != cols:
            raise PlanError(
                f"{spec.name}: rows {n0}..{n1}, columns {k0}..{k1}: column cuts must be multiples of {TILE_K}; {k1} is "
                f"not (only the last may end at K={cols})"
            )
        boxes.append((n0, n1, k0, k1, part))
    return boxes


def _bands(name: str, rows: int, cols: int, boxes: Sequence[_Box]) -> list[_Box]:
    """Rectangles cut into row bands and sorted by n0, then k0. Raises PlanError unless they tile rows x cols."""
    cuts = sorted({0, rows} | {box[0] for box in boxes} | {box[1] for box in boxes})
    out: list[_Box] = []
    for n0, n1 in zip(cuts, cuts[1:], strict=False):
        column = 0
        for box in sorted((b for b in boxes if b[0] < n1 and n0 < b[1]), key=lambda b: b[2]):
            if box[2] != column:
                word = "missing from" if box[2] > column else "covered twice by"
                low, high = min(box[2], column), max(box[2], column)
                raise PlanError(f"{name}: rows {n0}..{n1}, columns {low}..{high} are {word} the segments")
            if (n0 - box[0]) % TILE_N:
                raise PlanError(
                    f"{name}: the segment of rows {box[0]}..{box[1]}, columns {box[2]}..{box[3]} is cut at row {n0} by "
                    f"its neighbours; that must be a multiple of {TILE_N} rows from its start (it is {n0 - box[0]}): "
                    f"give all segments of a row band the same rows"
                )
            out.append((n0, n1, box[2], box[3], box[4]))
            column = box[3]
        if column != cols:
            raise PlanError(
                f"{name}: rows {n0}..{n1}, columns {column}..{cols} are missing from the segments, which must cover "
                f"all {rows} rows and {cols} columns"
            )
    return out


def _zero_kind(part: SegmentPlan, rule: WeightPlan) -> str:
    """Storage kind of a rectangle: its own words first; naming `zero` alone says all."""
    if part.zero is not None:
        return part.zero
    if part.symmetric is False and rule.zero in FIXED_KINDS:
        return "int"
    return kind_of(rule.symmetric if part.symmetric is None else part.symmetric, rule.zero)


def _suggest_groups(cols: int, group: int) -> str:
    """Divisors of cols nearest to the group that was asked for."""
    divisors = [d for d in range(min(8, cols), min(cols, 1024) + 1) if cols % d == 0]
    near = sorted(sorted(divisors, key=lambda d: abs(d - group))[:3])
    return f" such as {', '.join(map(str, near))}" if near else ""


def _fuse_groups(
    fuse: Sequence[FusePlan],
    specs: Mapping[str, LinearSpec],
    members: Mapping[str, ResolvedMember],
    kept: Mapping[str, str],
) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Module name -> (packed name, its group's module names in fuse order). Raises PlanError."""
    groups: dict[str, tuple[str, tuple[str, ...]]] = {}
    parts = (name.split(".") for name in specs)
    taken = {".".join(path[: n + 1]) for path in parts for n in range(len(path))}  # linears and the modules above them
    for rule in fuse:
        families = list(_families(rule, specs))
        quantized = [names for names in families if not all(name in kept for name in names)]
        if not quantized:
            why = "all of them are kept" if families else f"no module has all of {list(rule.members)}"
            why += "; experts are stacked without a rule" if any(spec.expert for spec in specs.values()) else ""
            raise PlanError(f"fuse {rule.name!r} applies nowhere: {why}")
        for names in quantized:
            parent = names[0].removesuffix(rule.members[0])  # with its dot, or empty
            where = f"fuse {rule.name!r} in {parent.rstrip('.') or 'the model'}"
            for name in names:
                if name in kept:
                    raise PlanError(f"{where}: {name} is kept ({kept[name]}) and others are not; quantize all or none")
                if name in groups:
                    raise PlanError(f"{where}: {name} is already fused into {groups[name][0]}")
            if parent + rule.name in taken:
                raise PlanError(f"{where}: the model already has {parent + rule.name}; choose another name")
            _check_fusable(where, [members[name] for name in names])
            taken.add(parent + rule.name)
            groups.update(dict.fromkeys(names, (parent + rule.name, names)))
    return groups


def _families(rule: FusePlan, specs: Mapping[str, LinearSpec]) -> Iterator[tuple[str, ...]]:
    """Names of the members in every module that has all of them."""
    for name, spec in specs.items():
        parent, _, child = name.rpartition(".")
        if child == rule.members[0] and spec.expert is None:
            names = tuple(f"{parent}.{member}" if parent else member for member in rule.members)
            if all(other in specs for other in names):
                yield names


def _expert_groups(
    specs: Mapping[str, LinearSpec], members: Mapping[str, ResolvedMember], kept: Mapping[str, str]
) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Linear of an expert -> (packed name, the linears of all experts that are stacked with it). Raises PlanError."""
    blocks: dict[str, list[LinearSpec]] = {}
    for spec in specs.values():
        if spec.expert is not None:
            blocks.setdefault(spec.expert.block, []).append(spec)
    groups: dict[str, tuple[str, tuple[str, ...]]] = {}
    for block, experts in blocks.items():
        packed = [spec.name for spec in experts if spec.name in members]
        left = [spec.name for spec in experts if spec.name in kept]
        if packed and left:
            raise PlanError(
                f"{block}: {packed[0]} is packed and {left[0]} is kept ({kept[left[0]]}), {len(packed)} and "
                f"{len(left)} of this module in all; its experts are packed together: give each 1..8 bits, or keep "
                f'all, as the rule {{"{EXPERTS}": {{"bits": {KEPT_BITS}}}}} does'
            )
        for leaf, parts in PARTS.items() if packed else ():
            names = tuple(spec.name for spec in experts if spec.expert and spec.expert.part in parts)
            _check_fusable(f"the experts {block}", [members[name] for name in names])
            groups.update(dict.fromkeys(names, (f"{block}.{leaf}", names)))
    return groups


def _check_fusable(where: str, parts: Sequence[ResolvedMember]) -> None:
    first = parts[0]
    for part in parts[1:]:
        pair = f"{first.spec.name} and {part.spec.name}"
        facts = (
            ("K", first.layout.in_features, part.layout.in_features),
            ("scale_dtype", first.layout.scale_dtype, part.layout.scale_dtype),
            ("bias", first.spec.bias_tensor is not None, part.spec.bias_tensor is not None),
        )
        for fact, one, other in facts:
            if one != other:
                raise PlanError(f"{where}: {pair} differ in {fact} ({one} and {other}); members must agree in it")
        if first.perm != part.perm:
            raise PlanError(f"{where}: {pair} differ in perm; they read the same x, so it must be the same")
    kinds = {p.layout.zero_dtype: p.spec.name for p in parts if p.layout.zero_dtype is not None}
    if len(kinds) > 1:
        names = " and ".join(f"{name} has {kind}" for kind, name in kinds.items())
        raise PlanError(f"{where}: zeros of one packed weight have one dtype, but {names}; choose one kind")
