"""Speed, benchmarks/layers/gemm.py: right work timed, right arithmetic, wrong results refused."""

import importlib.util
import inspect
import json
import statistics
import sys
import time
from pathlib import Path

import pytest
import torch

import mpq_kernels as mpq
from benchmarks.models import generation
from mpq_kernels.checkpoint.packed import PackedCheckpoint
from mpq_kernels.errors import MPQError
from mpq_kernels.evaluate import speed
from mpq_kernels.evaluate.speed import Measurement, ModelFacts, measure, synthetic_tokens, time_calls
from mpq_kernels.hf.compiled import cache_name
from tests.made.checkpoints import tiny_model
from tests.made.commands import bench_models

GEMM = Path(__file__).parents[2] / "benchmarks" / "layers" / "gemm.py"


@pytest.fixture(scope="module")
def space(tmp_path_factory):
    """A tiny dense model, the same packed, and its config alone."""
    return bench_models(tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="module")
def gemm():
    """benchmarks/layers/gemm.py as a module."""
    spec = importlib.util.spec_from_file_location("gemm", GEMM)
    module = importlib.util.module_from_spec(spec)
    sys.modules["gemm"] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    yield module
    del sys.modules["gemm"]


# Measuring


def test_measurement_arithmetic():
    one = Measurement("tg", 32, 4, (2.0, 4.0))
    assert (one.name, one.rates, one.mean) == ("tg32", [64.0, 32.0], 48.0)
    assert one.deviation == pytest.approx(statistics.stdev([64, 32]))
    assert Measurement("pp", 8, 1, (0.5,)).deviation is None


def test_what_is_timed(space, monkeypatch):
    """A prompt is one pass, generation one pass for each token over a growing cache; one run more than counted."""
    model = mpq.load(space / "packed")
    calls = []
    forward, name = model.forward, cache_name(model)

    def watched(**words):
        cache = words[name]
        calls.append((tuple(words["input_ids"].shape), 0 if cache is None else cache.get_seq_length()))
        return forward(**words)

    watched.__signature__ = inspect.signature(forward)
    monkeypatch.setattr(model, "forward", watched)
    clock = iter(range(1000))
    monkeypatch.setattr(speed, "now", lambda device: next(clock))
    seen = []
    results = measure(model, [5], [3], [1, 2], 2, lambda *call: seen.append(call))
    assert [(r.name, r.batch, r.seconds) for r in results] == [
        ("pp5", 1, (1, 1)),
        ("tg3", 1, (1, 1)),
        ("pp5", 2, (1, 1)),
        ("tg3", 2, (1, 1)),
    ]
    assert [r.mean for r in results] == [5, 3, 10, 6]
    wanted = []
    for batch in (1, 2):
        wanted += [((batch, 5), 0)] * 3 + [((batch, 1), 0), ((batch, 1), 1), ((batch, 1), 2)] * 3
    assert calls == wanted
    assert seen == [(1, 4, "pp5 x 1"), (2, 4, "tg3 x 1"), (3, 4, "pp5 x 2"), (4, 4, "tg3 x 2")]


def test_tokens_are_always_the_same(space):
    model = mpq.load(space / "packed")
    ids = synthetic_tokens(model, 2, 50)
    assert ids.shape == (2, 50) and ids.max() < 160 and ids.unique().numel() > 20
    torch.manual_seed(99)
    assert torch.equal(synthetic_tokens(model, 2, 50), ids)


def test_measure_refuses_what_it_cannot_time(space):
    model = mpq.load(space / "packed")
    for words, match in (
        (([], []), "nothing to measure"),
        (([0], [1]), "tokens=0"),
        (([1], [1], [0]), "batch=0"),
        (([1], [1], [1], 0), "repetitions=0"),
        (([129], [1]), "pp129 is more than the model's 128 positions"),
    ):
        with pytest.raises(MPQError, match=match):
            measure(model, *words)
    model.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(MPQError, match="NaN or Inf, so it is not timed"):
        measure(model, [4], [], [1], 1)


