"""`python -m mpq_kernels.capi --cflags --libs`: what a compiler, pkg-config or CMake is told."""

from __future__ import annotations

import argparse

from . import cmake_dir, include_dir, library_dir, pkgconfig_dir

PRINTS = {
    "include": ("folder of the headers", lambda: include_dir()),
    "lib": ("folder of the libraries", lambda: library_dir()),
    "pkgconfig": ("for PKG_CONFIG_PATH", lambda: pkgconfig_dir()),
    "cmake": ("for mpq_DIR", lambda: cmake_dir()),
    "cflags": ("flags that compile", lambda: f"-I{include_dir()}"),
    "libs": (
        "flags that link with the library of the CPU, and find it when the program starts",
        lambda: f"-L{library_dir()} -lmpq_cpu -Wl,-rpath,{library_dir()}",
    ),
}


def main() -> None:
    """Print what was asked for, in one line."""
    parser = argparse.ArgumentParser(prog="python -m mpq_kernels.capi", description=__doc__)
    for name, (text, _) in PRINTS.items():
        parser.add_argument(f"--{name}", action="store_true", help=text)
    wanted = parser.parse_args()
    chosen = [str(show()) for name, (_, show) in PRINTS.items() if getattr(wanted, name)]
    if not chosen:
        parser.error("say what to print")
    print(*chosen)


if __name__ == "__main__":
    main()
