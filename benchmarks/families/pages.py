"""docs/models.md, from the rows of a sweep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from .check import NOT_JUDGED, REFUSED, RIGHT

WIDTH = 120
HEAD = """# Models

Made by `python -m benchmarks.families --write-docs docs/models.md` with transformers {transformers}, and not edited by
hand.

Each family stands here as a tiny random model. Packed means: `pack` with mixed widths; `load`; every packed weight
differs from the dense weight of its own linear by the error that packing reported; logits are those of the dense model
that holds the dequantized weights; `save_pretrained` and `load` again give the same bits. Refused means: before any
work, with this reason. Not judged: transformers itself does not make, save, load or run the tiny model.
"""


def page(titles: Mapping[str, str], rows: Sequence[Mapping[str, Any]]) -> str:
    """The page. titles: of kinds, by name."""
    out = [HEAD.format(transformers=version("transformers"))]
    for kind, title in titles.items():
        own = [row for row in rows if row["kind"] == kind]
        if not own:
            continue
        packed = [row["model_type"] for row in own if row["state"] == RIGHT]
        out.append(f"## {title}\n\nPacked: {len(packed)} of {len(own)}.\n")
        out.append(wrapped(packed))
        for state, words in ((REFUSED, "Refused"), (NOT_JUDGED, "Not judged")):
            named = [row for row in own if row["state"] == state]
            if named:
                out.append(f"\n{words}:\n\n| family | reason |\n|---|---|")
                out += [f"| `{row['model_type']}` | {cell(row['why'])} |" for row in named]
        others = [row for row in own if row["state"] not in (RIGHT, REFUSED, NOT_JUDGED)]
        if others:
            out.append("\nWrong:\n\n| family | what happens |\n|---|---|")
            out += [f"| `{row['model_type']}` | {row['state']}: {cell(row['why'])} |" for row in others]
        out.append("")
    return "\n".join(out).rstrip() + "\n"


def wrapped(names: Sequence[str]) -> str:
    """Names in code marks with commas, in lines of at most WIDTH."""
    lines = [""]
    for name in names:
        word = f"`{name}`" + ("." if name == names[-1] else ",")
        if len(lines[-1]) + len(word) + 1 > WIDTH:
            lines.append("")
        lines[-1] += (" " if lines[-1] else "") + word
    return "\n".join(lines)


def cell(text: str) -> str:
    """One line of a table."""
    return " ".join(text.replace("|", "\\|").split())
