"""One case: made, saved, packed, loaded, compared, saved and loaded again.

transformers:  from_config -> save_pretrained -> from_pretrained, the same logits          else "not judged"
pack           refused before any work, with a reason                                      "refused"
load           every packed weight is that of its own linear, by the error that packing reports
               logits of the dense model that holds the dequantized weights                else "wrong"
save, load     the same logits, bit by bit
"""

from __future__ import annotations

import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import mpq_kernels as mpq
from mpq_kernels.allocate.study import weight_view
from mpq_kernels.dense.checkpoint import DenseCheckpoint
from mpq_kernels.dense.linears import GATE_UP, PARTS, LinearSpec
from mpq_kernels.dense.model import model_class
from mpq_kernels.dense.names import list_linears
from mpq_kernels.nn.experts import PackedExperts

from .cases import TOKENS, VOCAB, Case, Inputs, copies
from .shrink import tiny_config

RIGHT, REFUSED, LATE, WRONG, CRASHED, NOT_JUDGED = "right", "refused", "refused late", "wrong", "crashed", "not judged"
LOGITS = 3e-5  # relative, in the 2-norm: fp32 sums in another order, through a few layers
ERRORS = 1e-3  # relative, of a weight's reported error: one computed in another order of sums
GROUPS = (32, 16, -1)  # of columns: the first that divides K
NOISE = 0.05  # standard deviation
LEAST_SPREAD = 1e-4
MOST_PARAMETERS = 20_000_000
CALIBRATION_ROWS = 8


@dataclass
class Row:
    """What happened to a case. stage: where it ended. why: in words, where it is not right.

    packed: weights (dense modules and experts' linears) that were packed, of `linears`. share: of all parameters.
    difference: of the logits, relative. gptq: "right", or why not; empty when it was not tried.
    """

    kind: str
    model_type: str
    name: str = ""
    state: str = NOT_JUDGED
    stage: str = ""
    why: str = ""
    packed: int = 0
    linears: int = 0
    share: float = 0.0
    difference: float = 0.0
    gptq: str = ""
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self)


class Ended(Exception):
    """A case that ends before the last stage. state, why: as in Row."""

    def __init__(self, state: str, why: str) -> None:
        super().__init__(why)
        self.state = state


def check(case: Case, folder: Path, gptq: bool = False) -> Row:
    """Run a case in an empty folder, in this process."""
    row, start = Row(case.kind, case.model_type), time.monotonic()
    torch.manual_seed(0)
    try:
        with torch.no_grad():
            _Run(case, folder, row).all(gptq)
        row.state, row.stage = RIGHT, ""
    except Ended as ended:
        row.state, row.why = ended.state, str(ended)
    except Exception as error:
        row.state = CRASHED
        last = traceback.extract_tb(error.__traceback__)[-1]
        row.why = f"{in_words(error)} ({Path(last.filename).name}:{last.lineno})"
    row.seconds = round(time.monotonic() - start, 1)
    return row


