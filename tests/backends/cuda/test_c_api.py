"""The C interface from C: the header in C99 and C++17, and examples/c_api on the simulator and on the built library."""

import re
import subprocess
from pathlib import Path

import pytest

from mpq_kernels.format.codes import LAYOUT_ID
from tests.backends.cuda import simulated

ROOT = Path(__file__).resolve().parents[3]
EXAMPLE = ROOT / "examples" / "c_api" / "main.c"
STRICT = ["-Wall", "-Wextra", "-Werror", "-pedantic", f"-I{ROOT / 'csrc'}"]
REFUSALS = {1: "no qweight", 3: "x of fp32", 4: "9 bits", 5: "a gap", 6: "an odd place", 9: "an old device"}


def run(*command):
    """(status, output) of a program."""
    done = subprocess.run([str(c) for c in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.returncode, done.stdout


def build(source, target, *flags):
    """Compile and link a C program, without a warning."""
    status, output = run("gcc", "-std=c99", "-O1", *STRICT, source, "-o", target, *flags, "-lm")
    assert (status, output) == (0, "")
    return target


@pytest.mark.parametrize("compiler,standard,language", [("gcc", "c99", "c"), ("g++", "c++17", "c++")])
def test_header(tmp_path, compiler, standard, language):
    source = tmp_path / "header.txt"
    source.write_text('#include "include/mpq.h"\nint main(void) { return mpq_version() != MPQ_VERSION; }\n')
    assert run(compiler, f"-std={standard}", *STRICT, "-fsyntax-only", "-x", language, source) == (0, "")
    # The same command finds an error in the header.
    source.write_text('#include "include/mpq.h"\nint main(void) { return mpq_linear(0); }\n')
    assert run(compiler, f"-std={standard}", *STRICT, "-fsyntax-only", "-x", language, source)[0] != 0


def simulator_flags():
    """Flags that link a program with the simulated kernels."""
    path = Path(simulated.library()._name)
    return "-DMPQ_WITH_SIM", path, f"-Wl,-rpath,{path.parent}"


def check_host_part(output):
    """What the example prints whatever it is linked with."""
    lines = output.splitlines()
    assert lines[:2] == ["version 2", f"layout {LAYOUT_ID}"]
    assert re.fullmatch(r"workspace \d+ bytes", lines[2])
    refused = {int(m[2]): (m[1], m[3]) for m in re.finditer(r"^refused, (.*): (\d+), (.*)$", output, re.M)}
    assert refused.keys() == REFUSALS.keys()
    for status, what in REFUSALS.items():
        assert what in refused[status][0]
        assert refused[status][1] not in ("", "unknown error")


def test_example_on_the_simulator(tmp_path):
    status, output = run(build(EXAMPLE, tmp_path / "example", *simulator_flags()))
    assert status == 0, output
    check_host_part(output)
    texts = [simulated.library().mpq_error_text(status).decode() for status in REFUSALS]
    assert re.findall(r"^refused, .*?: \d+, (.*)$", output, re.M) == texts
    assert re.search(r"multiplied 70 x 192 by 3 tokens on sm_90: largest error 0\.\d+ of a rounding", output)


@pytest.mark.parametrize(
    "old,new",
    [
        ("word = lane * 4 + c;", "word = lane + 32 * c;"),
        ("8 * (n % 8) + 4 * (n / 8 % 2)", "8 * (n % 8) + 4 * (n / 16 % 2)"),
        (">> 1);\n", ">> 2);\n"),
    ],
    ids=["word", "row of scales", "plane"],
)
def test_example_finds_a_wrong_layout(tmp_path, old, new):
    text = EXAMPLE.read_text()
    assert old in text
    source = tmp_path / "main.c"
    source.write_text(text.replace(old, new))
    status, output = run(build(source, tmp_path / "example", *simulator_flags()))
    assert status == 1, output


def library_objects():
    """(objects of the torch-free library, flags of the CUDA runtime) that the build of the package left, or a skip."""
    found = sorted(ROOT.glob("build/temp*/mpq_kernels._cuda/build.ninja"))
    if not found:
        pytest.skip("no CUDA library was built here (no nvcc, or built elsewhere)")
    objects = [str(o) for o in sorted(found[-1].parent.glob("*.o")) if o.name != "cuda_ops.o"]
    text = found[-1].read_text()
    folder = re.search(r"-L(\S+) -lcudart_static", text)[1]
    include = re.search(r"-isystem (\S+)/include(?= -I| *$)", text, re.M)[1] + "/include"
    return objects, [f"-L{folder}", "-lcudart_static", "-lstdc++", "-lpthread", "-ldl", "-lrt"], include


@pytest.mark.parametrize("cuda", [False, True], ids=["host", "cuda"])
def test_example_on_the_library(tmp_path, cuda):
    objects, runtime, include = library_objects()
    with_device = ["-DMPQ_WITH_CUDA", "-isystem", include] if cuda else []
    status, output = run(build(EXAMPLE, tmp_path / "example", *with_device, *objects, *runtime))
    assert status == 0, output
    check_host_part(output)
    assert ("multiplied" in output or "no CUDA device" in output) == cuda
