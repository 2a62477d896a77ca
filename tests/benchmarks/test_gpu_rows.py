"""Layers of benchmarks/gpu/measure.py and their plan, without a GPU: arithmetic, order, running, failures, budget."""

import contextlib
import dataclasses
import json
import time

import pytest
import torch

from benchmarks.facts import PEER_PACKAGES, facts
from benchmarks.gpu import budget, measure
from benchmarks.gpu.budget import plan, without_absent
from benchmarks.gpu.measure import OutOfTime, time_limit
from benchmarks.layers import gemm, rows, shapes, timing
from benchmarks.layers.rows import GpuRow, set_ratios
from benchmarks.peers.installed import all_peers
from benchmarks.peers.torch import Dense, Peer
from tests.made.layers import CPU, bench, row, small_shapes, unit  # noqa: F401  (a fixture)

# Arithmetic


def test_times_of_a_graph_become_a_row():
    made = GpuRow("s", 1, "packed 4", "bfloat16", 8_000_000, 10)
    made.set_graph_times([400.0, 440.0, 380.0], [396.0], 10, 4000.0)  # us of whole graphs; GB/s
    assert (made.us_median, made.us_min, made.calls, made.replays) == (40.0, 38.0, 10, 3)
    assert made.us_again == pytest.approx(39.6) and made.spread == pytest.approx(0.01)
    assert made.floor_us == pytest.approx(2.0) and made.of_floor == pytest.approx(0.05)
    assert made.gbytes_per_s == pytest.approx(200.0) and made.of_bandwidth == pytest.approx(made.of_floor)


def test_ratios_are_within_a_shape_a_number_of_tokens_and_a_width():
    table = [
        row("bf16", 40.0),
        row("packed 4", 10.0, width="4"),
        row("humming 4", 20.0, width="4"),
        row("packed 3", 8.0, width="3"),
        row("packed 4|3|8", 12.0, width="4|3|8"),
        row("packed 4", 5.0, width="4", tokens=2),
        row("marlin 4", None, width="4"),
    ]
    set_ratios(table)
    assert table[1].over == {"bf16": 4.0, "humming 4": 2.0, "packed 4|3|8": 1.2}
    assert table[2].over["packed 4"] == 0.5 and table[0].over_bf16 == 1.0 and table[1].over_bf16 == 4.0
    assert "humming 4" not in table[3].over and "packed 4|3|8" in table[3].over
    assert set(table[4].over) == {"bf16", "packed 4", "humming 4", "packed 3"}
    assert table[5].over == {} and table[5].over_bf16 is None and table[6].over == {}


def test_lines_of_the_table():
    table = [row("bf16", 40.0), row("packed 4", 10.0, width="4"), row("marlin 4", None, width="4")]
    table[2].reason = "no such file"
    set_ratios(table)
    assert "10.00" in rows.gpu_line(table[1]) and "bf16 4.00x" in rows.gpu_line(table[1])
    assert rows.gpu_line(table[2]).endswith("no such file")
    assert rows.gpu_line(row("packed 4", 2000.0, shape="llama-8b-token")).endswith("= 2.000 ms")


def test_copies_exceed_the_cache_and_the_least():
    assert timing.copies_for(50_000_000, 200, 8) == 8 and timing.copies_for(10_000_000, 200, 8) == 21


def test_an_error_is_over_the_largest_output_and_nan_is_seen():
    exact = torch.tensor([[1.0, -4.0]])
    assert timing.worst_error([exact, exact + 0.4], [exact, exact]) == pytest.approx(0.1)
    assert not timing.worst_error([exact, exact * float("nan")], [exact, exact]) <= 1e9


def test_an_output_that_nobody_writes_is_found():
    class Lazy(timing.EagerRun):
        def replay(self):
            """Leaves the last output as it is."""
            for output, thunk in list(zip(self.outputs, self._thunks, strict=True))[:-1]:
                output.copy_(thunk())

    exact = torch.ones(2, 2)
    thunks = [lambda: exact.clone()] * 3
    assert timing.checked_error(timing.EagerRun(thunks, [0]), [exact] * 3) == 0
    assert not timing.checked_error(Lazy(thunks, [0]), [exact] * 3) <= 1e9


