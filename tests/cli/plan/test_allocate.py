"""`mpq plan allocate`: a plan within its budget, with a text and without one, and what is refused."""

import json
import shutil

import pytest

from mpq_kernels import Plan
from tests.made.multimodal import tiny_multimodal

TEXT = ["--calibration", "text.txt", "--calibration-tokens", "1024", "--quantizer", "rtn"]


def test_allocate_writes_a_plan_within_its_budget(run):
    done = run("plan", "allocate", "dense", "--budget", "3.2bits", "-o", "p.json", *TEXT, "--json")
    facts = done.json()
    assert 3.1 < facts["bpw"] <= 3.2 and facts["method"] == "fisher"
    assert run("plan", "size", "p.json", "dense", "--json").json()["packed"]["total"] == facts["bytes"]
    assert run("plan", "size", "p.json", "dense", "--json").json()["packed"]["weights"] == facts["weights"]


def test_limits_and_refinement(run):
    words = ["--budget", "3", "--granularity", "fuse", "--least", ".*down_proj=4", "--refine", "1", "--json"]
    facts = run("plan", "allocate", "dense", *words, *TEXT, "-o", "q.json").json()
    assert len(facts["kl"]) == 2
    rules = Plan.from_file("q.json").modules
    parts = [rules[f"model.layers.{i}.mlp.down_proj"] for i in range(2)]
    assert all(s.bits >= 4 for rule in parts for s in (rule.segments or (rule,)))


def test_without_a_file_the_plan_is_on_stdout(run):
    out = run("plan", "allocate", "dense", "--budget", "3", "--method", "frobenius", "--quantizer", "rtn").out
    assert Plan.from_dict(json.loads(out)).modules["lm_head"].bits == 16


def test_without_a_text_it_works_and_says_how(run):
    done = run("plan", "allocate", "dense", "--budget", "2.5bits", "--group-sizes", "32", "--json")
    assert done.json()["method"] == "frobenius" and "--calibration FILE" in done.err and "frobenius" in done.err
    words = ["plan", "allocate", "dense", "--budget", "3", "--quantizer", "rtn", "-o", "r.json"]
    assert run(*words, "--quiet").err == ""
    assert "method" not in run(*words, "--method", "zd").err  # nothing was chosen for the user


def test_json_has_the_plan(run):
    words = ["plan", "allocate", "dense", "--budget", "3", "--quantizer", "rtn", "-q"]
    plan = Plan.from_dict(run(*words).json())
    written = run(*words, "-o", "w.json", "--json").json()
    unwritten = run(*words, "--json").json()
    assert Plan.from_dict(written["plan"]) == Plan.from_dict(unwritten["plan"]) == Plan.from_file("w.json") == plan
    assert (written["output"], unwritten["output"]) == ("w.json", None)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--budget", "many"], "'many' is not a number"),
        (["--budget", "0.5"], "below"),
        (["--budget", "9us"], "needs a latency table"),
    ],
)
def test_what_cannot_be_allocated_is_said(run, words, message):
    words = [*words, "--method", "zd", "--quantizer", "rtn"]
    assert message in run("plan", "allocate", "dense", *words, code=1).err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method", "fisher"], "--calibration FILE), or one of frobenius, zd"),
        (["--method", "zd", "--refine", "2"], "--refine runs the model on a text"),
        (["--bits", "2,x"], "--bits '2,x' is not a list of whole numbers"),
        (["--least", "down"], "--least 'down' is not REGEX=BITS"),
        (["--most", "down=x"], "--most 'down=x' is not REGEX=BITS"),
    ],
)
def test_wrong_usage(run, words, message):
    assert message in run.misuse("plan", "allocate", "dense", "--budget", "3", *words)


def test_towers_get_the_width_that_is_asked_for(run, tmp_path):
    source = tiny_multimodal("qwen3_vl", tmp_path / "vl")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(f"dense/{name}", source)
    words = ["plan", "allocate", source, "--budget", "4", "--group-sizes", "32", "--quantizer", "rtn", "-q"]
    kept, asked = (Plan.from_dict(run(*words, *option).json()).modules for option in ([], ["--towers", "6"]))
    towers = [name for name in kept if name.startswith("model.visual.")]
    assert {kept[name].bits for name in towers} == {16} and {asked[name].bits for name in towers} == {6}
    assert {name: rule for name, rule in kept.items() if name not in towers} == {
        name: rule for name, rule in asked.items() if name not in towers
    }
