"""Registers the quantization method with transformers when, and only when, a program imports transformers' quantizers.

transformers has no entry points for quantizers: a method is known once some code has registered it. Importing
transformers here for that would make `import mpq_kernels` take seconds; instead the moment is waited for, with a finder
that lets the normal import go on and then imports `hf`, which registers.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

TARGET = "transformers.quantizers.auto"  # where transformers keeps its tables of methods


def register_on_import() -> None:
    """Register now if transformers' tables are loaded, else as soon as they are; harmless when repeated."""
    if TARGET in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register() -> None:
    # Importing it registers; it may be on its way already, when it is what imports transformers.
    from . import quantizer  # noqa: F401


class _Finder(importlib.abc.MetaPathFinder):
    """Finds TARGET like everybody else, but with a loader that registers afterwards; steps aside for all else."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The normal spec of TARGET with a loader that registers; None for every other module."""
        if fullname != TARGET:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, inner: importlib.abc.Loader) -> None:
        self.inner = inner

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.inner.exec_module(module)
        _register()
