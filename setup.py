"""Builds the compiled parts with ninja. Everything else about the package stands in pyproject.toml.

    mpq_kernels/_ops.so     torch operators over the CPU kernels. Only the LibTorch stable ABI, so one binary serves
                            torch 2.11 and later; no Python in it; torch.ops.load_library loads it.
    mpq_kernels/_cuda.so    CUDA kernels with the C interface of csrc/include/mpq.h, and their torch operators. Built
                            where nvcc is found (12.4 or later); a GPU is not needed to build it.
    mpq_kernels/_host.*.so  pybind11 module: packing, unpacking, layout identity.
    mpq_kernels/capi/       for C programs: include/, lib/libmpq_cpu.so and, with nvcc, lib/libmpq_cuda.so, which know
                            no torch and no Python, and files for pkg-config and CMake. Their objects are those of the
                            operators.

All include csrc/generated/layout.h, which is written here from mpq_kernels/format/codes.py and kinds.py. Environment:

    MPQ_CUDA_ARCHS   architectures, ";" between them, "+PTX" for code that later ones compile when they load it;
                     "80;90+PTX" unless told: 8.6 and 8.9 run the code of 8.0, and 10.0 and later compile that of 9.0
                     once, when they first load it. "none" builds no CUDA part.
    CUDA_HOME, CXX   toolkit and host compiler, where they are not on the PATH.
"""

import importlib
import os
import platform
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
OPS, CUDA, HOST = "mpq_kernels._ops", "mpq_kernels._cuda", "mpq_kernels._host"
CPU_LIBRARY, CUDA_LIBRARY = "mpq_kernels.capi.lib.libmpq_cpu", "mpq_kernels.capi.lib.libmpq_cuda"
HEADERS = ("mpq.h", "mpq_cpu.h", "mpq_model.h")  # of csrc/include

# No path of the build machine may reach an error message or a binary.
PREFIX_MAP = f"-ffile-prefix-map={ROOT}/="
CXX_FLAGS = "-std=c++20 -O3 -fPIC -fvisibility=hidden -fvisibility-inlines-hidden -ffp-contract=off -Wall -Wextra"
# A file of csrc/cpu/instances names its instruction set itself; it is compiled for x86-64 only, and chosen at run time.
ISA_FLAGS = re.compile(r"^// x86-64 flags: (.*)$", re.MULTILINE)
CUDA_ARCHS = "80;90+PTX"
# The instructions that kernels are written in: those of the newest of these that an architecture has. Each is compiled
# once, whatever the number of architectures that machine code is made for.
CUDA_VIRTUAL = (80, 90)
CUDA_OLDEST = (12, 4)
CUDA_COMPRESSES = (12, 8)  # from here on nvcc makes machine code a seventh of its size
# Symbols of torch are found when the library is loaded. The CUDA runtime is part of it, so that torch may have another
# one, or be built without; it needs a driver of its major version, and mpq_kernels/backends/cuda.py tells if not.
NVCC_FLAGS = "-std=c++20 -O3 -Xcompiler -fPIC,-fvisibility=hidden,-Wall"
X86 = platform.machine().lower() in ("x86_64", "amd64")


def load_formats():
    """mpq_kernels/format/codes.py as a module, without importing the package (which needs the compiled parts)."""
    package = types.ModuleType("mpq_formats")  # so that the file finds kinds.py beside it
    package.__path__ = [str(ROOT / "mpq_kernels" / "format")]
    sys.modules[package.__name__] = package
    return importlib.import_module("mpq_formats.codes")