def in_words(error: BaseException) -> str:
    """Type and first lines of an error."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"


class _Run:
    def __init__(self, case: Case, folder: Path, row: Row) -> None:
        self.case, self.row = case, row
        self.source, self.out, self.saved = folder / "dense", folder / "packed", folder / "saved"

    def all(self, gptq: bool) -> None:
        """Every stage in turn; raises Ended."""
        inputs = self._make()
        report = self._pack(self.out, "rtn")
        self.row.stage = "load"
        model = self._load(self.out)
        self.row.stage = "compare"
        reference = self._twin(model, {name: e for m in report.modules for name, e in m.errors.items()})
        found = self._logits(model, inputs)
        self.row.difference = difference(found, self._logits(reference, inputs))
        if not self.row.difference <= LOGITS:
            raise Ended(WRONG, f"logits differ by {self.row.difference:.1e} of their norm")
        self.row.stage = "save"
        model.save_pretrained(self.saved)
        again = self._load(self.saved)
        if not torch.equal(found, self._logits(again, inputs)):
            raise Ended(WRONG, "saved by save_pretrained and loaded again, it gives other logits")
        if gptq:
            self.row.gptq = self._gptq(inputs)

    def _make(self) -> Inputs:
        """The dense model on disk; its inputs."""
        import transformers

        case, self.row.stage = self.case, "transformers"
        try:
            from transformers.models.auto.configuration_auto import CONFIG_MAPPING

            config = case.config() if case.config else tiny_config(CONFIG_MAPPING[case.model_type], case.changes)
            auto = getattr(transformers, case.auto)
            with torch.device("meta"):
                count = auto.from_config(config).num_parameters()
            if count > MOST_PARAMETERS:
                raise ValueError(f"the config is not tiny yet: {count:,} parameters")
            model = auto.from_config(config).eval().float()
            self.row.name = type(model).__name__
            for parameter in model.parameters():
                if parameter.dim() == 1:  # fresh norms are one and biases zero, which would hide mistakes
                    parameter.add_(torch.randn_like(parameter) * NOISE)
                elif not parameter.std() > LEAST_SPREAD:  # zero, or not initialized at all
                    parameter.normal_(std=NOISE)
            model.save_pretrained(self.source)
            inputs = case.inputs(model.config)
            first = self._logits(model, inputs)
            second = self._logits(self._dense(), inputs)
        except Exception as error:
            raise Ended(NOT_JUDGED, in_words(error)) from error
        if not bool(torch.isfinite(first).all()):
            raise Ended(NOT_JUDGED, "transformers' own tiny model gives NaN or Inf")
        if not difference(second, first) <= LOGITS:
            raise Ended(NOT_JUDGED, "transformers' own save and load changes its logits")
        return inputs

    def _dense(self) -> Any:
        words = {"local_files_only": True, "dtype": torch.float32}
        try:
            return model_class(self.source).from_pretrained(self.source, experts_implementation="eager", **words).eval()
        except ValueError:  # a model without that choice
            return model_class(self.source).from_pretrained(self.source, **words).eval()

    def _logits(self, model: Any, inputs: Inputs) -> torch.Tensor:
        torch.manual_seed(0)
        return self.case.output(model(**copies(inputs)))

    def _pack(self, out: Path, quantizer: str, **options: Any) -> mpq.PackReport:
        self.row.stage, begun = "pack", []
        try:
            source = DenseCheckpoint.open(self.source)
            plan = mixed_plan(source.linears())
            report = mpq.pack(
                self.source, out, plan, quantizer=quantizer, progress=lambda *told: begun.append(told), **options
            )
        except mpq.MPQError as error:
            why = str(error).replace(f"{self.source}", "").strip(" :/")
            raise Ended(LATE if begun else REFUSED, why[:600]) from error
        self.row.linears = len(source.linears())
        self.row.packed = sum(len(module.members) for module in report.modules)
        total = sum(tensor.entry.nbytes for tensor in source.tensors.values()) / 4
        self.row.share = round(report.packed.weights / total, 3)
        return report

    def _load(self, path: Path) -> Any:
        try:
            return mpq.load(path)
        except mpq.MPQError as error:
            raise Ended(LATE, f"{error}"[:600]) from error

    def _twin(self, packed: Any, errors: dict[str, float]) -> Any:
        """The dense model with the dequantized weights. Every weight must miss its own by the error in the report."""
        dense = self._dense()
        stored = {place(spec): spec.name for spec in DenseCheckpoint.open(self.source).linears()}
        filled = 0
        for spec in list_linears(dense):
            value = dequantized(packed, spec)
            if value is None:
                continue
            own(dense, spec)
            view = weight_view(dense, spec)
            name = stored[place(spec)]
            error = float((value - view).norm() / view.norm().clamp_min(1e-30))
            if not abs(error - errors[name]) <= ERRORS * errors[name] + 1e-6:
                raise Ended(WRONG, f"{name} differs from its dense weight by {error:.4f}, and not {errors[name]:.4f}")
            view.copy_(value)
            filled += 1
        if filled != len(errors):
            raise Ended(WRONG, f"{len(errors)} weights were packed, and the loaded model has {filled}")
        return dense

    def _gptq(self, inputs: Inputs) -> str:
        generator = torch.Generator().manual_seed(2)
        tokens = torch.randint(10, min(100, VOCAB), (CALIBRATION_ROWS, TOKENS), generator=generator)
        try:
            self._pack(self.out.with_name("gptq"), "gptq", calibration=mpq.Calibration(tokens=tokens))
        except Ended as ended:
            return f"{ended.state}: {ended}"
        except Exception as error:
            return f"{CRASHED}: {in_words(error)}"
        found = self._logits(self._load(self.out.with_name("gptq")), inputs)
        return RIGHT if bool(torch.isfinite(found).all()) else f"{WRONG}: NaN or Inf"


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """||a - b|| / ||b||."""
    if a.shape != b.shape:
        return float("inf")
    return float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30))


def mixed_plan(specs: list[LinearSpec]) -> mpq.Plan:
    """Widths 8 to 2 in turn, the head included."""
    modules = {}
    for index, spec in enumerate(specs):
        group = next(size for size in GROUPS if size < 0 or spec.in_features % size == 0)
        modules[spec.name] = {"bits": 8 - index % 7, "group_size": group, "symmetric": index % 3 == 0}
    return mpq.Plan.model_validate({"version": 1, "modules": modules})


def place(spec: LinearSpec) -> tuple[Any, ...]:
    """Where a linear is in the model, whatever the files call it."""
    expert = spec.expert
    return (spec.name,) if expert is None else (expert.module, expert.index, expert.part)


def own(model: Any, spec: LinearSpec) -> None:
    """Give a linear a weight of its own where it is tied: a packed one is not."""
    if spec.expert is None:
        linear = model.get_submodule(spec.name)
        linear.weight = torch.nn.Parameter(linear.weight.detach().clone())


def dequantized(model: Any, spec: LinearSpec) -> torch.Tensor | None:
    """W [N, K] of a linear in a packed model, None where it is not packed."""
    expert = spec.expert
    if expert is None:
        module = model.get_submodule(spec.name)
        return module.dequantize() if hasattr(module, "dequantize") else None
    experts = model.get_submodule(expert.module)
    if not isinstance(experts, PackedExperts):
        return None
    leaf = next(leaf for leaf, parts in PARTS.items() if expert.part in parts)
    rows: torch.Tensor = getattr(experts, leaf).dequantize_expert(expert.index)
    if leaf != GATE_UP or len(rows) == spec.out_features:
        return rows
    first = PARTS[leaf].index(expert.part) * spec.out_features
    return rows[first : first + spec.out_features]
