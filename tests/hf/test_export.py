"""A packed model exported, and run by programs that know nothing of this package; compiled with `make test-export`."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mpq_kernels as mpq
from mpq_kernels.hf.export import compile_package, export_logits, operator_library
from tests.made.checkpoints import tiny_model

EXAMPLE = Path(__file__).parents[2] / "examples" / "aoti_host"
with_compiler = pytest.mark.skipif(
    os.environ.get("MPQ_TEST_EXPORT") != "1", reason="compiles for a minute: make test-export"
)


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A packed Qwen3 with fused groups, of one layer."""
    root = tmp_path_factory.mktemp("export")
    tiny_model("qwen3", root / "dense", sizes={"num_hidden_layers": 1})
    plan = mpq.Plan.uniform(root / "dense", bits=3, group_size=32, lm_head=8).model_dump(mode="json")
    plan["fuse"] = [
        {"name": "qkv_proj", "members": ["q_proj", "k_proj", "v_proj"]},
        {"name": "gate_up_proj", "members": ["gate_proj", "up_proj"]},
    ]
    mpq.pack(root / "dense", root / "packed", mpq.Plan.model_validate(plan), quantizer="rtn")
    return root / "packed"


def run_elsewhere(*words) -> str:
    """Output of a process that starts in another folder, so that the package is found only where it is installed."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*map(str, words)], env=environment, capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_one_program_for_any_batch_and_length(packed, tmp_path):
    model = mpq.load(packed)
    program = export_logits(model)
    products = [str(node.target) for node in program.graph.nodes if str(node.target).startswith("mpq")]
    assert products == ["mpq.linear.default"] * 5  # qkv, o, gate and up, down, head
    torch.export.save(program, tmp_path / "program.pt2")
    ids = torch.arange(3, 14)[None]
    for batch, length in ((1, 2), (3, 11), (2, 40)):
        ids = torch.randint(3, 160, (batch, length))
        mask = torch.ones_like(ids)
        mask[0, : length // 3] = 0
        with torch.no_grad():
            expected = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        assert torch.equal(program.module()(ids, mask), expected)
    with torch.no_grad():
        likely = model(ids, use_cache=False).logits[0].argmax(-1)
    lines = (" ".join(map(str, row.tolist())) for row in (ids[0], likely))
    (tmp_path / "expected.txt").write_text("\n".join(lines) + "\n")
    assert run_elsewhere(sys.executable, EXAMPLE / "run.py", operator_library(), tmp_path).startswith("exported ")


def test_backends_of_this_package_are_not_exported(packed):
    with pytest.raises(mpq.UnsupportedError, match="runs on the backend reference, which needs this package"):
        export_logits(mpq.load(packed, backend="reference"))


@with_compiler
def test_the_compiled_package(packed, tmp_path):
    model = mpq.load(packed)
    path = compile_package(export_logits(model), tmp_path / "model.pt2")
    run = torch._inductor.aoti_load_package(str(path))
    for shape in ((1, 5), (4, 23)):
        ids = torch.randint(3, 160, shape)
        with torch.no_grad():
            expected = model(ids, use_cache=False).logits
        # The products are the same; norms and softmax are summed in another order: tens of roundings of 2**-24.
        assert (run(ids, torch.ones_like(ids)) - expected).norm() <= 1e-5 * expected.norm()


@with_compiler
def test_the_example(packed, tmp_path):
    out = tmp_path / "out"
    library = run_elsewhere(sys.executable, EXAMPLE / "export.py", packed, out).splitlines()[-1]
    assert library == str(operator_library())
    lines = run_elsewhere(sys.executable, EXAMPLE / "run.py", library, out).splitlines()
    assert [line.split()[0] for line in lines] == ["exported", "compiled"]
    run_elsewhere(shutil.which("make"), "-C", EXAMPLE, f"PYTHON={sys.executable}", f"BUILD={tmp_path / 'build'}")
    host = run_elsewhere(tmp_path / "build" / "aoti_host", library, out / "model.pt2", out / "expected.txt")
    assert host.split() == lines[1].split()[1:]
