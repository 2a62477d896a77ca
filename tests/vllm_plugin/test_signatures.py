"""What the plugin takes from vLLM is there, with the parameters that it is called with; read from sources, not run.

    python -m pytest tests/vllm_plugin/test_signatures.py                        the vLLM that is installed, if any
    MPQ_TEST_VLLM=DIR python -m pytest tests/vllm_plugin/test_signatures.py      an unpacked wheel: DIR/vllm

Classes that are subclassed, methods that are overridden, and everything that is imported.
"""

import ast
import importlib.util
import os
from functools import cache
from pathlib import Path

import pytest

PLUGIN = Path(__file__).parents[2] / "mpq_kernels" / "vllm_plugin"


def vllm_root() -> Path | None:
    """The folder that holds the package vllm."""
    if given := os.environ.get("MPQ_TEST_VLLM"):
        return Path(given)
    spec = importlib.util.find_spec("vllm")
    return None if spec is None or spec.origin is None else Path(spec.origin).parents[1]


ROOT = vllm_root()
if ROOT is None:
    pytest.skip("no vLLM here; `make test-vllm`, or MPQ_TEST_VLLM names an unpacked wheel", allow_module_level=True)


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def module_file(name: str) -> Path:
    path = ROOT.joinpath(*name.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def definition(module: str, name: str) -> ast.AST | None:
    """Where a name of a module is defined, through what it imports from others."""
    file = module_file(module)
    assert file.exists(), f"{module} is not in this vLLM"
    found = None
    for node in ast.walk(parsed(file)):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name == name and found is None:
            found = node
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(target, ast.Name) and target.id == name for target in targets):
                found = found or node
        elif isinstance(node, ast.ImportFrom) and any((a.asname or a.name) == name for a in node.names):
            package = module.split(".") if file.name == "__init__.py" else module.split(".")[:-1]
            lead = package[: len(package) - node.level + 1] if node.level else []
            target = ".".join([*lead, *([node.module] if node.module else [])])
            found = found or definition(target, next(a.name for a in node.names if (a.asname or a.name) == name))
    return found


def imports(file: Path):
    """(module, name) of everything that a file of the plugin imports from vLLM."""
    for node in ast.walk(parsed(file)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vllm"):
            yield from ((node.module, alias.name) for alias in node.names)


TAKEN = sorted({taken for file in PLUGIN.glob("*.py") for taken in imports(file)})


def bases(node: ast.ClassDef, known: dict[str, str]):
    """The class and those above it, of vLLM's, by name in the module where each is found."""
    yield node
    for base in node.bases:
        if isinstance(base, ast.Name) and known.get(base.id, "").startswith("vllm"):
            above = definition(known[base.id], base.id)
            if isinstance(above, ast.ClassDef):
                yield from bases(above, {**known, **_scope(known[base.id])})


@cache
def _names(module: str) -> tuple[tuple[str, str], ...]:
    out = {}
    for node in ast.walk(parsed(module_file(module))):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            out |= {alias.asname or alias.name: node.module for alias in node.names}
        elif isinstance(node, ast.ClassDef):
            out[node.name] = module
    return tuple(out.items())


def _scope(module: str) -> dict[str, str]:
    return dict(_names(module))


def methods():
    """(our class, its method, vLLM's method of the same name) of all classes with a base of vLLM's."""
    for file in sorted(PLUGIN.glob("*.py")):
        known = {name: module for module, name in imports(file)}
        for ours in (node for node in parsed(file).body if isinstance(node, ast.ClassDef)):
            theirs = [above for above in bases(ours, known) if above is not ours]
            for method in (node for node in ours.body if isinstance(node, ast.FunctionDef)):
                for above in theirs:
                    same = [n for n in above.body if isinstance(n, ast.FunctionDef) and n.name == method.name]
                    if same and method.name != "__init__":
                        yield pytest.param(method, same[0], id=f"{ours.name}.{method.name}")
                        break


def parameters(function: ast.FunctionDef) -> list[str]:
    """Names without self, cls; those of * and ** too."""
    args = function.args
    names = [a.arg for a in (*args.posonlyargs, *args.args) if a.arg not in ("self", "cls")]
    names += [a.arg for a in args.kwonlyargs]
    return names + ["*" for _ in [args.vararg] if args.vararg] + ["**" for _ in [args.kwarg] if args.kwarg]


@pytest.mark.parametrize(("module", "name"), TAKEN)
def test_what_is_imported_exists(module, name):
    assert definition(module, name) is not None, f"{module} has no {name}"


OVERRIDDEN = list(methods())


@pytest.mark.parametrize(("ours", "theirs"), OVERRIDDEN)
def test_overridden_methods_take_what_they_are_given(ours, theirs):
    mine, given = parameters(ours), parameters(theirs)
    if "*" in given:  # an abstract method of any arguments: the callers are what counts
        assert "self" not in mine
        return
    assert [name for name in mine if name != "**"] == [name for name in given if name != "**"]


def test_methods_were_compared():
    names = {param.id for param in OVERRIDDEN}
    assert {
        "MPQConfig.get_quant_method", "MPQConfig.apply_vllm_mapper", "MPQConfig.get_checkpoint_weight_mapper",
        "MPQLinearMethod.create_weights", "MPQLinearMethod.apply", "MPQVocabMethod.embedding",
        "MPQVocabMethod.tie_weights", "MPQExpertsMethod.apply", "MPQExpertsMethod.create_weights",
    } <= names  # fmt: skip


# Attributes of vLLM's layers that the methods read, by the file that gives them.
READ = {
    "linear": ("tp_rank", "num_kv_head_replicas", "total_num_kv_heads", "total_num_heads", "head_size", "output_sizes"),
    "vocab_parallel_embedding": ("tp_rank", "org_vocab_size", "num_added_embeddings", "shard_indices"),
    "fused_moe.routed_experts": (
        "moe_config",
        "_expert_map",
        "activation",
        "apply_router_weight_on_input",
        "layer_name",
    ),
    "fused_moe.config": ("num_experts", "use_ep", "tp_size", "tp_rank"),
}


@pytest.mark.parametrize("part", READ)
def test_attributes_that_are_read_exist(part):
    tree = parsed(module_file(f"vllm.model_executor.layers.{part}"))
    there = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    there |= {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    there |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    there |= {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    assert set(READ[part]) <= there
