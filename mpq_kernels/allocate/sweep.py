"""A sweep: plans of several methods at several budgets, and uniform ones, each evaluated once on one text.

    {"settings": {...}, "original_ppl": ..., "losses": {method: [[...]]}, "seconds": {method: ...},
     "points": {"fisher 2.5": {"method", "budget", "bpw", "ppl", "kl", "top1", "plan"}, "uniform 3g64": ...}}

The file is rewritten, by way of a temporary one, after every point, so that a sweep goes on where it was stopped.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, PlanError
from ..evaluate.divergence import Predictions, divergence, predict
from ..evaluate.perplexity import token_windows
from ..files.strict import read_json_object
from ..plan.plan import Plan
from . import Budget, allocate, make_plan
from .methods import METHODS
from .study import Study

WINDOW = 256
TOP_K = 2048


class Sweep:
    """Measured plans in a JSON file, and the model that measures the rest."""

    def __init__(
        self, path: Path, settings: dict[str, Any], study: Study, tokenizer: Any, text: str, max_tokens: int
    ) -> None:
        """Raises PlanError for a file that was made with other settings, or that is no sweep."""
        self.path, self.study = path, study
        self.data: dict[str, Any] = {"settings": settings, "losses": {}, "seconds": {}, "points": {}}
        if path.exists():
            try:
                held = read_json_object(path)
            except CheckpointError as error:
                raise PlanError(str(error)) from error
            if set(self.data) - set(held):
                raise PlanError(f"{path}: is not the file of a sweep; choose another name (--output)")
            if held["settings"] != settings:
                other = [key for key in settings if held["settings"].get(key) != settings[key]]
                raise PlanError(f"{path}: was made with another {', '.join(other)}; choose another name (--output)")
            self.data = held
        limit = getattr(study.model.config.get_text_config(), "max_position_embeddings", WINDOW)
        self.rows = token_windows(tokenizer, text, min(WINDOW, limit), max_tokens)
        self.original: Predictions | None = None  # made when the first point is measured

    def run(self, methods: Sequence[str], budgets: Sequence[float]) -> None:
        """Measure what is not in the file: every method at every budget, and every uniform choice near them."""
        units, linears = self.study.units, self.study.linears
        weights = sum(unit.weights for unit in units)
        for choice in [c for c in units[0].choices if not c.kept]:
            if not all(choice in unit.choices for unit in units):
                continue
            picks = [unit.choices.index(choice) for unit in units]
            bpw = 8 * sum(unit.bytes[p] for unit, p in zip(units, picks, strict=True)) / weights
            if bpw <= max(budgets) + 0.5:
                self._point(f"uniform {choice.text}", "uniform", None, bpw, make_plan(linears, units, picks))
        for method in methods:
            for value in budgets:
                name = f"{method} {value:g}"
                if name in self.data["points"]:
                    continue
                got = allocate(linears, units, self._losses(method), Budget("bits", value))
                self._point(name, method, value, got.bpw, got.plan)

    def _losses(self, method: str) -> list[list[float]]:
        if method not in self.data["losses"]:
            start = time.perf_counter()
            self.data["losses"][method] = METHODS[method].run(self.study)
            self.data["seconds"][method] = time.perf_counter() - start
            self._write()
        found: list[list[float]] = self.data["losses"][method]
        return found

    def _point(self, name: str, method: str, budget: float | None, bpw: float, plan: Plan) -> None:
        if name in self.data["points"]:
            return
        if self.original is None:
            self.original = predict(self.study.model, self.rows, TOP_K)
        with self.study.with_plan(plan):
            got = divergence(self.study.model, self.original)
        point: dict[str, Any] = {"method": method, "budget": budget, "bpw": bpw, "ppl": got.ppl, "kl": got.kl}
        point |= {"kl_stderr": got.stderr, "top1": got.top1, "plan": json.loads(plan.to_json())}
        self.data["points"][name] = point
        self.data["original_ppl"] = got.original_ppl
        self._write()

    def _write(self) -> None:
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        temporary.write_text(json.dumps(self.data, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, self.path)


def points(data: dict[str, Any]) -> list[dict[str, Any]]:
    """Points of a sweep by method, then by stored bits."""
    return sorted(data["points"].values(), key=lambda p: (p["method"], p["bpw"]))
