"""`mpq plan uniform`: a plan that gives every linear layer of a model one width."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..options import (
    EmbeddingsOption,
    GroupOption,
    HeadOption,
    OutputOption,
    QuietFlag,
    ScaleOption,
    ShapesOf,
    SymmetricFlag,
    TowersOption,
    WidthOption,
    ZeroOption,
)
from ..output import note
from .resolved import model_linears

if TYPE_CHECKING:
    from ...dense.checkpoint import LinearSpec
    from ...plan.plan import Plan


def command(
    model: ShapesOf,
    bits: WidthOption,
    group_size: GroupOption = 64,
    symmetric: SymmetricFlag = False,
    zero: ZeroOption = "int",
    scale_dtype: ScaleOption = "float16",
    lm_head: HeadOption = 16,
    towers: TowersOption = 16,
    embeddings: EmbeddingsOption = 16,
    output: OutputOption = None,
    quiet: QuietFlag = False,
) -> None:
    """Write a plan that gives every linear layer of MODEL one width."""
    from ...plan.resolve import resolve

    linears, _ = model_linears(model)
    kept = {"lm_head": lm_head, "towers": towers, "embeddings": embeddings}
    plan = uniform_plan(linears, bits, group_size, symmetric, zero, scale_dtype, **kept)
    resolve(plan, linears)  # refuses a group size that does not divide some K
    if output is None:
        print(plan.to_json(), end="")
        return
    plan.to_file(output)
    note(f"wrote {output}", quiet)


def uniform_plan(
    model: Path | Sequence[LinearSpec],
    bits: int,
    group_size: int,
    symmetric: bool,
    zero: str,
    scale_dtype: str,
    **kept: int,
) -> Plan:
    """Plan.uniform from command-line words, which Plan itself checks. Raises PlanError, CheckpointError.

    kept: bits of what is kept unless they say otherwise: lm_head, towers, embeddings.
    """
    from ...plan.plan import Plan

    words: dict[str, Any] = {"zero": zero, "scale_dtype": scale_dtype, **kept}
    return Plan.uniform(model, bits=bits, group_size=group_size, symmetric=symmetric, **words)