def test_same_bytes_in_one_width():
    mixed = shapes.make_layout("llama-8b-qkv", "4|3|8", 128)
    same = shapes.same_bytes_layout(mixed, 4, 128)
    assert len(same.segments) == 1 and same.in_features == mixed.in_features
    row_block = 64 * same.size().total_bytes / same.out_features
    assert abs(same.size().total_bytes - mixed.size().total_bytes) <= row_block / 2


class PretendedCuda:
    """As much of torch.cuda as a graph's run uses, on the CPU: a graph notes the calls that it captures."""

    def __init__(self, monkeypatch):
        self.log, self.now = [], 0.0
        pretended = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = pretended.now

            def synchronize(self):
                pass

            def elapsed_time(self, stop):
                return stop.at - self.at

        class Graph:
            def replay(self):
                pretended.now += 0.5  # ms
                pretended.log.append("replay")

        class Stream:
            def wait_stream(self, other):
                pass

        @contextlib.contextmanager
        def capture(graph, capture_error_mode):
            self.log.append("begin")
            yield
            self.log.append("end")

        for name, value in {
            "Event": Event, "CUDAGraph": Graph, "Stream": Stream, "current_stream": Stream, "graph": capture,
            "stream": lambda stream: contextlib.nullcontext(), "synchronize": lambda *words: None,
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, value)


def test_a_graph_captures_every_call_once_after_warming_up(monkeypatch):
    cuda = PretendedCuda(monkeypatch)
    thunks = [lambda i=i: cuda.log.append(i) or torch.full((1,), float(i)) for i in range(4)]
    run = timing.GraphRun(thunks, [0, 2])
    assert cuda.log == [0, 2, 0, 2, "begin", 0, 1, 2, 3, "end"] and [float(y) for y in run.outputs] == [0, 1, 2, 3]
    times = run.microseconds(0.0)
    assert times == [500.0] * timing.LEAST_REPLAYS and cuda.log.count("replay") == 3 + len(times)


def test_ceilings_are_bytes_and_operations_over_the_best_time(monkeypatch):
    cuda = PretendedCuda(monkeypatch)
    right = torch.Tensor.copy_
    monkeypatch.setattr(timing, "read_bandwidth", lambda device, nbytes: 7.0)

    def tick(call):
        def timed(*words):
            cuda.now += 2.0
            return call(*words)

        return timed

    monkeypatch.setattr(torch.Tensor, "copy_", tick(right))
    monkeypatch.setattr(torch, "matmul", tick(torch.matmul))
    found = timing.cuda_ceilings(CPU, nbytes=4096, side=16)
    assert found["copy_gbytes_per_s"] == pytest.approx(2 * 4096 / 2e-3 / 1e9) == found["copy_gbytes_per_s_median"]
    assert found["bf16_tflops"] == pytest.approx(2 * 16**3 / 2e-3 / 1e12) and found["read_gbytes_per_s"] == 7.0


def test_facts_name_every_package(monkeypatch):
    found = facts(torch.device("cuda"))
    assert set(PEER_PACKAGES) <= set(found["packages"]) and {"driver", "cuda", "nvcc", "commit"} <= set(found)
    json.dumps(found)


def test_nan_does_not_spoil_the_file(tmp_path):
    bad = row("packed 4", None)
    bad.error, bad.reason = float("nan"), "wrong by nan"
    rows.write_json(tmp_path / "x.json", {"done": []}, [bad])
    _, (back,) = rows.read_json(tmp_path / "x.json")
    assert back.error is None and back.reason == "wrong by nan"


# The plan


def default_plan(backends):
    """The plan of a run that names nothing on its command line."""
    defaults = gemm.DEFAULTS["cuda"]
    tokens = [int(m) for m in defaults["tokens"].split(",")]
    shapes_of, widths = defaults["shapes"].split(","), defaults["widths"].split(",")
    return plan(shapes_of, widths, tokens, all_peers(128), torch.bfloat16, backends)


