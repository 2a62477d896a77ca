"""Where command-line tests run: tiny models, dense and packed, and a runner. conftest.py offers the fixtures."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import mpq_kernels as mpq
from mpq_kernels.cli import main
from tests.made.checkpoints import tiny_model

EXAMPLES = Path(__file__).parents[2] / "examples"
HEAD = {"vocab_size": 2048, "hidden_size": 128, "intermediate_size": 192}
FUSED = {
    "version": 1,
    "default": {"bits": 3},
    "modules": {
        "lm_head": {"bits": 16},
        "re:.*v_proj": {"bits": 5, "symmetric": True},
        "re:.*down_proj": {
            "bits": 4,
            "segments": [{"cols": [0, 64], "bits": 8}, {"cols": [64, None], "bits": 2, "group_size": 32}],
        },
    },
    "fuse": [{"name": "qkv_proj", "members": ["q_proj", "k_proj", "v_proj"]}],
}


class Runner:
    """Runs `mpq` in a directory and checks what holds for every command: exit code, no traceback, no colours."""

    def __init__(self, capsys, *first: str) -> None:
        self.capsys, self.first = capsys, first
        capsys.readouterr()

    def __call__(self, *words, code=0) -> SimpleNamespace:
        """Exit code must be `code`; gives out, err and json()."""
        got = main([*self.first, *(str(word) for word in words)])
        out, err = self.capsys.readouterr()
        assert got == code, err
        assert "Traceback" not in err
        assert "\x1b[" not in out  # not a terminal: no colours
        return SimpleNamespace(out=out, err=err, json=lambda: json.loads(out))

    def misuse(self, *words) -> str:
        """The message of wrong usage, exit code 2, without the box that it stands in."""
        done = self(*words, code=2)
        assert done.out == ""
        return " ".join(done.err.replace("\u2502", " ").split())


def dense_with_tokenizer(path, tied):
    """A tiny model whose vocabulary is that of a real tokenizer, which stands beside it."""
    tiny_model("llama", path, tied=tied, dtype=torch.bfloat16, sizes=HEAD)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EXAMPLES / "gutenberg-6m" / name, path)


@pytest.fixture(scope="module")
def space(tmp_path_factory):
    """A tiny dense model with a real tokenizer, packed in 4 bits and under a plan with segments and a fused group."""
    root = tmp_path_factory.mktemp("cli")
    dense_with_tokenizer(root / "dense", tied=False)
    (root / "plan.json").write_text(json.dumps(FUSED))
    (root / "text.txt").write_text(
        (EXAMPLES / "gutenberg_val.txt").read_text(encoding="utf-8")[:6000], encoding="utf-8"
    )
    pack = ["--quantizer", "rtn", "--quiet"]
    assert main(["pack", str(root / "dense"), str(root / "packed"), "--bits", "4", *pack]) == 0
    assert main(["pack", str(root / "dense"), str(root / "mixed"), "--plan", str(root / "plan.json"), *pack]) == 0
    return root


@pytest.fixture
def run(space, capsys, monkeypatch):
    """Run a command with paths relative to the fixture's directory; gives stdout and stderr."""
    monkeypatch.chdir(space)
    return Runner(capsys)


def broken_copy(space, tmp_path, source, change):
    """A copy of a directory with changed tensors, as another program would write it: without a manifest."""
    copy = tmp_path / source
    shutil.copytree(space / source, copy)
    (copy / "mpq_manifest.json").unlink(missing_ok=True)
    file = copy / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file, {"format": "pt"})
    return copy


def bench_models(root):
    """`root`, with a tiny dense model, the same packed, its plan, and its config alone."""
    tiny_model("llama", root / "dense", tied=False, dtype=torch.bfloat16)
    plan = mpq.Plan.uniform(root / "dense", bits=3, group_size=-1)
    plan.to_file(root / "plan.json")
    mpq.pack(root / "dense", root / "packed", plan, quantizer="rtn")
    (root / "bare").mkdir()
    shutil.copy(root / "dense" / "config.json", root / "bare")
    return root


@pytest.fixture(autouse=True)
def one_thread():
    """Layers here are so small that threads would mostly wait for each other, on a busy machine for long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
