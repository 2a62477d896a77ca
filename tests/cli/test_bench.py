"""`mpq bench`: sizes and rates of stored and synthetic weights, as Markdown, CSV and JSON."""

import csv
import io
import statistics

import pytest
import torch
from torch._dynamo.utils import counters

from tests.made.commands import Runner, bench_models

COLUMNS = (
    "model", "params", "device", "backend", "activations", "run", "threads", "dtype", "torch", "mpq_kernels", "test",
    "batch"
)  # fmt: skip


@pytest.fixture(scope="module")
def space(tmp_path_factory):
    """A tiny dense model, the same packed, and its config alone."""
    return bench_models(tmp_path_factory.mktemp("bench"))


@pytest.fixture
def run(space, capsys, monkeypatch):
    """Run a command in the fixture's directory; gives stdout and stderr."""
    monkeypatch.chdir(space)
    threads = torch.get_num_threads()
    yield Runner(capsys)
    torch.set_num_threads(threads)


def test_bench_of_stored_and_synthetic_weights_has_the_same_sizes(run):
    small = ["-p", "4", "-n", "2", "-r", "2", "--json", "--quiet"]
    packed = run("bench", "packed", *small).json()
    bare = run("bench", "bare/config.json", "--plan", "plan.json", *small).json()
    directory = run("bench", "bare", "--bits", 3, "--group-size", -1, *small).json()
    shape = run("bench", "dense", "--bits", 3, "--group-size", -1, *small).json()
    names = [data.pop("model") for data in (packed, bare, directory, shape)]
    assert names == ["packed", "bare (synthetic)", "bare (synthetic)", "dense (synthetic)"]
    for data in (bare, directory, shape):
        assert {k: v for k, v in data.items() if k != "results"} == {k: v for k, v in packed.items() if k != "results"}
    assert packed["packed"]["total"] > 0 and packed["bits_per_weight"] == packed["packed"]["bpw"]
    for data in (packed, bare):
        assert [(r["test"], r["tokens"], r["batch"]) for r in data["results"]] == [("pp4", 4, 1), ("tg2", 2, 1)]
        for result in data["results"]:
            rates = [result["tokens"] * result["batch"] / s for s in result["seconds"]]
            assert len(rates) == 2 and result["rates"] == pytest.approx(rates)
            assert result["tokens_per_s"] == pytest.approx(statistics.fmean(rates))
            assert result["deviation"] == pytest.approx(statistics.stdev(rates))


def test_bench_with_int8_activations(run):
    small = ["-p", "4", "-n", "2", "-r", "1", "--json", "--quiet", "--activations", "int8"]
    stored, bare = run("bench", "packed", *small).json(), run("bench", "bare", "--plan", "plan.json", *small).json()
    assert stored["activations"] == bare["activations"] == "int8" and stored["backend"].startswith("cpu")
    assert run("bench", "packed", "-p", "4", "-n", "0", "-r", "1", "--json").json()["activations"] == "exact"


def test_bench_says_which_way_ran(run, without_inductor):
    small = ["-p", "4", "-n", "3", "-r", "1", "--json", "--quiet"]
    for directory in ("packed", "dense"):
        assert run("bench", directory, *small).json()["run"] == "eager"
        assert counters["stats"]["unique_graphs"] == 0
        assert run("bench", directory, *small, "--compile").json()["run"] == "compiled"
        assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
        counters.clear()


def test_bench_of_a_dense_model_and_of_a_synthetic_dense_one(run):
    small = ["-p", "4", "-n", "0", "-r", "1", "--json"]
    stored, bare = run("bench", "dense", *small), run("bench", "bare", "--bits", 16, *small)
    for done in (stored, bare):
        data = done.json()
        assert (data["backend"], data["bits_per_weight"], data["packed"]["total"]) == ("torch", 16.0, 0)
        assert data["results"][0]["deviation"] is None
    assert stored.json()["params"] == bare.json()["params"]
    assert "synthetic" in bare.err and "synthetic" not in stored.err


def test_every_length_at_every_batch_size_in_csv_and_markdown(run):
    words = ["bench", "packed", "-p", "4,8", "-n", "2,3", "-b", "1,2", "-r", "2", "--threads", "1", "--quiet"]
    rows = list(csv.DictReader(io.StringIO(run(*words, "--format", "csv").out)))
    tests = [(t, b) for b in "12" for t in ("pp4", "pp8", "tg2", "tg3")]
    assert [(row["test"], row["batch"]) for row in rows] == tests
    assert all(float(row["tokens_per_s"]) > 0 and float(row["deviation"]) >= 0 for row in rows)
    assert {row["threads"] for row in rows} == {"1"} and {row["torch"] for row in rows} == {torch.__version__}
    lines = run(*words).out.splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert set(COLUMNS) | {"packed bytes", "bits/weight", "tokens/s"} == set(cells[0])
    assert set("".join(cells[1])) == {"-"} and len({len(line) for line in lines}) == 1
    assert [(row[cells[0].index("test")], row[cells[0].index("batch")]) for row in cells[2:]] == tests
    assert all(" ± " in row[-1] for row in cells[2:])


@pytest.mark.parametrize(
    "words",
    [
        ["packed", "-p", "a"],
        ["packed", "-p", "-4"],
        ["packed", "-b", "0"],
        ["packed", "-p", "0", "-n", "0"],
        ["packed", "-r", "0"],
        ["packed", "--format", "csv", "--json"],
        ["packed", "--group-size", "32"],
        ["bare", "--bits", "4", "--plan", "plan.json"],
        ["bare", "--bits", "17"],
    ],
)
def test_wrong_usage_is_2(run, words):
    assert run("bench", *words, code=2).out == ""


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["nowhere"], "is not a directory"),
        (["plan.json"], "config.json"),
        (["bare"], "give a plan or a width"),
        (["bare", "--bits", 9], "bits=9 is neither"),
        (["bare", "--bits", 4], "does not divide"),  # the default group of 64 and an intermediate size of 172
        (["packed", "--plan", "plan.json"], "leave the plan out"),
        (["packed", "-p", 500], "128 positions"),
        (["packed", "--device", "moon"], "device='moon'"),
        (["dense", "--backend", "cpu"], "needs no backend"),
        (["dense", "--activations", "int8"], "is for packed ones"),
        (["bare", "--bits", 16, "--activations", "int8"], "nothing is packed"),
        (["packed", "--activations", "int8", "--backend", "reference"], "reference: has no kernels for int8"),
    ],
)
def test_refusals_are_one_message(run, words, match):
    refused = run("bench", *words, "-r", 1, code=1)
    assert refused.out == "" and match in refused.err and refused.err.startswith("mpq: ")