def layout_header(formats) -> str:
    """C++ form of the tables of codes.py and kinds.py."""
    rows = [formats.FORMATS.get(bits) for bits in range(9)]
    planes = [list(r.planes) + [0] * (3 - len(r.planes)) if r else [0, 0, 0] for r in rows]
    position = [formats.row_position(n) for n in range(formats.TILE_N)]

    def braces(values):
        return "{" + ", ".join(braces(v) if isinstance(v, list) else str(v) for v in values) + "}"

    out = [
        "// Written by setup.py from mpq_kernels/format/codes.py and kinds.py. Do not edit.",
        "#pragma once",
        "#include <cstdint>",
        "namespace mpq {",
        f'constexpr char kLayoutId[] = "{formats.LAYOUT_ID}";',
        f"constexpr int kFormatVersion = {formats.FORMAT_VERSION};",
        f"constexpr int kTileN = {formats.TILE_N}, kTileK = {formats.TILE_K};",
        f"constexpr int kPlaneCount[9] = {braces([len(r.planes) if r else 0 for r in rows])};",
        f"constexpr int kPlaneWidth[9][3] = {braces(planes)};",
    ]
    kinds = formats.KINDS.values()
    for index, kind in enumerate(kinds):
        out.append(f"constexpr int kZero{kind.name.capitalize()} = {index};  // {kind.says}")
    out.append(f"constexpr int kZeroKinds = {len(kinds)};")
    out.append("// The zero points of kinds that store none, for each width.")
    fixed = [[f"{k.zero(r.bits, 0.0)}f" if r else "0.0f" for r in rows] for k in kinds]
    out.append(f"constexpr float kFixedZero[kZeroKinds][9] = {braces(fixed)};")
    out.append("// Bytes of what `zeros` holds for each row and group, for scales of so many bytes. Not for devices.")
    stored = [{None: "0", "uint8": "1", "scales": "-1"}[k.stored] for k in kinds]
    out.append(f"constexpr int kZeroStored[kZeroKinds] = {braces(stored)};  // -1: the dtype of the scales")
    out.append("constexpr int64_t zero_bytes(int kind, int64_t scale_bytes) {")
    out.append("  return kZeroStored[kind] < 0 ? scale_bytes : kZeroStored[kind];")
    out.append("}")
    out.append("constexpr bool stores_zeros(int kind) { return kZeroStored[kind] != 0; }")
    out.append("constexpr bool is_zero_kind(int64_t kind) { return 0 <= kind && kind < kZeroKinds; }")
    for name, values in (("kZeroNames", tuple(formats.KINDS)), ("kScaleDtypeNames", formats.SCALE_DTYPES)):
        quoted = braces([f'"{value}"' for value in values])
        out.append(f"constexpr const char* {name}[] = {quoted};")
    for name, dtype in (("F32", "float32"), ("F16", "float16"), ("BF16", "bfloat16")):
        out.append(f"constexpr int kDtype{name} = {formats.SCALE_DTYPES.index(dtype)};")
    out.append("// Places of the integers that operators take for each segment.")
    places = ["kSegment" + "".join(map(str.capitalize, name.split("_"))) for name in formats.SEGMENT_INTS]
    out.append(f"enum SegmentInt {braces([*places, 'kSegmentInts'])};")
    out.append("// Place of row n of a supertile in its block of scales.")
    out.append(f"constexpr uint8_t kRowPosition[{formats.TILE_N}] = {braces(position)};")
    out.append("// kSource<width>[word * (32 / width) + i] = n * 64 + k of the code in the i-th field of the word.")
    for width in formats.PLANE_WIDTHS:
        per_word = formats.WORD_BITS // width
        source = [0] * formats.TILE_CODES
        for n in range(formats.TILE_N):
            for k in range(formats.TILE_K):
                index = formats.word_index(width, n, k) * per_word + formats.bit_index(width, n, k) // width
                source[index] = n * formats.TILE_K + k
        out.append(f"constexpr uint16_t kSource{width}[{formats.TILE_CODES}] = {braces(source)};")
    return "\n".join([*out, "}  // namespace mpq", ""])


def isa_flags(source: Path) -> str:
    """Compiler flags that the text of a source asks for; "" where it asks for none."""
    found = ISA_FLAGS.search(source.read_text())
    return found[1] if found else ""


def write_if_changed(path: Path, text: str) -> None:
    """Keep the time stamp, and so ninja's idea of what is stale, when nothing changed."""
    if not path.exists() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def torch_flags() -> tuple[str, str]:
    """(compile, link) flags for an extension on the stable ABI of torch 2.11."""
    try:
        from torch.utils.cpp_extension import include_paths, library_paths
    except ImportError:
        raise SystemExit(
            "mpq_kernels: building the operators needs the headers of torch 2.11 or later; install torch first and "
            "build with --no-build-isolation, or let pip take build requirements from pyproject.toml"
        ) from None
    includes = " ".join(f"-isystem {path}" for path in include_paths())
    # What is called must exist in 2.11; TORCH_STABLE_ONLY turns any use of an unstable header into an error.
    defines = "-DTORCH_TARGET_VERSION=0x020b000000000000 -DTORCH_STABLE_ONLY"
    links = " ".join(f"-L{path}" for path in library_paths())
    return f"{defines} {includes}", f"{links} -ltorch -ltorch_cpu"


def find_nvcc() -> Path | None:
    """nvcc of CUDA_HOME or of the PATH; None, with a line of text, where it is absent, too old or not wanted."""
    if os.environ.get("MPQ_CUDA_ARCHS") == "none":
        return None
    home = os.environ.get("CUDA_HOME")
    found = shutil.which(str(Path(home) / "bin" / "nvcc")) if home else shutil.which("nvcc")
    if found is None:
        print(f"mpq_kernels: no nvcc {'in CUDA_HOME=' + home if home else 'on the PATH'}: CUDA kernels are not built")
        return None
    version = nvcc_version(found)
    if version < CUDA_OLDEST:
        print(f"mpq_kernels: nvcc {version[0]}.{version[1]} is older than 12.4: CUDA kernels are not built")
        return None
    warn_of_newer_runtime(version)
    return Path(found)


