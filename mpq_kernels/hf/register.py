"""Registers with transformers and with peft when, and only when, a program imports them.

Neither has entry points: a quantization method, or a class that adapts models, is known once some code has registered
it. Importing transformers here for that would make `import mpq_kernels` take seconds; instead the moment is waited for,
with a finder that lets the normal import go on and then imports the file of this room that registers.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType

# What is waited for -> the file here that registers with it when it is imported.
TARGETS = {
    "transformers.quantizers.auto": "quantizer",  # where transformers keeps its tables of methods
    "peft": "adapters",
}
OPTIONAL = {"peft"}


def register_on_import() -> None:
    """Register now with what is loaded, and with the rest as soon as it is; harmless when repeated."""
    for target in TARGETS:
        if target in sys.modules:
            _register(target)
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register(target: str) -> None:
    try:
        module = importlib.import_module(f".{TARGETS[target]}", __package__)
    except ImportError as error:
        if target not in OPTIONAL:
            raise
        # Of a version that we do not know: that program may want something else of it.
        warnings.warn(f"{target} will not take packed layers: {error}", stacklevel=2)
        return
    # Importing it registers, but may be under way already, when it is what imports the target; and a target that was
    # loaded a second time must be told again.
    getattr(module, "register", lambda: None)()


class _Finder(importlib.abc.MetaPathFinder):
    """Finds a target like everybody else, but with a loader that registers afterwards; steps aside for all else.

    It stays where it is: programs also look for a module without loading it, to know whether it is installed.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The normal spec of a target with a loader that registers; None for every other module."""
        if fullname not in TARGETS:
            return None
        others = (finder for finder in sys.meta_path if not isinstance(finder, _Finder))
        found = (finder.find_spec(fullname, path, target) for finder in others if hasattr(finder, "find_spec"))
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, inner: importlib.abc.Loader) -> None:
        self.inner = inner

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # The module's own loader from here on: programs ask it for sources and data files.
        module.__loader__ = self.inner
        if module.__spec__ is not None:
            module.__spec__.loader = self.inner
        self.inner.exec_module(module)
        _register(module.__name__)