def test_the_plan_has_every_unit_once_and_the_important_ones_first():
    defaults = gemm.DEFAULTS["cuda"]
    units = default_plan(budget.PACKED_BACKENDS)
    keys = [u.key for u in units]
    assert len(set(keys)) == len(keys) and [u.rank for u in units] == sorted(u.rank for u in units)
    assert keys[:2] == ["8192x8192 bf16", "8192x8192 packed 4"]
    assert {f"8192x8192 {layer}" for layer in ("packed 1", "packed 7", "fp16", "humming 8", "tinygemm 4")} <= set(keys)
    assert {u.mode for u in units if u.shape == "llama-8b-qkv"} == set(budget.MODES)
    assert all(max(u.tokens) <= budget.TOKEN_PASS_MAX for u in units if u.shape in shapes.TOKENS)
    assert next(u for u in units if u.peer == "gemlite").tokens == (1, 16, 64)
    names = {part for shape in defaults["shapes"].split(",") for part in shapes.parts_of(shape)}
    assert names <= set(shapes.SHAPES)


def test_triton_stands_beside_cuda_at_every_width_and_alone_without_it():
    units = default_plan(budget.PACKED_BACKENDS)
    place = {u.key: i for i, u in enumerate(units)}
    backend = {u.key: u.backend for u in units}
    for u in [u for u in units if u.mode == "packed" and u.backend == "cuda" and not u.name.endswith("fp16")]:
        assert backend[f"{u.key} triton"] == "triton" and place[u.key] < place[f"{u.key} triton"]
    assert {u.backend for u in units if u.mode in ("apart", "same bytes")} == {"cuda"}
    assert all(u.backend is None for u in units if u.mode == "peer")
    first = [u.name for u in units if u.shape == "8192x8192"][:9]
    assert first[:5] == ["bf16", "packed 4", "packed 2", "packed 3", "packed 8"]
    assert set(first[5:]) == {f"packed {width} triton" for width in "4238"}
    alone = default_plan(("triton",))
    assert {u.backend for u in alone} == {"triton", None} and {u.mode for u in alone} == set(budget.MODES)
    packed = [u for u in alone if u.backend]
    assert all("triton" in u.name for u in packed) and len({u.key for u in alone}) == len(alone)


def test_a_peer_that_is_absent_stands_once():
    units = [unit(mode="peer", peer="p", width=w) for w in "48"] + [unit(), unit(width="8")]
    kept = without_absent(units, {"p": "not installed"})
    assert [(u.peer, u.tokens) for u in kept] == [("p", (1,)), ("", (1, 3)), ("", (1, 3))]
    assert without_absent(units, {"p": None}) == units


# Running


@pytest.mark.parametrize("mode", ["packed", "apart"])
def test_layers_run_on_the_backend_of_their_unit(mode):
    asked = dataclasses.replace(unit("fused", mode, "4|3|8"), backend="reference")
    assert {layer.backend for layer in bench().load_of(asked).calls} == {"reference"}
    assert {layer.backend for layer in bench().load_of(unit("fused", mode, "4|3|8")).calls} == {"cpu"}
    assert bench()._row(asked, 1).backend == "reference"
    wrong = dataclasses.replace(unit(), backend="cuda")
    seen = []
    bench().run([wrong], 60, lambda u, made: seen.extend(made))
    assert len(seen) == 2 and all("cuda: runs on cuda, not on cpu" in r.reason for r in seen)


def test_what_compiles_at_its_first_call_is_called_beforehand(monkeypatch):
    class Compiling(Dense):
        """Notes the number of tokens of each call."""

        compiles, seen = True, []

        def call(self, held, tensors):
            right = super().call(held, tensors)
            return lambda x: self.seen.append(len(x)) or right(x)

    monkeypatch.setattr(measure, "COMPILING_BACKENDS", ("reference",))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    peers = {"dense": Dense("dense", torch.bfloat16), "compiling": Compiling("compiling", torch.bfloat16)}
    units = [unit(mode="peer", width="", peer=name) for name in peers]
    units += [dataclasses.replace(unit(), backend=name) for name in ("cpu", "reference")]
    words = {"deadline": time.monotonic() + 60}
    assert list(bench(peers, **words).warm(units)) == [(units[1], "ready"), (units[3], "ready")]
    assert Compiling.seen == [1, 3]
    b = bench(peers, {"compiling": "not installed"}, **words)
    assert list(b.warm(units[1:2])) == [(units[1], "not installed")]