def nvcc_version(nvcc: Path | str) -> tuple[int, ...]:
    """Major and minor version of CUDA that an nvcc is of."""
    text = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True, check=True).stdout
    return tuple(map(int, re.search(r"release (\d+)\.(\d+)", text).groups()))


def warn_of_newer_runtime(version: tuple[int, ...]) -> None:
    """The runtime that is linked in needs a driver of nvcc's major version; that of torch may need an older one."""
    try:
        import torch
    except ImportError:
        return  # torch_flags() says what to do
    wanted = torch.version.cuda
    if wanted is not None and version[0] > int(wanted.partition(".")[0]):
        print(
            f"mpq_kernels: nvcc is of CUDA {version[0]}.{version[1]}, torch of CUDA {wanted}: the kernels "
            f"need a driver for CUDA {version[0]}. For older drivers set CUDA_HOME to a toolkit of CUDA {wanted}"
        )


def cuda_root(nvcc: Path) -> Path:
    """The toolkit that nvcc belongs to; it may be a script that calls the real one."""
    text = subprocess.run([str(nvcc), "--dryrun", "none.cu"], capture_output=True, text=True).stderr
    return Path(re.search(r"TOP=(.*)", text).group(1).strip()).resolve()


def static_runtime(root: Path) -> Path:
    """Folder of the static CUDA runtime: looked for before anything is compiled for minutes."""
    folders = [root / "targets/x86_64-linux/lib", root / "lib64", root / "lib"]
    for folder in folders:
        if (folder / "libcudart_static.a").is_file():
            return folder
    raise SystemExit(
        f"mpq_kernels: no libcudart_static.a in {', '.join(map(str, folders))}: install the development files of the "
        "CUDA runtime (cuda-cudart-dev), set CUDA_HOME to a whole toolkit, or build without CUDA (MPQ_CUDA_ARCHS=none)"
    )


def cuda_flags(nvcc: Path) -> tuple[str, str, str]:
    """(flags of nvcc, compile, link) for the kernels of CUDA, without what links with torch."""
    codes: dict[str, list[str]] = {}
    for arch in os.environ.get("MPQ_CUDA_ARCHS", CUDA_ARCHS).split(";"):
        number = arch.removesuffix("+PTX")
        if not re.fullmatch(r"\d{2,3}[af]?", number) or int(number.rstrip("af")) < CUDA_VIRTUAL[0]:
            raise SystemExit(f'MPQ_CUDA_ARCHS: {arch!r} is not an architecture such as "80", "90a" or "100+PTX"')
        virtual = number if number[-1] in "af" else str(max(v for v in CUDA_VIRTUAL if v <= int(number)))
        codes.setdefault(virtual, []).append(f"sm_{number}")
        if arch != number:
            codes[virtual].append(f"compute_{virtual}")
    gencode = " ".join(f"-gencode 'arch=compute_{v},code=[{','.join(c)}]'" for v, c in codes.items())
    if nvcc_version(nvcc) >= CUDA_COMPRESSES:
        gencode += " --compress-mode=size"
    root = cuda_root(nvcc)
    includes = next(p for p in (root / "targets/x86_64-linux/include", root / "include") if p.is_dir())
    return gencode, f"-isystem {includes}", f"-L{static_runtime(root)} -lcudart_static -lpthread -ldl -lrt"


def host_flags() -> tuple[str, str]:
    """(compile, link) flags for the pybind11 module."""
    import sysconfig

    import pybind11

    return f"-isystem {pybind11.get_include()} -isystem {sysconfig.get_path('include')}", "-lpthread"


def package_version() -> str:
    return re.search(r'^VERSION = "(.+)"', (ROOT / "mpq_kernels/version.py").read_text(), re.MULTILINE)[1]


def write_capi(folder: Path) -> None:
    """Headers and files for pkg-config and CMake, which find the libraries from where they lie themselves."""
    for name in HEADERS:
        write_if_changed(folder / "include" / name, (ROOT / "csrc/include" / name).read_text())
    for source in sorted((ROOT / "csrc/capi/install").iterdir()):
        place = folder / "lib" / ("pkgconfig" if source.suffix == ".pc" else "cmake/mpq")
        write_if_changed(place / source.name, source.read_text().replace("@VERSION@", package_version()))


