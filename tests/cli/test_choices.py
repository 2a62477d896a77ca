"""Options with fixed values: help lists those of their table, and another one is wrong usage that names them."""

import inspect
from collections.abc import Iterable

import pytest

from mpq_kernels import cli
from mpq_kernels.allocate import GRANULARITIES, SOLVERS
from mpq_kernels.allocate.methods import METHODS
from mpq_kernels.backends import ACTIVATIONS, BACKENDS
from mpq_kernels.cli import plan
from mpq_kernels.cli.choices import choices
from mpq_kernels.cli.export import ONNX_OPERATORS
from mpq_kernels.cli.export import TARGETS as EXPORTED
from mpq_kernels.dense.checkpoint import COMPUTE_DTYPES
from mpq_kernels.format.codes import SCALE_DTYPES
from mpq_kernels.format.kinds import ZERO_KINDS
from mpq_kernels.imports.formats import FORMATS as IMPORTED
from mpq_kernels.plan.foreign import FORMATS
from mpq_kernels.quantize import QUANTIZERS

COMMANDS = {(name,): command for name, command in cli.COMMANDS.items()}
COMMANDS |= {("plan", name): command for name, command in plan.COMMANDS.items()}
CHOICES = [(words, name, one_of) for words, command in COMMANDS.items() for name, one_of in choices(command).items()]
# Whatever command has a parameter of this name takes nothing but names of this table.
TABLES: dict[str, Iterable[str]] = {
    "zero": ZERO_KINDS,
    "scale_dtype": SCALE_DTYPES,
    "quantizer": QUANTIZERS,
    "backend": BACKENDS,
    "activations": ACTIVATIONS,
    "method": METHODS,
    "methods": METHODS,
    "granularity": GRANULARITIES,
    "solver": SOLVERS,
    "dtype": {"auto", *COMPUTE_DTYPES},
    "operators": ONNX_OPERATORS,
    "to": EXPORTED,
}
FORMS = {("bench",): {"md", "csv"}, ("plan", "import"): {"auto", *FORMATS}, ("import",): {"auto", *IMPORTED}}
LESS = {  # commands that take only a part of a table
    ("plan", "latency", "dtype"): COMPUTE_DTYPES,
    ("export", "dtype"): COMPUTE_DTYPES,
    ("plan", "allocate", "quantizer"): {"rtn", "hqq"},
    ("plan", "sweep", "quantizer"): {"rtn", "hqq"},
}
SPELLED = {("bench", "form"): "--format", ("plan", "import", "form"): "--from", ("import", "form"): "--from"}
NEEDED = {  # what stands before the option, so that only its value is wrong
    ("pack",): ["dense", "o", "--bits", "4"],
    ("import",): ["dense", "o"],
    ("generate",): ["packed", "--prompt", "x"],
    ("ppl",): ["packed", "--text", "text.txt"],
    ("kld",): ["packed", "--original", "dense"],
    ("bench",): ["packed"],
    ("serve",): ["packed"],
    ("eval",): ["packed", "--tasks", "x"],
    ("export",): ["packed", "new", "--to", "onnx"],
    ("plan", "uniform"): ["dense", "--bits", "4"],
    ("plan", "allocate"): ["dense", "--budget", "3"],
    ("plan", "sweep"): ["dense", "--text", "text.txt", "-o", "o.json"],
    ("plan", "latency"): ["dense", "-o", "o.json"],
    ("plan", "import"): ["plan.json", "--model", "dense"],
}


def described(text: str) -> str:
    """Help without its frame, in one line."""
    return " ".join(text.replace("\u2502", " ").split())


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_such_option_takes_the_names_of_its_table(words):
    found = {name: set(one_of.names) for name, one_of in choices(COMMANDS[words]).items()}
    wanted = {
        name: set(LESS.get((*words, name), FORMS.get(words) if name == "form" else TABLES[name]))
        for name in inspect.signature(COMMANDS[words]).parameters
        if name in TABLES or name == "form"
    }
    assert found == wanted


@pytest.mark.parametrize(("words", "name", "one_of"), CHOICES, ids=lambda value: str(value) if value else "")
def test_help_lists_the_values_and_another_is_wrong_usage(run, monkeypatch, words, name, one_of):
    option = SPELLED.get((*words, name), f"--{name.replace('_', '-')}")
    monkeypatch.setenv("COLUMNS", "200")
    text = described(run(*words, "--help").out)
    part = text[text.index(f" {option} ") :]
    assert f"{'Any' if one_of.several else 'One'} of {', '.join(one_of.names)}." in part
    bad = one_of.names[0] + "x"
    message = run.misuse(*words, *NEEDED[words], option, f"{one_of.names[0]},{bad}" if one_of.several else bad)
    assert f"'{option}'" in message and f"'{bad}' is not one of {', '.join(one_of.names)}" in message
    assert f"did you mean {one_of.names[0]}" in message


def test_every_command_that_prints_results_has_json():
    """All of them but `plan uniform`, whose stdout is the plan: JSON already, and `serve`, which only runs."""
    without = {words for words, command in COMMANDS.items() if "as_json" not in inspect.signature(command).parameters}
    assert without == {("plan", "uniform"), ("serve",)}


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_one_spelling_and_one_meaning(run, words):
    """-o and --output are one option and mean a file; no command has another word for it."""
    text = run(*words, "--help").out
    lines = [described(line) for line in text.splitlines()]
    assert not any(f" {old} " in f" {line} " for line in lines for old in ("--out", "--outfile", "-f"))
    for line in lines:
        assert ("--output" in line) == (" -o " in f" {line} ")
        assert "--output" not in line or "FILE" in line
