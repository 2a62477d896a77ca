"""Every header of csrc compiles as the first, and only, thing that a source includes; twice changes nothing.

cpu/            with the flags and vectors of the files of cpu/instances that include it: the fewest and the most
cuda/, sim/     as for the host simulator; what needs the CUDA toolkit, with nvcc
torch/          the same, with the headers of torch
"""

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest

from mpq_kernels.format.kinds import ZERO_KINDS
from mpq_kernels.format.layout import Segment, WeightLayout
from tests.made.cpu_sources import cpu_sources, isa_flags

CSRC = Path(__file__).resolve().parents[1] / "csrc"
HEADERS = sorted(
    p.relative_to(CSRC) for p in CSRC.rglob("*") if p.suffix in (".h", ".inl", ".cuh") and p.parent.name != "generated"
)
INCLUDE = re.compile(r'^#(?:include|define MPQ_SIMD) "(.+)"', re.MULTILINE)
DEFINED = re.compile(r"^(?:\w[\w:<>,*& ]*)[ *&](\w+)(?= ?[({=;\[<])", re.MULTILINE)  # at the left margin
COMPILER = os.environ.get("CXX", "g++")
CXX = [COMPILER, "-std=c++20", "-fsyntax-only", f"-I{CSRC}", "-x", "c++", "-"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CSRC / "generated/layout.h").exists(), reason="needs the source tree it was built from"),
    pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"needs {COMPILER}"),
]


@cache
def includes(path: Path) -> frozenset[Path]:
    """Files of csrc that a file includes, and those that they include."""
    found = set()
    for name in INCLUDE.findall((CSRC / path).read_text()):
        beside = path.parent / name
        direct = beside if (CSRC / beside).exists() else Path(name)
        if (CSRC / direct).exists():
            found |= {direct, *includes(direct)}
    return frozenset(found)


def cpu_ways(header: Path) -> list[tuple[list[str], str]]:
    """(compiler flags, lines before the include) of the instances with the fewest flags and with the most."""
    instances = [p for p in cpu_sources() if p.parent.name == "instances" and header in includes(p.relative_to(CSRC))]
    instances.sort(key=lambda p: len(isa_flags(p)))
    chosen = dict.fromkeys([*instances[:1], *instances[-1:]])
    return [(isa_flags(p), "".join(re.findall(r"^#define MPQ_SIMD .*\n", p.read_text(), re.MULTILINE))) for p in chosen]


def torch_flags() -> list[str]:
    from torch.utils.cpp_extension import include_paths

    paths = [flag for path in include_paths() for flag in ("-isystem", path)]
    return ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DTORCH_STABLE_ONLY", *paths]


def commands(header: Path) -> list[tuple[list[str], str]]:
    """(command that reads a source from its input, lines before the include), or a skip."""
    if header.parts[0] == "cpu":
        ways = cpu_ways(header)
        if not ways:
            pytest.skip("its instruction sets are not of this machine, or no instance includes it")
        return [([*CXX, *flags], before) for flags, before in ways]
    if "#include <cuda" in (CSRC / header).read_text() and header.parts[0] != "torch":
        nvcc = shutil.which("nvcc", path=f"{os.environ.get('CUDA_HOME', '')}/bin:{os.environ['PATH']}")
        if nvcc is None:
            pytest.skip("needs nvcc")
        return [([nvcc, "-std=c++20", f"-I{CSRC}", "-arch=sm_80", "-x", "cu", "-ptx", "-o", os.devnull, "-"], "")]
    return [([*CXX, "-DMPQ_SIM", *(torch_flags() if header.parts[0] == "torch" else [])], "")]


def errors(header: Path | str) -> str:
    """What compilers say of a header."""
    found = ""
    for command, before in commands(Path(header)):
        source = f'{before}#include "{header}"\n#include "{header}"\n'
        done = subprocess.run(command, input=source, capture_output=True, text=True)
        found += done.stderr if done.returncode else ""
    return found


@pytest.fixture(scope="module")
def results():
    """The headers' errors, found two at a time."""
    with ThreadPoolExecutor(2) as pool:
        yield {header: pool.submit(errors, header) for header in HEADERS}


@pytest.mark.parametrize("header", HEADERS, ids=str)
def test_header_alone(results, header):
    assert not results[header].result()


def code(path: Path) -> str:
    """Text of a file without comments and strings."""
    return re.sub(r'//.*|"[^"\n]*"', "", (CSRC / path).read_text())


def lacking(files: list[Path]) -> list[str]:
    """Names of one of these files that another uses without including it by name."""
    owners = {name: path for path in files for name in DEFINED.findall(code(path))}
    found = []
    for path in files:
        text = (CSRC / path).read_text()
        for name in sorted(set(re.findall(r"\w+", code(path))) & owners.keys()):
            if owners[name] != path and str(owners[name]) not in text:
                found.append(f"{path}: {name} of {owners[name]}")
    return found


def test_kernels_include_what_they_use():
    """Compilers do not look for names that a template calls until something instantiates it."""
    files = [p for p in HEADERS if p.suffix == ".inl"]
    names = {name for path in files for name in DEFINED.findall(code(path))}
    assert {"for_each_chunk", "kFewBlocks", "GroupParams", "Stripe", "add_places", "kUnpackBlock"} <= names
    assert lacking(files) == []


def test_a_lost_include_of_a_template_is_found(tmp_path, monkeypatch):
    for file in ("exact/decode.inl", "exact/decode_float.inl"):
        text = (CSRC / "cpu" / file).read_text().replace('#include "cpu/exact/decode.inl"\n', "")
        (tmp_path / Path(file).name).write_text(text)
    monkeypatch.setitem(globals(), "CSRC", tmp_path)
    assert lacking([Path("decode.inl"), Path("decode_float.inl")]) == ["decode_float.inl: for_each_chunk of decode.inl"]


def test_all_rooms_are_looked_at():
    assert {header.parts[0] for header in HEADERS} >= {"cpu", "cuda", "include", "sim", "torch"}


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("#pragma once\ninline F twice(F v) { return add(v, v); }\n", "F"),
        ('#include "cpu/simd/simd.h"\nstruct Pair { mpq::cpu::F both[2]; };\n', "redefinition"),
    ],
    ids=["an include is missing", "no pragma once"],
)
def test_what_is_wrong_is_found(tmp_path, monkeypatch, text, word):
    (tmp_path / "wrong.h").write_text(text)
    monkeypatch.setitem(globals(), "commands", lambda header: [([*CXX, f"-I{tmp_path}"], "")])
    assert word in errors("wrong.h")


def test_segments_are_given_in_the_order_of_the_header():
    text = (CSRC / "generated/layout.h").read_text()
    names = [re.sub(r"(?!^)(?=[A-Z])", "_", name).lower() for name in re.findall(r"kSegment(\w+)", text)]
    segments = (Segment(0, 70, 0, 128, 3, 64, "int"), Segment(0, 70, 128, 320, 5, 192, "none"))
    wanted = [ZERO_KINDS.index(s.zero) if name == "zero" else getattr(s, name) for s in segments for name in names[:-1]]
    assert names[-1] == "ints" and WeightLayout(70, 320, segments).segment_ints() == wanted
