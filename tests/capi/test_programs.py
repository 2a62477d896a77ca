"""Programs in C and C++ over the installed headers and libraries: found by flags, pkg-config and CMake."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mpq_kernels as mpq
from mpq_kernels import capi
from mpq_kernels.checkpoint.packed import PackedCheckpoint
from mpq_kernels.version import VERSION
from tests.capi.test_cpu import operands, same_bits, shape
from tests.made.checkpoints import tiny_model
from tests.made.mixtures import expert_plan
from tests.made.packed import mixed_plan

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "c_api" / "packed.c"
STRICT = ["-Wall", "-Wextra", "-Werror", "-pedantic"]
HEADERS = ("mpq.h", "mpq_cpu.h", "mpq_model.h")

pytestmark = pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")


def run(*command, **words):
    """Output of a program that ends well."""
    done = subprocess.run(
        [str(c) for c in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **words
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def shown(*options):
    """What `python -m mpq_kernels.capi` prints, as a shell would split it."""
    return run(sys.executable, "-m", "mpq_kernels.capi", *options).split()


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """examples/c_api/packed.c as C11."""
    program = tmp_path_factory.mktemp("c") / "packed"
    flags = shown("--cflags", "--libs")
    assert run("gcc", "-std=c11", *STRICT, EXAMPLE, "-o", program, *flags) == ""
    return program


def pack(tmp_path, family, plan):
    tiny_model(family, tmp_path / "model", dtype=torch.bfloat16)
    mpq.pack(tmp_path / "model", tmp_path / "out", plan(tmp_path / "model"), quantizer="rtn")
    return tmp_path / "out", PackedCheckpoint.open(tmp_path / "out")


def call(example, tmp_path, path, operation, module, data, dtype, *options):
    """Output file of the example, as elements."""
    (tmp_path / "in").write_bytes(data)
    assert run(example, path, operation, module, tmp_path / "in", tmp_path / "y", *options) == ""
    return torch.frombuffer(bytearray((tmp_path / "y").read_bytes()), dtype=dtype)


def raw(*tensors):
    return b"".join(bytes(t.contiguous().view(-1).view(torch.uint8).numpy()) for t in tensors)


def test_every_linear_of_a_model(example, tmp_path):
    path, checkpoint = pack(tmp_path, "qwen2", mixed_plan)
    listed = run(example, path).splitlines()
    assert [line.split()[0] for line in listed] == list(checkpoint.modules)
    for name, module in checkpoint.modules.items():
        packed, layout, bias = checkpoint.weight(name), module.layout, checkpoint.bias(name)
        x = torch.randn(3, layout.in_features).bfloat16()
        for option, product in (((), torch.ops.mpq.linear), (("int8", "threads", "2"), torch.ops.mpq.linear_int8)):
            y = call(example, tmp_path, path, "linear", name, raw(x), torch.bfloat16, *option)
            wanted = product(x, *operands(packed), bias, *shape(packed))
            assert same_bits(y.view(3, -1), wanted), (name, option)
        dense = call(example, tmp_path, path, "dequantize", name, b"", torch.float32)
        assert same_bits(dense.view(wanted.shape[1], -1), torch.ops.mpq.dequantize(*operands(packed), *shape(packed),
                                                                                   torch.float32))  # fmt: skip


def test_experts_and_embeddings(example, tmp_path):
    path, checkpoint = pack(tmp_path, "mixtral", expert_plan)
    name, module = next((n, m) for n, m in checkpoint.modules.items() if m.experts)
    packed, x = checkpoint.weight(name), torch.randn(9, module.layout.in_features).bfloat16()
    offsets = torch.tensor([0, 4, 4, 9], dtype=torch.int32)
    y = call(example, tmp_path, path, "grouped_linear", name, raw(offsets, x), torch.bfloat16)
    wanted = torch.ops.mpq.grouped_linear(x, *operands(packed), None, offsets, *shape(packed))
    assert same_bits(y.view(9, -1), wanted)
    ids = torch.tensor([3, 0, 5])
    rows = call(example, tmp_path, path, "embedding", name, raw(ids), torch.bfloat16)
    wanted = torch.ops.mpq.embedding(ids, *operands(packed), *shape(packed), torch.bfloat16)
    assert same_bits(rows.view(3, -1), wanted)


def test_refusals_are_told(example, tmp_path):
    path, checkpoint = pack(tmp_path, "llama", mixed_plan)
    name = next(iter(checkpoint.modules))
    for arguments, text in (
        ((tmp_path / "nowhere",), "18: .*nowhere"),
        ((path, "linear", "nobody", EXAMPLE, tmp_path / "y"), "20: the model has nothing"),
        ((path, "linear", name, tmp_path / "nothing", tmp_path / "y"), "18: a file cannot be read"),
        ((path, "grouped_linear", name, EXAMPLE, tmp_path / "y"), "11: the experts"),
    ):
        done = subprocess.run([example, *arguments], capture_output=True, text=True)
        assert done.returncode == 1 and re.match(text, done.stderr), done.stderr
        assert not (tmp_path / "y").exists()


@pytest.mark.parametrize(
    "compiler,standard,language", [("gcc", "c99", "c"), ("gcc", "c11", "c"), ("g++", "c++17", "c++")]
)
def test_headers_alone(tmp_path, compiler, standard, language):
    source, flags = tmp_path / "header.txt", [f"-std={standard}", *STRICT, "-fsyntax-only", "-x", language]
    for name in HEADERS:
        source.write_text(f'#include "{name}"\n#include "{name}"\nint main(void) {{ return MPQ_OK; }}\n')
        assert run(compiler, *flags, *shown("--cflags"), source) == ""
        assert (capi.include_dir() / name).read_text() == (ROOT / "csrc/include" / name).read_text()


PROGRAM = "#include <mpq_cpu.h>\nint main(void) { return mpq_cpu_version() != MPQ_CPU_VERSION; }\n"


@pytest.mark.skipif(shutil.which("pkg-config") is None, reason="needs pkg-config")
def test_pkg_config(tmp_path):
    (tmp_path / "main.c").write_text(PROGRAM)
    environment = {"PKG_CONFIG_PATH": shown("--pkgconfig")[0], "PATH": "/usr/bin:/bin"}
    flags = run("pkg-config", "--cflags", "--libs", "mpq_cpu", env=environment).split()
    assert run("pkg-config", "--modversion", "mpq_cpu", env=environment).strip() == VERSION
    run("gcc", tmp_path / "main.c", "-o", tmp_path / "main", *flags)
    run(tmp_path / "main", env={"LD_LIBRARY_PATH": str(capi.library_dir())})


@pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake")
def test_cmake(tmp_path):
    (tmp_path / "main.c").write_text(PROGRAM)
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.16)\nproject(program C)\nfind_package(mpq 0.1 REQUIRED)\n"
        "add_executable(main main.c)\ntarget_link_libraries(main mpq::cpu)\n"
    )
    run("cmake", "-S", tmp_path, "-B", tmp_path / "build", f"-Dmpq_DIR={shown('--cmake')[0]}")
    run("cmake", "--build", tmp_path / "build")
    run(tmp_path / "build" / "main")


def symbols(path):
    """Exported name -> its version, without the versions themselves."""
    found = re.findall(r" [TDBRVW] (\w+)(?:@@(\w+))?$", run("nm", "-D", "--defined-only", path), re.M)
    return dict(found)


def test_symbols_have_versions_and_nothing_else_is_shown():
    declared = set()
    for name in ("mpq_cpu.h", "mpq_model.h"):
        text = (ROOT / "csrc/include" / name).read_text()
        declared |= set(re.findall(r"^MPQ_API [^(]*?(\w+)\(", text, re.M))
    declared.add("RegisterCustomOps")  # what ONNX Runtime looks for: csrc/capi/ort_ops.cpp
    assert symbols(capi.library()) == dict.fromkeys(declared, "MPQ_CPU_1")


def test_the_library_needs_neither_torch_nor_python():
    needed = set(re.findall(r"\(NEEDED\).*\[(.*?)\]", run("readelf", "-d", capi.library())))
    assert needed <= {"libstdc++.so.6", "libm.so.6", "libgcc_s.so.1", "libc.so.6", "ld-linux-x86-64.so.2"}
    assert re.search(r"soname: \[libmpq_cpu.so\]", run("readelf", "-d", capi.library()))


def test_no_path_of_the_build_machine_is_in_it():
    assert str(ROOT).encode() not in capi.library().read_bytes()


def test_a_missing_library_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(capi, "ROOT", tmp_path)
    with pytest.raises(mpq.UnsupportedError, match="libmpq_cuda.so is missing .* nvcc"):
        capi.library("cuda")
