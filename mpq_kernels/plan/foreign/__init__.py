"""Plans of other programs made into plans of ours, against the linears of the model that they are for.

    imported = read_foreign("quantize_config.json", "gptqmodel", "model_dir")
    imported.plan.to_file("plan.json")
    print(*imported.notes, sep="\\n")

`FORMATS` is the table of readers. What a file says is resolved to the exact names of the target's linears, experts
included, so that nothing of a foreign matching rule is left in the plan; the notes tell what was changed, dropped or
reinterpreted. No pickle is loaded and nothing in a file is executed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ...dense.linears import LinearSpec
from ...errors import PlanError
from ...files.strict import close_names
from ..plan import Plan
from .auto_round import is_auto_round, read_auto_round
from .compressed import is_compressed, read_compressed
from .documents import Document, read_document
from .draft import Draft, Note
from .gptqmodel import is_gptqmodel, read_gptqmodel
from .layers import is_mc_moe, is_slim, read_mc_moe, read_slim
from .options import Options
from .quantmoe import is_quantmoe, read_quantmoe
from .tables import is_mixdq, is_shiftaddllm, read_mixdq, read_shiftaddllm

AUTO = "auto"
STRINGS = "quantmoe"  # whose plans are also given as the string itself

__all__ = ["AUTO", "FORMATS", "Format", "Imported", "Note", "read_foreign"]


@dataclass(frozen=True)
class Format:
    """A foreign format: what kinds of files hold it, how it is known and read, and the options it has a use for."""

    summary: str
    kinds: tuple[str, ...]
    recognises: Callable[[Document], bool]
    read: Callable[[Document, Draft, Options], None]
    options: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Imported:
    """A plan, the format that it was in, and what is not as the file said."""

    plan: Plan
    format: str
    notes: tuple[Note, ...]


GROUPS, FLOATS = frozenset({"group_size"}), frozenset({"keep_floats"})
FORMATS: dict[str, Format] = {
    "slim-llm": Format("widths of column groups", ("torch", "json"), is_slim, read_slim, GROUPS),
    "mc-moe": Format("widths of experts", ("torch", "json"), is_mc_moe, read_mc_moe, GROUPS | {"attention_bits"}),
    "mixdq": Format("YAML table of names", ("yaml",), is_mixdq, read_mixdq, GROUPS),
    "shiftaddllm": Format("JSON table of names", ("json",), is_shiftaddllm, read_shiftaddllm, GROUPS),
    "quantmoe": Format("strings such as main_2.attn_4", ("text",), is_quantmoe, read_quantmoe, GROUPS),
    "gptqmodel": Format("quantize_config.json with dynamic", ("json",), is_gptqmodel, read_gptqmodel),
    "auto-round": Format("config with extra_config", ("json",), is_auto_round, read_auto_round, FLOATS),
    "compressed-tensors": Format("config with config_groups", ("json",), is_compressed, read_compressed, FLOATS),
}


def read_foreign(
    path: str | os.PathLike[str],
    format: str,
    model: str | os.PathLike[str] | Sequence[LinearSpec],
    *,
    group_size: int | None = None,
    attention_bits: int | None = None,
    keep_floats: bool = False,
    kept_experts: int | None = None,
) -> Imported:
    """The plan that a foreign file describes, for a model; it resolves.

    path: the file, or for quantmoe the string itself. format: a key of FORMATS, or "auto" for files that only one of
    them can be. model: a dense Hugging Face directory, or its linears. The rest: see Options.

    Raises PlanError: an unreadable or unsafe file, an unknown format, a module that the model does not have, a width
    that cannot be had, an option without use, a plan that does not fit; CheckpointError for a bad model directory.
    """
    options = Options(group_size, attention_bits, keep_floats, kept_experts)
    if format != AUTO and format not in FORMATS:
        raise PlanError(
            f"{format!r} is not a known format{close_names(format, [*FORMATS])}; known: {', '.join(FORMATS)}"
        )
    if format == STRINGS and not os.path.exists(path):
        document = Document("the string", "text", os.fspath(path).strip())
    else:
        kinds = FORMATS[format].kinds if format != AUTO else ("torch", "json", "yaml", "text")
        document = read_document(path, kinds)
    name = _detect(document) if format == AUTO else format
    options.check(name, FORMATS[name].options)
    if isinstance(model, (str, os.PathLike)):
        from ...dense.checkpoint import DenseCheckpoint  # needs torch

        model = DenseCheckpoint.open(model).linears()
    draft = Draft.of(document.where, [spec for spec in model if not spec.embedding])
    FORMATS[name].read(document, draft, options)
    return Imported(draft.plan(options.kept_experts), name, tuple(draft.notes))


def _detect(document: Document) -> str:
    """The only format that a document can be. Raises PlanError with the candidates."""
    found = [name for name, form in FORMATS.items() if document.kind in form.kinds and form.recognises(document)]
    if len(found) == 1:
        return found[0]
    fit = [name for name, form in FORMATS.items() if document.kind in form.kinds]
    why = (
        f"could be {' or '.join(found)}"
        if found
        else f"looks like none of {', '.join(fit)}, which {document.kind} can hold"
    )
    raise PlanError(f"{document.where}: {why}; say which with --from (format=)")
