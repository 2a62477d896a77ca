"""What `mpq plan allocate` and `mpq plan sweep` look at: a dense model, the choices of its parts, and a text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ..models import open_model, read_text

if TYPE_CHECKING:
    from ...allocate import Limits
    from ...allocate.study import Study


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
    embeddings: bool = False

    @property
    def groups(self) -> list[int]:
        """Group sizes to choose from. Raises typer.BadParameter."""
        return whole_numbers(self.group_sizes, "--group-sizes")

    def study(self, limits: Limits | None = None, report: Any = None) -> tuple[Study, Any]:
        """(study over the dense model in fp32, its tokenizer). Raises MPQError."""
        from ...allocate import make_choices, make_units
        from ...allocate.study import Study
        from ...dense.names import list_linears, list_packable
        from ...evaluate.perplexity import token_windows

        choices = make_choices(whole_numbers(self.bits, "--bits"), self.groups)
        model, tokenizer = open_model(self.model, "cpu", "float32", None)
        linears = list_packable(model) if self.embeddings else list_linears(model)
        units = make_units(linears, self.granularity, choices, span=self.span, limits=limits)
        rows = None
        if self.calibration is not None:
            limit = getattr(model.config.get_text_config(), "max_position_embeddings", 256)
            rows = token_windows(tokenizer, read_text(self.calibration), min(256, limit), self.calibration_tokens)
        return Study(model, linears, units, rows, self.quantizer, report), tokenizer


def whole_numbers(text: str, option: str) -> list[int]:
    """ "2,3,4" as numbers. Raises typer.BadParameter."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{option} {text!r} is not a list of whole numbers such as 2,3,4") from None