def test_facts_are_those_of_the_files(space):
    facts = ModelFacts.of(mpq.load(space / "packed"))
    dense = tiny_model("llama", space / "again", tied=False)
    size = PackedCheckpoint.open(space / "packed").size().packed
    assert facts.params == sum(p.numel() for p in dense.parameters())
    assert facts.packed == size and facts.bits_per_weight == size.bits_per_weight
    assert facts.kept_bytes == 2 * (facts.params - size.weights)
    assert facts.backend == f"cpu ({torch.ops.mpq.cpu_isa()})" and facts.dtype == "bfloat16"
    plain = ModelFacts.of(dense)
    assert (plain.backend, plain.bits_per_weight, plain.packed.total_bytes) == ("torch", 32.0, 0)


def test_time_calls_goes_round():
    order = []
    calls = [lambda i=i: (order.append(i), time.sleep(0.001)) for i in range(3)]
    times = time_calls(calls, torch.device("cpu"), 0.0)
    assert order == [0, 1, 2] + [i % 3 for i in range(10)]  # one round, then no fewer than ten calls
    assert len(times) == 10 and min(times) >= 1000  # microseconds


# benchmarks/models/generation.py


def test_a_loaded_model_with_int8_activations(space):
    ids = torch.arange(1, 30)[None]
    with torch.no_grad():
        exact, rounded = (
            mpq.load(space / "packed")(ids).logits,
            mpq.load(space / "packed", activations="int8")(ids).logits,
        )
    assert not torch.equal(exact, rounded)
    assert (exact - rounded).abs().max() < 0.1 * exact.abs().max()


def test_generation_measures_and_writes(space, tmp_path, capsys):
    words = ["--config", str(space / "bare"), "--widths", "16,3", "--prompt", "4", "--generate", "2", "--group", "4"]
    assert generation.main([*words, "--repetitions", "2", "--json", str(tmp_path / "out.json")]) == 0
    rows = json.loads((tmp_path / "out.json").read_text())["results"]
    assert [(row["bits"], row["activations"]) for row in rows] == [(16, "exact"), (3, "exact"), (3, "int8")]
    assert all(len(row[test]["seconds"]) == 2 for row in rows for test in ("pp4", "tg2"))
    for row in rows[1:]:
        assert row["ms_without_products"]["tg2"] > 0 and row["packed_bytes"] > 0
    assert len(capsys.readouterr().out.splitlines()) == 2 + len(rows)


# benchmarks/layers/gemm.py