@pytest.mark.parametrize("mode", ["packed", "apart", "same bytes"])
def test_packed_layers_are_right_and_timed(mode):
    made = list(bench().rows(unit("fused", mode, "4|3|8")))
    assert [r.tokens for r in made] == [1, 3] and all(r.reason is None for r in made), made
    assert all(r.us_median > 0 and 0 < r.error < 2e-2 and r.copies >= 2 for r in made)
    assert all(r.calls >= measure.LEAST_CALLS or mode == "apart" for r in made)
    assert all(r.weight_bytes * r.copies > 50_000 for r in made)


def test_a_token_passes_all_layers():
    b = bench({"bf16": Dense("bf16", torch.bfloat16)})
    packed, dense = unit("tiny-token"), unit("tiny-token", "peer", "", peer="bf16")
    load = b.load_of(packed)
    assert (len(load.calls), len(load.weights), load.results) == (6, 2, 1)
    assert load.which == [0, 1] * 3 and load.weight_bytes == 3 * sum(
        shapes.make_layout(part, "4", 64).size().total_bytes for part in ("one", "fused")
    )
    assert len({layer.qweight.data_ptr() for layer in load.calls}) == 6  # every layer has a weight of its own
    for made in (*b.rows(packed), *b.rows(dense)):
        assert made.reason is None and made.us_median > 0 and made.copies == 1


def test_few_tokens_go_round_the_copies_more_than_once():
    b = bench()
    few, many = b.rows(dataclasses.replace(unit(), tokens=(1, measure.FEW_TOKENS)))
    assert few.calls >= measure.LEAST_CALLS > many.calls == many.copies


class Wrong(Dense):
    """Off by a tenth in its last copy."""

    def call(self, held, tensors):
        right = super().call(held, tensors)
        return right if tensors is held.tensors else lambda x: right(x) * 1.1


class Failing(Peer):
    """Cannot hold any weight."""

    name, widths = "failing", ("4",)

    def hold(self, dense, width, tokens):
        raise ValueError("cannot pack\nsecond line")


class Slow(Failing):
    """Never ends."""

    def hold(self, dense, width, tokens):
        time.sleep(30)


def test_a_wrong_result_gets_a_reason_and_no_number():
    made = list(bench({"wrong": Wrong("wrong", torch.bfloat16)}).rows(unit(mode="peer", width="", peer="wrong")))
    assert all(r.us_median is None and r.error == pytest.approx(0.1, abs=0.02) for r in made)
    assert all("not timed" in r.reason and r.of_floor is None for r in made)


def test_failures_leave_reasons_and_the_rest_runs():
    seen = {}
    peers = {"failing": Failing(), "slow": Slow(), "absent": Failing()}
    units = [unit(mode="peer", peer=name) for name in peers] + [unit()]
    b = bench(peers, {"absent": "not installed"})
    left = b.run(units, 1.0, lambda u, made: seen.update({u.peer: [r.reason for r in made]}))
    assert left == [] and seen == {
        "failing": ["ValueError: cannot pack"] * 2,
        "slow": ["stopped after 1 s"] * 2,
        "absent": ["not installed"] * 2,
        "": [None, None],
    }


def test_a_refusal_comes_before_any_work():
    class Picky(Failing):
        def why_not_layer(self, rows, cols, width):
            return f"{rows} x {cols} is too odd"

    made = list(bench({"failing": Picky()}).rows(unit("tiny-token", "peer", peer="failing")))
    assert [r.reason for r in made] == ["128 x 256 is too odd"] * 2


def test_the_budget_ends_a_run_between_units():
    ticks = iter([0, 1, 2, 3, 11, 12])
    b = bench(clock=lambda: next(ticks), deadline=10)
    seen = []
    units = [unit(tokens=(1,)), unit(width="3", tokens=(1,)), unit(width="2", tokens=(1,))]
    assert b.run(units, 60, lambda u, made: seen.append((u.width, len(made)))) == units[2:]
    assert seen == [("4", 1), ("3", 1)]


def test_a_time_limit_is_taken_back():
    with time_limit(0.05):
        pass
    time.sleep(0.06)
    with pytest.raises(OutOfTime), time_limit(0.05):
        time.sleep(5)