class NinjaBuild(build_ext):
    """Compiles with ninja: setuptools has one list of flags for all sources, and the kernels need one each."""

    def run(self):
        write_if_changed(ROOT / "csrc/generated/layout.h", layout_header(load_formats()))
        capi = (ROOT if self.inplace else Path(self.build_lib).resolve()) / "mpq_kernels/capi"
        write_capi(capi)  # first, because it makes the folder that the libraries are copied to
        super().run()

    def get_ext_filename(self, fullname):
        # The operator libraries have no Python in them, hence no interpreter tag.
        name = super().get_ext_filename(fullname)
        short = fullname.rpartition(".")[2]
        return name if HOST.endswith(f".{short}") else str(Path(name).with_name(f"{short}.so"))

    def build_extension(self, ext):
        nvcc, nvcc_flags = NVCC, ""
        compile_flags, link_flags = host_flags() if ext.name == HOST else ("", "-lpthread")
        if ext.name in (CUDA, CUDA_LIBRARY):
            nvcc_flags, compile_flags, link_flags = cuda_flags(nvcc)
        if ext.name in (OPS, CUDA):
            torch_compile, torch_link = torch_flags()
            compile_flags, link_flags = f"{torch_compile} {compile_flags}", f"{torch_link} {link_flags}"
        if ext.name in SYMBOLS:
            # No number in the soname: a wheel has no links. The symbols have versions instead.
            soname = f"{ext.name.rpartition('.')[2]}.so"
            link_flags += f" -Wl,-soname,{soname} -Wl,--version-script={ROOT / SYMBOLS[ext.name]}"
            # Its threads may outlive those who loaded it: ONNX Runtime unloads libraries of operators.
            link_flags += " -Wl,-z,nodelete"
        build = Path(self.build_temp).resolve() / ext.name
        build.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        lines = [
            f"cxx = {os.environ.get('CXX', 'g++')}",
            "rule cc",
            "  command = $cxx -MMD -MF $out.d $flags -c $in -o $out",
            "  description = compile $in",
            "  depfile = $out.d",
            "  deps = gcc",
            f"nvcc = {nvcc}",
            "rule cu",
            "  command = $nvcc -MD -MF $out.d $flags -c $in -o $out",
            "  description = compile $in",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            # Written beside and renamed, so that a process that has the old library mapped keeps it.
            f"  command = $cxx -shared -o $out.tmp $in {link_flags} && mv -f $out.tmp $out",
            "  description = link $out",
        ]
        objects = [str(Path(self.build_temp).resolve() / path) for path in ext.extra_objects]
        for source in ext.sources:
            objects.append(str(build / (Path(source).stem + ".o")))
            flags = f"{CXX_FLAGS} {PREFIX_MAP} {compile_flags} -I{ROOT / 'csrc'} {isa_flags(ROOT / source)}"
            rule = "cc"
            if source.endswith(".cu"):
                rule = "cu"
                host = f"-ccbin {os.environ['CXX']}" if "CXX" in os.environ else ""
                flags = f"{NVCC_FLAGS} -Xcompiler {PREFIX_MAP} {host} {nvcc_flags} -I{ROOT / 'csrc'}"
            lines += [f"build {objects[-1]}: {rule} {ROOT / source}", f"  flags = {flags}"]
        lines += [f"build {target}: link {' '.join(objects)}", ""]
        write_if_changed(build / "build.ninja", "\n".join(lines))
        subprocess.run([sys.executable, "-m", "ninja", "-C", str(build)], check=True)


def sources_of(folder: str, *suffixes: str) -> list[str]:
    """Files of a folder and below it, from the root of the repository; without those of other processors."""
    found = sorted(path for path in (ROOT / folder).rglob("*") if path.suffix in suffixes)
    return [str(path.relative_to(ROOT)) for path in found if X86 or not isa_flags(path)]


def objects_of(extension: str, sources: list[str]) -> list[str]:
    """The objects that another extension compiles, from the folder of temporary files."""
    return [f"{extension}/{Path(source).stem}.o" for source in sources]


SYMBOLS = {CPU_LIBRARY: "csrc/capi/libmpq_cpu.map", CUDA_LIBRARY: "csrc/capi/libmpq_cuda.map"}
CUDA_OPS = "csrc/torch/cuda_ops.cpp"
cpu_sources = sources_of("csrc/cpu", ".cpp")
cuda_sources = sources_of("csrc/cuda", ".cu", ".cpp")
ops_sources = [source for source in sources_of("csrc/torch", ".cpp") if source != CUDA_OPS]
NVCC = find_nvcc()
extensions = [
    Extension(CPU_LIBRARY, cpu_sources + sources_of("csrc/capi", ".cpp")),
    Extension(OPS, ops_sources, extra_objects=objects_of(CPU_LIBRARY, cpu_sources)),
    Extension(HOST, ["csrc/host/host.cpp"]),
]
if NVCC:
    extensions += [
        Extension(CUDA, [*cuda_sources, CUDA_OPS]),
        Extension(CUDA_LIBRARY, [], extra_objects=objects_of(CUDA, cuda_sources)),
    ]

setup(ext_modules=extensions, cmdclass={"build_ext": NinjaBuild})
