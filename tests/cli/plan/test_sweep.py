"""`mpq plan sweep`: measured once, kept in its file, drawn."""

import importlib.util

import pytest

TEXT = ["--calibration", "text.txt", "--calibration-tokens", "1024", "--quantizer", "rtn"]


def test_a_sweep_goes_on_where_it_was_stopped(run, monkeypatch):
    words = [
        "plan",
        "sweep",
        "dense",
        "--text",
        "text.txt",
        "--output",
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
    run("plan", "sweep", "dense", "--text", "text.txt", "--output", "text.txt", code=1)


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


def test_without_a_text_only_weights_are_looked_at(run):
    words = ["plan", "sweep", "dense", "--text", "text.txt", "-o", "w.json", "--max-tokens", "512", "--bits", "2,3"]
    done = run(*words, "--budgets", "2.6", "--quantizer", "rtn", "--json")
    assert set(done.json()["points"]) == {"uniform 2g64", "frobenius 2.6"} and "--calibration FILE" in done.err
    assert "--methods fisher looks at activations" in run.misuse(*words, "--methods", "zd,fisher")
    assert "--budgets '3,x' is not a list of numbers" in run.misuse(*words, "--budgets", "3,x")
