"""`mpq plan allocate` and `mpq plan methods`: the plan that loses least within a budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...errors import PlanError
from ..models import open_model, read_text
from ..output import JsonFlag, ModelDir, QuietFlag, note, print_json, print_table, progress

if TYPE_CHECKING:
    from ...allocate import Limits
    from ...allocate.study import Study

BudgetOption = Annotated[str, typer.Option(help="2.5bits (stored, for each weight), 1500000bytes, 840us or 0.02error.")]
MethodOption = Annotated[str, typer.Option(help="Importance method; `mpq plan methods` lists them.")]
GranularityOption = Annotated[str, typer.Option(help="layer, linear, fuse, expert, column or row.")]
BitsOption = Annotated[str, typer.Option(help="Widths to choose from, 1..8 and 16 (kept).")]
GroupsOption = Annotated[str, typer.Option(help="Group sizes to choose from; -1 for all of K.")]
QuantizerOption = Annotated[str, typer.Option(help="What the plan is for; one that needs no text.")]
CalibrationOption = Annotated[Path | None, typer.Option(help="UTF-8 text, for methods that run the model.")]
TokensOption = Annotated[int, typer.Option(min=2, help="Tokens of it that are read.")]
LimitOption = Annotated[list[str] | None, typer.Option(help="REGEX=BITS: the least width of these linears.")]
CapOption = Annotated[list[str] | None, typer.Option(help="REGEX=BITS: the largest width of these linears.")]


@dataclass(frozen=True)
class Setting:
    """What both `allocate` and `sweep` are told about the model and its choices."""

    model: Path
    granularity: str
    bits: str
    group_sizes: str
    quantizer: str
    calibration: Path | None
    calibration_tokens: int
    span: int = 128

    def study(self, limits: Limits | None = None, report: Any = None) -> tuple[Study, Any]:
        """(study over the dense model in fp32, its tokenizer). Raises MPQError."""
        from ...allocate import make_choices, make_units
        from ...allocate.study import Study
        from ...dense.names import list_linears
        from ...evaluate.perplexity import token_windows
        from ...quantize import require_no_calibration

        require_no_calibration(self.quantizer)
        choices = make_choices(whole_numbers(self.bits, "--bits"), whole_numbers(self.group_sizes, "--group-sizes"))
        model, tokenizer = open_model(self.model, "cpu", "float32", None)
        linears = list_linears(model)
        units = make_units(linears, self.granularity, choices, span=self.span, limits=limits)
        rows = None
        if self.calibration is not None:
            limit = getattr(model.config.get_text_config(), "max_position_embeddings", 256)
            rows = token_windows(tokenizer, read_text(self.calibration), min(256, limit), self.calibration_tokens)
        return Study(model, linears, units, rows, self.quantizer, report), tokenizer


def whole_numbers(text: str, option: str) -> list[int]:
    """ "2,3,4" as numbers. Raises PlanError."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise PlanError(f"{option} {text!r} is not a list of whole numbers such as 2,3,4") from None


def parse_limits(least: Sequence[str] | None, most: Sequence[str] | None) -> Limits:
    """REGEX=BITS options. Raises PlanError."""
    from ...allocate import Limits

    found: list[dict[str, int]] = []
    for words in (least or (), most or ()):
        rules = {}
        for word in words:
            pattern, _, bits = word.rpartition("=")
            if not pattern or not bits.isdigit():
                raise PlanError(f"limit {word!r} is not REGEX=BITS, such as '.*down_proj=4'")
            rules[pattern] = int(bits)
        found.append(rules)
    return Limits(*found)


def command(
    model: ModelDir,
    budget: BudgetOption,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File to write; stdout without it.")] = None,
    method: MethodOption = "fisher",
    granularity: GranularityOption = "linear",
    bits: BitsOption = "1,2,3,4,5,6,8",
    group_sizes: GroupsOption = "64",
    calibration: CalibrationOption = None,
    calibration_tokens: TokensOption = 8192,
    quantizer: QuantizerOption = "hqq",
    solver: Annotated[str, typer.Option(help="fast, or exact (needs highspy).")] = "fast",
    span: Annotated[int, typer.Option(help="Columns or rows of a unit, for granularity column and row.")] = 128,
    least: LimitOption = None,
    most: CapOption = None,
    latency: Annotated[Path | None, typer.Option(help="Measured latency table, for a budget in us.")] = None,
    refine: Annotated[int, typer.Option(min=0, help="Rounds of measuring around the plan; needs a text.")] = 0,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Write the plan of least loss within a budget that counts stored bytes: scales, zeros and padding included."""
    from ...allocate import Budget, LatencyTable, allocate
    from ...allocate.measured import refine as refined
    from ...allocate.methods import METHODS, check_method

    wanted, table = Budget.parse(budget), None if latency is None else LatencyTable.from_file(latency)
    check_method(method)
    row = METHODS[method]
    if (row.needs_text or refine) and calibration is None:
        raise PlanError(f"method {method!r} looks at activations, so it needs a text: --calibration FILE")
    setting = Setting(model, granularity, bits, group_sizes, quantizer, calibration, calibration_tokens, span)
    with progress(method, hidden=as_json or quiet) as report:
        study, _ = setting.study(parse_limits(least, most), report)

        def solve(losses: Sequence[Sequence[float]]) -> Any:
            options: dict[str, Any] = {"solver": solver, "latency": table, "model": model.name}
            return allocate(study.linears, study.units, losses, wanted, **options)

        losses = row.run(study)
        got, kls = refined(study, losses, solve, refine) if refine else (solve(losses), [])
    facts = {
        "bytes": got.bytes,
        "bpw": got.bpw,
        "weights": got.weights,
        "loss": got.loss,
        "us": got.us,
        "method": method,
        "split_units": len(got.splits),
        "kl": kls,
    }
    if output is not None:
        got.plan.to_file(output)
        note(
            f"wrote {output}: {got.bpw:.4f} stored bits for each of {got.weights:,} weights, {got.bytes:,} bytes", quiet
        )
    if as_json:
        print_json(facts)
    elif output is None:
        print(got.plan.to_json(), end="")


def methods(as_json: JsonFlag = False) -> None:
    """The importance methods: what they look at, what they cost, where they come from."""
    from dataclasses import asdict

    from ...allocate.methods import METHODS

    rows = [{key: value for key, value in asdict(m).items() if key != "run"} for m in METHODS.values()]
    if as_json:
        print_json({"methods": rows})
        return
    cells = [[m["name"], "yes" if m["needs_text"] else "no", m["cost"], m["summary"], m["source"]] for m in rows]
    print_table(None, ["<method", "<text", "<cost", "<loss", "<source"], cells)
