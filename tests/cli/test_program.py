"""The program `mpq`: help, version, exit codes, and what it imports before a command runs."""

import subprocess
import sys
from pathlib import Path

import pytest

from mpq_kernels.version import VERSION

COMMANDS = ("plan", "pack", "import", "inspect", "verify", "generate", "ppl", "kld", "bench", "tune", "doctor")
PLAN_COMMANDS = tuple(
    ["uniform", "check", "validate", "show", "size", "diff", "allocate", "methods", "sweep", "latency", "import"]
)


def test_help_names_every_command(run):
    text = run("--help").out
    assert all(f"\n│ {name} " in text or f" {name} " in text for name in COMMANDS)
    for name in COMMANDS:
        assert "--help" in run(name, "--help").out


def test_help_of_plan_names_every_command(run):
    text = run("plan", "--help").out
    assert all(f" {name} " in text for name in PLAN_COMMANDS)


def test_version(run):
    assert run("--version").out == f"mpq_kernels {VERSION}\n"


@pytest.mark.parametrize(
    "words", [["--help"], ["--version"], ["plan", "--help"], ["inspect", "--help"], ["plan", "uniform", "--help"]]
)
def test_nothing_heavy_is_imported_before_a_command_needs_it(words):
    program = (
        f"import sys; from mpq_kernels.cli import main; code = main({words!r});"
        "sys.exit(code or next((m for m in ('torch', 'transformers', 'numpy') if m in sys.modules), 0))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "words",
    [
        ["nonsense"],
        ["pack", "dense"],
        ["pack", "dense", "out"],
        ["pack", "dense", "out", "--bits", "4", "--plan", "plan.json"],
        ["pack", "dense", "out", "--bits", "9"],
        ["pack", "dense", "out", "--plan", "plan.json", "--group-size", "64"],
        ["pack", "dense", "out", "--plan", "plan.json", "--symmetric"],
        ["plan", "uniform", "dense", "--bits", "0"],
        ["ppl", "packed"],
        ["ppl", "packed", "--text", "text.txt", "--window", "1"],
        ["generate", "packed", "--prompt", "x", "--temperature", "-1"],
    ],
)
def test_wrong_usage_is_2(run, words):
    refused = run(*words, code=2)
    assert refused.out == ""
    assert "mpq" in refused.err
    assert not Path("out").exists()


def test_interrupt_is_130(run, monkeypatch):
    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr("mpq_kernels.cli.doctor.examine", interrupt)
    assert run("doctor", code=130).out == ""


def test_a_full_disk_is_one_message(run, monkeypatch):
    def full():
        raise OSError(28, "No space left on device", "/some/file")

    monkeypatch.setattr("mpq_kernels.cli.doctor.examine", full)
    assert run("doctor", code=1).err == "mpq: /some/file: No space left on device\n"


def test_a_defect_keeps_its_traceback(run, monkeypatch):
    def defect():
        raise ZeroDivisionError

    monkeypatch.setattr("mpq_kernels.cli.doctor.examine", defect)
    with pytest.raises(ZeroDivisionError):
        run("doctor")