def test_gemm_measures_and_writes(gemm, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(gemm.SHAPES, "fused", ((64, 32, 32), 128))
    words = ["--shapes", "128x256,fused", "--widths", "3,4|3|8", "--tokens", "1,4", "--seconds", "0.01"]
    words += ["--activations", "int8,exact"]
    assert gemm.main([*words, "--total-mb", "0.2", "--json", str(tmp_path / "out" / "gemm.json")]) == 0
    data = json.loads((tmp_path / "out" / "gemm.json").read_text())
    layers = [(row["shape"], row["layer"], row["tokens"]) for row in data["results"]]
    dense = ["bf16", "fp32", "torch int4"]
    narrow, mixed = ["packed 3 int8", "packed 3"], ["packed 4|3|8 int8", "packed 4|3|8"]
    wanted = [("128x256", layer, m) for layer in [*dense, *narrow] for m in (1, 4)]
    wanted += [("fused", layer, m) for layer in [*dense, *narrow, *mixed] for m in (1, 4)]
    errors = {(row["shape"], row["layer"], row["tokens"]): row["error"] for row in data["results"]}
    assert all(errors["fused", name, 4] > errors["fused", name[:-5], 4] for name in (narrow[0], mixed[0]))
    assert layers == wanted
    for row in data["results"]:
        assert row["weight_bytes"] * row["copies"] > 200_000 and row["calls"] >= 10
        assert row["gbytes_per_s"] == pytest.approx(row["weight_bytes"] / row["us_median"] / 1e3)
        assert row["of_bandwidth"] == pytest.approx(row["gbytes_per_s"] / data["read_gbytes_per_s"])
        base = next(r for r in data["results"] if (r["shape"], r["tokens"]) == (row["shape"], row["tokens"]))
        assert row["over_bf16"] > 0 and (row is not base or row["over_bf16"] == 1)
        assert row["us_min"] <= row["us_median"]
    assert data["packages"]["torch"] == torch.__version__ and data["threads"] == torch.get_num_threads()
    assert len(capsys.readouterr().out.splitlines()) == 2 + len(layers)


def test_gemm_times_instruction_sets_in_turns(gemm, tmp_path, monkeypatch):
    before, used = torch.ops.mpq.cpu_isa(), []
    right = gemm.packed_calls

    def watched(layout, args, copies):
        layers, wanted = right(layout, args, copies)
        for layer in layers:
            forward = layer.forward
            layer.forward = lambda x, forward=forward: used.append(torch.ops.mpq.cpu_isa()) or forward(x)
        return layers, wanted

    monkeypatch.setattr(gemm, "packed_calls", watched)
    words = ["--shapes", "64x64", "--widths", "4", "--tokens", "17", "--seconds", "0.01", "--total-mb", "0.05"]
    words += ["--activations", "int8", "--isas", f"portable,{before}", "--json", str(tmp_path / "gemm.json")]
    assert gemm.main(words) == 0
    rows = [row for row in json.loads((tmp_path / "gemm.json").read_text())["results"] if "packed" in row["layer"]]
    assert [row["layer"] for row in rows] == ["packed 4 int8 portable", f"packed 4 int8 {before}"]
    assert all(row["us_median"] > 0 for row in rows) and min(used.count("portable"), used.count(before)) > 10
    assert set(used) == {"portable", before} and torch.ops.mpq.cpu_isa() == before


def test_gemm_ratio_is_one_of_turns(gemm):
    slow, fast = (gemm.Cell(gemm.Row("1x1", 1, name, "float32", 4, 1), [], torch.zeros(1)) for name in "ab")
    slow.rounds, fast.rounds = [[4.0, 4.0, 9.0], [40.0], [6.0]], [[2.0], [10.0, 10.0], [1.0]]
    assert fast.over(slow) == 4.0 and slow.over(fast) == 0.25
    fast.rounds = []
    assert fast.over(slow) is None


def test_gemm_gives_no_number_for_a_wrong_result(gemm, tmp_path, capsys, monkeypatch):
    right = gemm.packed_calls

    def wrong(layout, args, copies):
        layers, wanted = right(layout, args, copies)
        forward = layers[-1].forward
        layers[-1].forward = lambda x: forward(x) * 1.1
        return layers, wanted

    monkeypatch.setattr(gemm, "packed_calls", wrong)
    words = ["--shapes", "64x64", "--widths", "4", "--tokens", "2", "--seconds", "0.01", "--total-mb", "0.05"]
    assert gemm.main([*words, "--json", str(tmp_path / "gemm.json")]) == 1
    row = json.loads((tmp_path / "gemm.json").read_text())["results"][-1]
    assert row["us_median"] is None and row["gbytes_per_s"] is None and row["error"] == pytest.approx(0.1, abs=0.02)
    assert "not timed" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words",
    [
        ["--shapes", "nonsense"],
        ["--widths", "9"],
        ["--group", "48"],
        ["--dtype", "int8"],
        ["--activations", "int4"],
        ["--isas", "sse9"],
        ["--isas", "avx2", "--device", "cuda"],
    ],
)
def test_gemm_refuses_wrong_words(gemm, words, capsys):
    with pytest.raises(SystemExit) as stop:
        gemm.main(words)
    assert stop.value.code == 2 and words[0] in capsys.readouterr().err
