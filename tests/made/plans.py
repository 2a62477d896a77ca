"""Two plans for one tiny model, its config alone, and a runner of `mpq plan`: fixtures of cli/plan/conftest.py."""

import json
import shutil

import pytest

from tests.made.checkpoints import tiny_model
from tests.made.commands import Runner

A = {"version": 1, "default": {"bits": 4, "group_size": 32}, "modules": {"lm_head": {"bits": 16}}}
B = {
    "version": 1,
    "default": {"bits": 4, "group_size": 32},
    "modules": {
        "re:.*v_proj": {"bits": 6, "group_size": 32},
        "model.layers.0.self_attn.o_proj": {"bits": 4, "group_size": 32, "symmetric": True},
        "model.layers.1.mlp.up_proj": {"bits": 16},
        "model.layers.1.mlp.down_proj": {
            "bits": 4,
            "segments": [{"cols": [0, 64], "bits": 8}, {"cols": [64, None], "bits": 3, "group_size": 64}],
        },
        "lm_head": {"bits": 8, "group_size": -1},
    },
    "fuse": [{"name": "qk_proj", "members": ["q_proj", "k_proj"]}],
}
WIDTHS = [["4", "4", "6", "4", "4", "4", "4"], ["4", "4", "6", "4", "4", "16", "4.7"]]
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def plan_space(tmp_path_factory):
    """A tiny dense model, its config alone, and two plans."""
    root = tmp_path_factory.mktemp("plans")
    tiny_model("mistral", root / "dense", tied=False, sizes={"intermediate_size": 192})
    (root / "bare").mkdir()
    shutil.copy(root / "dense" / "config.json", root / "bare")
    (root / "a.json").write_text(json.dumps(A))
    (root / "b.json").write_text(json.dumps(B))
    return root


@pytest.fixture
def run_plan(plan_space, capsys, monkeypatch):
    """Run a plan command in the fixture's directory; gives stdout and stderr."""
    monkeypatch.chdir(plan_space)
    return Runner(capsys, "plan")
