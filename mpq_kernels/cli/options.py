"""The arguments and options that several commands share: one meaning, one spelling, one help text each.

-o, --output FILE   the file that is written      --json    one JSON object on stdout
OUT, MODEL, DIR     directories, by position      --quiet   nothing on stderr but errors
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from .choices import OneOf


def _zero_kinds() -> Iterable[str]:
    from ..format.kinds import ZERO_KINDS

    return ZERO_KINDS


def _scale_dtypes() -> Iterable[str]:
    from ..format.codes import SCALE_DTYPES

    return SCALE_DTYPES


def _backends() -> Iterable[str]:
    from ..backends import BACKENDS

    return BACKENDS


def _activations() -> Iterable[str]:
    from ..backends import ACTIVATIONS

    return ACTIVATIONS


def _dtypes() -> Iterable[str]:
    from ..dense.checkpoint import COMPUTE_DTYPES

    return COMPUTE_DTYPES


def _quantizers() -> Iterable[str]:
    from ..quantize import QUANTIZERS

    return QUANTIZERS


def _text_free_quantizers() -> Iterable[str]:
    from ..quantize import QUANTIZERS

    return (name for name, row in QUANTIZERS.items() if not row.needs_calibration)


def _granularities() -> Iterable[str]:
    from ..allocate import GRANULARITIES

    return GRANULARITIES


def _methods() -> Iterable[str]:
    from ..allocate.methods import METHODS

    return METHODS


# What is printed, and where
JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else there.")]
QuietFlag = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no notes on stderr.")]
OutputOption = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="FILE", help="File to write; stdout without it.")
]

# Directories and files that are read
PackedDir = Annotated[Path, typer.Argument(metavar="OUT", help="Packed directory, as `mpq pack` writes it.")]
ModelDir = Annotated[Path, typer.Argument(metavar="MODEL", help="Dense Hugging Face directory with safetensors.")]
AnyDir = Annotated[Path, typer.Argument(metavar="DIR", help="Packed or dense model directory.")]
ShapesOf = Annotated[Path, typer.Argument(metavar="MODEL", help="Dense model directory, or its config.json alone.")]
PlanFile = Annotated[Path, typer.Argument(metavar="PLAN", help="Plan as JSON.")]

# How a model runs
DeviceOption = Annotated[str, typer.Option(help="Where to run: cpu, cuda, cuda:1, ...")]
BackendOption = Annotated[
    str | None,
    typer.Option(parser=OneOf(_backends), help="What multiplies by packed weights; without it, the first that can."),
]
ActivationsOption = Annotated[
    str,
    typer.Option(
        parser=OneOf(_activations), help="int8: faster products on the CPU, the inputs of packed layers rounded."
    ),
]
DtypeOption = Annotated[
    str,
    typer.Option(parser=OneOf(lambda: ("auto", *_dtypes())), help="Dtype to compute in; auto is the model's own."),
]
CompileFlag = Annotated[
    bool,
    typer.Option("--compile", help="Compile the decode step with torch.compile first: seconds that later tokens save."),
]
PlainDtypeOption = Annotated[str, typer.Option(parser=OneOf(_dtypes), help="Dtype of the activations.")]

# A uniform plan
WidthOption = Annotated[int, typer.Option(min=1, max=8, help="Width of every linear layer, 1 to 8.")]
GroupOption = Annotated[int, typer.Option(help="Codes along K that share a scale; -1 for all of K.")]
SymmetricFlag = Annotated[bool, typer.Option("--symmetric", help="No zero points: --zero none.")]
ZeroOption = Annotated[str, typer.Option(parser=OneOf(_zero_kinds), help="Kind of the zero points.")]
ScaleOption = Annotated[str, typer.Option(parser=OneOf(_scale_dtypes), help="Dtype of the scales.")]
HeadOption = Annotated[int, typer.Option(help="Width of the output head, 1 to 8; 16 keeps it as it is.")]
TowersOption = Annotated[
    int, typer.Option(help="Width of vision and audio towers and projectors, 1 to 8; 16 keeps them as they are.")
]
EmbeddingsOption = Annotated[
    int, typer.Option(help="Width of the token embeddings and of a head tied to them, 1 to 8; 16 keeps them.")
]

# Quantizing, and the text it looks at
QuantizerOption = Annotated[
    str, typer.Option(parser=OneOf(_quantizers), help="How codes are found (docs/cli.md says which needs a text).")
]
TextFreeQuantizerOption = Annotated[
    str, typer.Option(parser=OneOf(_text_free_quantizers), help="What the plan is for.")
]

# Allocation
MethodOption = Annotated[
    str | None,
    typer.Option(
        parser=OneOf(_methods),
        help="Importance method (`mpq plan methods`); without it, fisher with a text and frobenius with none.",
    ),
]
MethodsOption = Annotated[
    str | None,
    typer.Option(
        parser=OneOf(_methods, several=True),
        help="Importance methods; without it, frobenius, and with a text fisher as well.",
    ),
]
GranularityOption = Annotated[str, typer.Option(parser=OneOf(_granularities), help="What gets a width of its own.")]
WidthsOption = Annotated[str, typer.Option(help="Widths to choose from, 1 to 8 and 16 (kept), such as 2,3,4.")]
GroupsOption = Annotated[str, typer.Option(help="Group sizes to choose from, such as 32,64; -1 for all of K.")]
CalibrationOption = Annotated[Path | None, typer.Option(help="UTF-8 text, for methods that run the model.")]
TokensOption = Annotated[int, typer.Option(min=2, help="Tokens of it that are read.")]


def given(ctx: typer.Context, name: str) -> bool:
    """Whether a parameter stands on the command line, as opposed to having its default."""
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"
