"""`mpq plan allocate`, `sweep`, `methods`, and `mpq kld`, on a tiny model."""

import importlib.util
import json

import pytest

from mpq_kernels import Plan
from mpq_kernels.allocate import LatencyTable

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


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--budget", "3"], "--calibration FILE"),
        (["--budget", "3", "--method", "luck"], "no method 'luck'"),
        (["--budget", "many", "--method", "zd"], "'many' is not a number"),
        (["--budget", "0.5", "--method", "zd", "--quantizer", "rtn"], "below"),
        (["--budget", "3", "--method", "zd", "--bits", "2,x"], "--bits '2,x'"),
        (["--budget", "3", "--method", "zd", "--least", "down"], "not REGEX=BITS"),
        (["--budget", "9us", "--method", "zd", "--quantizer", "rtn"], "needs a latency table"),
        (["--budget", "3", "--method", "zd", "--quantizer", "gptq"], "needs calibration"),
    ],
)
def test_what_cannot_be_allocated_is_said(run, words, message):
    assert message in run("plan", "allocate", "dense", *words, code=1).err


def test_methods_are_listed_with_their_sources(run):
    rows = {row["name"]: row for row in run("plan", "methods", "--json").json()["methods"]}
    assert rows["zd"]["needs_text"] is False and rows["fisher"]["needs_text"] is True
    assert all(row["source"].startswith("https://") for row in rows.values())
    assert "2406.17415" in run("plan", "methods").out


def test_a_sweep_goes_on_where_it_was_stopped(run, monkeypatch):
    words = [
        "plan",
        "sweep",
        "dense",
        "--text",
        "text.txt",
        "--out",
        "s.json",
        "--max-tokens",
        "512",
        "--bits",
        "2,3,4",
    ]
    words += ["--methods", "zd,fisher", *TEXT]
    first = run(*words, "--budgets", "2.6", "--json").json()
    assert set(first["points"]) == {"uniform 2g64", "zd 2.6", "fisher 2.6"}
    from mpq_kernels.allocate import sweep

    calls = []
    real = sweep.divergence
    monkeypatch.setattr(sweep, "divergence", lambda *args: calls.append(1) or real(*args))
    data = run(*words, "--budgets", "2.6,3.4", "--json").json()
    assert len(calls) == 3 and set(data["points"]) - set(first["points"]) == {"uniform 3g64", "zd 3.4", "fisher 3.4"}
    assert data["points"]["zd 2.6"] == first["points"]["zd 2.6"]
    assert data["points"]["fisher 3.4"]["bpw"] <= 3.4 and "original_ppl" in data
    table = run(*words, "--budgets", "2.6,3.4").out
    assert "uniform" in table and "fisher" in table and len(calls) == 3
    assert "another max_tokens" in run(*(w if w != "512" else "768" for w in words), code=1).err
    run("plan", "sweep", "dense", "--text", "text.txt", "--out", "text.txt", code=1)


def test_the_picture_of_a_sweep(run, tmp_path):
    pytest.importorskip("matplotlib")
    from mpq_kernels.allocate.chart import draw_frontier
    from mpq_kernels.errors import UnsupportedError

    points = {
        f"{method} {bits}": {"method": method, "bpw": bits, "ppl": 40 - bits, "kl": 1 / bits}
        for method in ("uniform", "zd")
        for bits in (2.0, 3.0)
    }
    data = {"settings": {"model": "m"}, "original_ppl": 30.0, "points": points}
    draw_frontier(data, tmp_path / "a.svg")
    drawn = (tmp_path / "a.svg").read_text()
    assert drawn.count("<use") >= 8 and "<svg" in drawn
    with pytest.raises(UnsupportedError, match=".png, .svg"):
        draw_frontier(data, tmp_path / "a.txt")


def test_no_picture_without_matplotlib(run, tmp_path, monkeypatch):
    if importlib.util.find_spec("matplotlib") is not None:
        import sys

        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    from mpq_kernels.allocate.chart import draw_frontier
    from mpq_kernels.errors import UnsupportedError

    with pytest.raises(UnsupportedError, match=r"mpq_kernels\[plot\]"):
        draw_frontier({}, tmp_path / "a.png")


def test_kld_of_packed_models(run):
    words = ["--original", "dense", "--text", "text.txt", "--max-tokens", "512", "--json"]
    same = run("kld", "dense", *words).json()
    packed = run("kld", "packed", *words, "--save", "ref.safetensors").json()
    mixed = run("kld", "mixed", "--original", "ref.safetensors", "--json").json()
    assert same["kl"] < 1e-6 and same["top1"] > 0.99
    assert 1e-6 < packed["kl"] < mixed["kl"] and packed["predicted"] == 510
    assert "percentiles of KL" in run("kld", "packed", "--original", "ref.safetensors").out
    assert "--text FILE" in run("kld", "packed", "--original", "dense", code=1).err
    held = ["--original", "ref.safetensors", "--text", "text.txt"]
    assert "holds its own tokens" in run("kld", "packed", *held, code=1).err


def test_ppl_has_an_error_bar_and_a_stride(run):
    words = ["ppl", "dense", "--text", "text.txt", "--max-tokens", "512", "--window", "128", "--json"]
    plain, strided = run(*words).json(), run(*words, "--stride", "64").json()
    assert 0 < plain["stderr"] < plain["ppl"] and plain["predicted"] == 4 * 127
    assert strided["predicted"] == 127 + 6 * 64
    assert "is not in 1..128" in run(*words, "--stride", "300", code=1).err


def test_latency_measures_a_table_that_allocate_takes(run):
    words = ["--bits", "3,4,16", "--group-sizes", "32,64", "--rounds", "2", "--seconds", "0.001", "-o", "us.json"]
    found = run("plan", "latency", "dense/config.json", *words, "--json").json()

    shapes = {(entry["out_features"], entry["in_features"]) for entry in found["entries"]}
    assert len(found["entries"]) == 5 * len(shapes) and all(entry["us"] > 0 for entry in found["entries"])
    assert "1 token" in found["device"] and found["spread"] >= 0
    table = LatencyTable.from_file("us.json")
    assert {(bits, size) for *_, bits, size in table.us} == {(3, 32), (3, 64), (4, 32), (4, 64), (16, -1)}
    limit = sum(table.us.values()) * 100
    choices = ["--bits", "3,4,16", "--group-sizes", "32,64", "--latency", "us.json"]
    got = run("plan", "allocate", "dense", "--budget", f"{limit}us", "--method", "frobenius", *choices, "-o", "l.json",
              "--quantizer", "rtn", "--json").json()  # fmt: skip
    assert 0 < got["us"] <= limit and got["loss"] == 0  # so much time is given that every weight is kept


def test_latency_refuses(run):
    assert "--dtype 'int4'" in run("plan", "latency", "dense", "--dtype", "int4", "-o", "x.json", code=1).err
    assert (
        "none of the group sizes [7]"
        in run("plan", "latency", "dense", "--group-sizes", "7", "-o", "x.json", code=1).err
    )
