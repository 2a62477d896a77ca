"""Imports go downwards only, and importing the package asks nothing of the machine."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "mpq_kernels"

# Lowest first. A room may import from itself and from rooms of the rows above it in this list; not from others of its
# own row. A new file needs no line here, only a new room does.
LAYERS = (
    ("errors", "progress", "version"),
    ("format", "files", "capi"),
    ("quantize", "dense"),
    ("backends", "plan", "checkpoint"),
    ("nn", "calibrate", "jax", "onnx"),
    ("hf", "packer", "vllm_plugin"),
    ("evaluate", "imports", "exports"),
    ("allocate",),
    ("__init__",),
    ("cli",),
    ("__main__",),
)
LEVEL = {name: level for level, row in enumerate(LAYERS) for name in row}


def modules():
    return sorted(PACKAGE.rglob("*.py"))


def part(path: Path) -> str:
    """Row entry of a file: its first component below the package."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path):
    """First components of the package that a file imports at run time, with line numbers."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(node)
        for test in ast.walk(tree)
        if isinstance(test, ast.If) and "TYPE_CHECKING" in ast.unparse(test.test)
        for node in ast.walk(test)
    }
    depth = len(path.relative_to(PACKAGE).parts)
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.ImportFrom) and node.level == depth:
            names = [node.module] if node.module else [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "mpq_kernels":
            names = [node.module.partition(".")[2]] if "." in node.module else [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            yield name.split(".")[0], node.lineno


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_downwards(path):
    here = part(path)
    assert here in LEVEL, f"{here} has no row in LAYERS"
    for name, line in imported(path):
        if name in LEVEL and name != here:
            assert LEVEL[name] < LEVEL[here], f"{path.name}:{line} imports {name}, which is not below {here}"


def test_codes_and_kinds_need_only_the_standard_library():
    for file, own in (("codes.py", {"kinds"}), ("kinds.py", set())):
        tree = ast.parse((PACKAGE / "format" / file).read_text())
        names = {
            (node.module if isinstance(node, ast.ImportFrom) else node.names[0].name).split(".")[0]
            for node in ast.walk(tree)
            if isinstance(node, (ast.Import, ast.ImportFrom))
        }
        assert names - own <= set(sys.stdlib_module_names)


def run(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_import_loads_nothing_heavy():
    heavy = run("import sys, mpq_kernels; print(*(n for n in ('torch', 'transformers', 'triton') if n in sys.modules))")
    assert heavy.strip() == ""


def test_use_touches_no_device_and_needs_no_triton():
    out = run("""
import sys
sys.modules["triton"] = None  # any import of it fails
import torch
def refuse(*args, **kwargs): raise AssertionError("a device was asked for")
for name in ("init", "_lazy_init", "is_available", "device_count", "get_device_capability", "current_device"):
    setattr(torch.cuda, name, refuse)
import mpq_kernels
assert mpq_kernels.MixedLinear and mpq_kernels.load and mpq_kernels.pack and mpq_kernels.Plan
print("used")
""")
    assert out.strip() == "used"


@pytest.mark.parametrize(
    "order",
    ["import mpq_kernels, transformers", "import transformers.quantizers, mpq_kernels", "import mpq_kernels.hf"],
)
def test_any_order_of_imports_registers_with_transformers(order):
    out = run(
        order
        + """
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, AUTO_QUANTIZATION_CONFIG_MAPPING
print("mpq" in AUTO_QUANTIZER_MAPPING and "mpq" in AUTO_QUANTIZATION_CONFIG_MAPPING)
"""
    )
    assert out.strip() == "True"


def test_every_public_name_exists():
    import mpq_kernels

    assert all(getattr(mpq_kernels, name) is not None for name in mpq_kernels.__all__)
    assert set(dir(mpq_kernels)) == set(mpq_kernels.__all__)
    with pytest.raises(AttributeError, match="no attribute 'laod'"):
        _ = mpq_kernels.laod
