"""The GPU side of benchmarks/, without a GPU: arithmetic, order, budget, failures, files, refusals, the dry run."""

import argparse
import contextlib
import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import gemm, gpu, gpu_command, installed_peers, plot, rows, shapes, summary, timing  # noqa: E402
from benchmarks.gpu import Bench, Broken, OutOfTime, Unit, plan, time_limit, without_absent  # noqa: E402
from benchmarks.installed_peers import all_peers  # noqa: E402
from benchmarks.peers import Dense, Peer, symmetric_codes, symmetric_values  # noqa: E402
from benchmarks.rows import GpuRow, set_ratios  # noqa: E402

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_shapes(monkeypatch):
    """Shapes that a test can afford, and a "model" of two of them."""
    monkeypatch.setitem(shapes.SHAPES, "one", ((128,), 256))
    monkeypatch.setitem(shapes.SHAPES, "fused", ((64, 64, 64), 128))
    monkeypatch.setitem(shapes.TOKENS, "tiny-token", (3, ("one", "fused")))


def unit(shape="one", mode="packed", width="4", tokens=(1, 3), peer="", dtype=torch.bfloat16):
    return Unit(shape, mode, f"{mode} {width or peer}", width, dtype, tokens, peer)


def bench(peers=None, reasons=None, **words):
    """A Bench on the CPU, whose "graphs" are plain calls."""
    return Bench(CPU, 64, 0.05, 0.001, None, peers or {}, reasons or {}, timing.EagerRun, 2.0, least_copies=2, **words)


def row(layer, us, tokens=1, width="", shape="s", nbytes=4000):
    made = GpuRow(shape, tokens, layer, "bfloat16", nbytes, 8, width=width)
    if us is not None:
        made.set_graph_times([us * 8] * 3, [us * 8.4] * 3, 8, 4.0)
    return made


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
    found = rows.facts(torch.device("cuda"))
    assert set(rows.PEER_PACKAGES) <= set(found["packages"]) and {"driver", "cuda", "nvcc", "commit"} <= set(found)
    json.dumps(found)


def test_nan_does_not_spoil_the_file(tmp_path):
    bad = row("packed 4", None)
    bad.error, bad.reason = float("nan"), "wrong by nan"
    rows.write_json(tmp_path / "x.json", {"done": []}, [bad])
    _, (back,) = rows.read_json(tmp_path / "x.json")
    assert back.error is None and back.reason == "wrong by nan"


# The plan


def test_the_plan_has_every_unit_once_and_the_important_ones_first():
    defaults = gemm.DEFAULTS["cuda"]
    tokens = [int(m) for m in defaults["tokens"].split(",")]
    units = plan(defaults["shapes"].split(","), defaults["widths"].split(","), tokens, all_peers(128), torch.bfloat16)
    keys = [u.key for u in units]
    assert len(set(keys)) == len(keys) and [u.rank for u in units] == sorted(u.rank for u in units)
    assert keys[:2] == ["8192x8192 bf16", "8192x8192 packed 4"]
    assert {f"8192x8192 {layer}" for layer in ("packed 1", "packed 7", "fp16", "humming 8", "tinygemm 4")} <= set(keys)
    assert {u.mode for u in units if u.shape == "llama-8b-qkv"} == set(gpu.MODES)
    assert all(max(u.tokens) <= gpu.TOKEN_PASS_MAX for u in units if u.shape in shapes.TOKENS)
    assert next(u for u in units if u.peer == "gemlite").tokens == (1, 16, 64)
    names = {part for shape in defaults["shapes"].split(",") for part in shapes.parts_of(shape)}
    assert names <= set(shapes.SHAPES)


def test_a_peer_that_is_absent_stands_once():
    units = [unit(mode="peer", peer="p", width=w) for w in "48"] + [unit(), unit(width="8")]
    kept = without_absent(units, {"p": "not installed"})
    assert [(u.peer, u.tokens) for u in kept] == [("p", (1,)), ("", (1, 3)), ("", (1, 3))]
    assert without_absent(units, {"p": None}) == units


# Running


@pytest.mark.parametrize("mode", ["packed", "apart", "same bytes"])
def test_packed_layers_are_right_and_timed(mode):
    made = list(bench().rows(unit("fused", mode, "4|3|8")))
    assert [r.tokens for r in made] == [1, 3] and all(r.reason is None for r in made), made
    assert all(r.us_median > 0 and 0 < r.error < 2e-2 and r.copies >= 2 for r in made)
    assert all(r.calls >= gpu.LEAST_CALLS or mode == "apart" for r in made)
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
    few, many = b.rows(dataclasses.replace(unit(), tokens=(1, gpu.FEW_TOKENS)))
    assert few.calls >= gpu.LEAST_CALLS > many.calls == many.copies


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
    left = b.run(units, 0.3, lambda u, made: seen.update({u.peer: [r.reason for r in made]}))
    assert left == [] and seen == {
        "failing": ["ValueError: cannot pack"] * 2,
        "slow": ["stopped after 0 s"] * 2,
        "absent": ["not installed"] * 2,
        "": [None, None],
    }


def test_a_refusal_comes_before_any_work():
    class Picky(Failing):
        def refuses(self, rows, cols, width):
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


# Files


@pytest.fixture
def session(tmp_path, monkeypatch):
    """Makes Sessions over the same three units and files; words change the arguments."""
    ceilings = {"copy_gbytes_per_s": 4.0, "read_gbytes_per_s": 3.0, "bf16_tflops": 0.5}
    monkeypatch.setattr(gpu_command, "cuda_ceilings", lambda device: ceilings)
    units = [unit(width=w, tokens=(1,)) for w in "432"]

    def make(bench_words=None, **words):
        args = {"device": CPU, "json": tmp_path / "out" / "gemm.json", "plot": None, "resume": False, "group": 64}
        args |= {"total_mb": 0.05, "seconds": 0.001, "budget_s": 60.0, "unit_s": 60.0} | words
        return gpu_command.Session(
            argparse.Namespace(**args), ["--device", "cuda"], time.monotonic(), bench(**bench_words or {}), list(units)
        )

    return make


def test_a_run_that_is_stopped_leaves_a_file_and_can_be_resumed(session, capsys):
    ticks = iter([0, 0, 99])
    one = session({"clock": lambda: next(ticks), "deadline": 10})
    assert one.run() == 0
    data = json.loads(one.args.json.read_text())
    assert not data["complete"] and data["done"] == ["one packed 4"]
    assert data["left_out"] == ["one packed 3", "one packed 2"]
    assert data["results"][0]["floor_us"] == pytest.approx(data["results"][0]["weight_bytes"] / 4.0 / 1e3)
    assert data["results"][0]["arithmetic_us"] == pytest.approx(2 * 128 * 256 / 0.5e6)
    two = session(resume=True)
    assert two.run() == 0
    data = json.loads(one.args.json.read_text())
    assert data["complete"] and data["processes"] == 2 and data["left_out"] == [] and len(data["results"]) == 3
    assert {"packages", "commit", "date", "peers", "gpus"} <= set(data)
    assert "one packed 2" not in capsys.readouterr().err


def test_the_file_is_written_after_every_unit(session, monkeypatch):
    sizes = []
    one = session()
    right = gpu_command.write_json
    monkeypatch.setattr(gpu_command, "write_json", lambda *words: (right(*words), sizes.append(len(words[2]))))
    one.run()
    assert sizes == [0, 1, 2, 3, 3] and not list(one.args.json.parent.glob("*.part"))


def test_a_lost_context_starts_the_program_anew(session, monkeypatch):
    started = []
    monkeypatch.setattr(gpu_command.os, "execv", lambda path, words: started.append(words))
    one = session()

    def lost(u):
        raise Broken(f"{u.key}: an illegal memory access")

    monkeypatch.setattr(one.bench, "_check_context", lost)
    one.run()
    (words,) = started
    assert words[1].endswith("gemm.py") and words[2:5] == ["--device", "cuda", "--resume"]
    assert words[5] == "--budget-s" and 50 <= int(words[6]) <= 60
    assert json.loads(one.args.json.read_text())["done"] == ["one packed 4"]  # written before, so not tried again
    short = session(budget_s=5.0)  # too little time is left for another process
    monkeypatch.setattr(short.bench, "_check_context", lost)
    assert short.run() == 1 and len(started) == 1


def test_a_failed_packed_layer_is_a_failed_run(session, monkeypatch):
    one = session()
    monkeypatch.setitem(timing.TOLERANCE, torch.bfloat16, 0.0)
    assert one.run() == 1


def test_plot_takes_what_has_a_number(tmp_path, monkeypatch):
    table = [vars(row("packed 4", us, tokens=m, width="4")) for m, us in ((2, 10.0), (1, 8.0))]
    table.append(vars(row("marlin 4", None, width="4")))
    found = plot.series(table)
    assert found == {"s": {"packed 4": [(1, 1000 / 8e3), (2, 1000 / 10e3)]}}
    assert plot.plot({"results": []}, tmp_path / "p.png") == "no row has a fraction of the floor"
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install matplotlib" in plot.plot({"results": table}, tmp_path / "p.png")


def test_plot_is_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    table = [vars(row("packed 4", 10.0, tokens=m, width="4")) for m in (1, 2)]
    assert plot.plot({"results": table}, tmp_path / "p.png") is None
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_the_summary_says_what_failed(tmp_path, capsys):
    steps = "facts\tpassed\t3\nbuild\tfailed (124)\t240\nprobe\tleft out: no time left\t0\n"
    (tmp_path / "steps.tsv").write_text(steps)
    table = [row("bf16", 40.0), row("packed 4", 10.0, width="4")]
    set_ratios(table)
    about = {"gpus": ["x"], "done": ["a"], "left_out": [], "copy_gbytes_per_s": 4.0}
    rows.write_json(tmp_path / "gemm.json", about, table)
    (tmp_path / "probe.json").write_text("not json")
    assert summary.main(tmp_path, tmp_path / "steps.tsv") == 1
    data = json.loads((tmp_path / "summary.json").read_text())
    assert data["failed"] == ["build"] and data["gemm"]["rows"] == 2 and data["probe"] == {"unreadable": "not json"}
    out = capsys.readouterr().out
    assert "10.00 us" in out and "bf16 4.00x" in out and "failed: build" in out


# Peers


def test_without_a_device_every_peer_says_why(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert all(peer.available() for peer in all_peers(128).values())


def test_with_a_device_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("VLLM_LIB", raising=False)
    for module in ("humming", "gemlite", "bitsandbytes"):
        monkeypatch.setitem(sys.modules, module, None)
    reasons = {name: peer.available() for name, peer in all_peers(128).items()}
    assert reasons["bf16"] is reasons["fp16"] is reasons["tinygemm"] is None
    assert "VLLM_LIB" in reasons["marlin"] and "tinygemm" in reasons["torchao"] and "gemlite" in reasons["hqq"]
    for name, module in (("humming", "humming"), ("gemlite", "gemlite"), ("bnb nf4", "bitsandbytes")):
        assert reasons[name].startswith(f"{module}") and "does not import" in reasons[name]
    monkeypatch.setenv("VLLM_LIB", "/nowhere.so")
    assert reasons["marlin"] != all_peers(128)["marlin"].available() is not None


def test_shapes_that_a_peer_cannot_hold():
    peers = all_peers(128)
    assert peers["tinygemm"].refuses(8192, 8192, "4") is None and peers["marlin"].refuses(8192, 8192, "4") is None
    assert "K % 128" in peers["tinygemm"].refuses(8192, 4160, "4")
    assert "N % 64" in peers["marlin"].refuses(100, 4096, "4")


@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_of_a_peer_mean_what_they_say(bits):
    dense = torch.randn(16, 128)
    codes, scale = symmetric_codes(dense, bits, 32, torch.float16)
    values = symmetric_values(codes, scale, bits, 32)
    assert codes.dtype == torch.uint8 and int(codes.max()) < 1 << bits and scale.shape == (16, 4)
    inside = dense <= ((1 << (bits - 1)) - 1) * scale.float().repeat_interleave(32, 1)  # the top code is one below
    error = (dense - values).abs() / scale.float().repeat_interleave(32, 1)
    assert error[inside].max() <= 0.51 and error.max() <= 1.01


def test_words_of_gptq_and_scales_of_marlin():
    codes = torch.randint(0, 16, (64, 128), dtype=torch.uint8)
    words = installed_peers.gptq_words(codes, 4)
    assert words.shape == (16, 64) and words.dtype == torch.int32
    assert all((int(words[2, 5]) >> (4 * i)) & 15 == codes[5, 16 + i] for i in range(8))
    scale = torch.arange(128.0).view(64, 2)
    permuted = installed_peers.marlin_scales(scale)
    order = [i + 8 * j for i in range(8) for j in range(8)]
    assert torch.equal(permuted, scale.T[:, order])


def test_numbers_of_vllm_types():
    # Bit fields of csrc/core/scalar_type.hpp: exponent 8, mantissa 8, sign 1, bias 32, finite 1, NaN 8.
    assert installed_peers.vllm_unsigned(4, 8) == 1125899907892224
    assert installed_peers.vllm_unsigned(8, 128) >> 17 & (1 << 32) - 1 == 128


def test_an_operator_is_called_by_the_names_of_its_schema():
    op = torch.ops.aten.clamp.default  # (Tensor self, Scalar? min=None, Scalar? max=None)
    x = torch.tensor([-1.0, 3.0])
    given = installed_peers.by_name(op, {"self": x, "max": 2.0, "unknown to it": 1})
    assert given.tolist() == [-1.0, 2.0]
    with pytest.raises(TypeError, match="argument other"):
        installed_peers.by_name(torch.ops.aten.mul.Tensor, {"self": x})


def test_kernels_of_humming_are_asked_for_by_interval():
    text = installed_peers._intervals(
        lambda config, shape_m: {"block": 8 if shape_m <= 8 else 16}, None, (16, 1, 8, 64)
    )
    assert json.loads(text) == [[0, 8, {"block": 8}], [8, 64, {"block": 16}]]
    assert installed_peers._intervals(lambda config, shape_m: {"kind": object()}, None, (1,)) is None


# Commands


def test_the_dry_run_plans_and_tries_every_width(capsys):
    assert gemm.main(["--device", "cuda", "--dry-run", "--shapes", "8192x8192,llama-8b-token", "--peers", "bf16"]) == 0
    out = capsys.readouterr().out
    assert "8192x8192          packed 7" in out and "32 x " in out and "no figure above is a time" in out
    assert all(f"small packed {bits} M=3: right" in out for bits in range(1, 9)) and "wrong" not in out


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a CUDA device")
def test_without_a_device_only_the_dry_run_works(capsys):
    assert gemm.main(["--device", "cuda"]) == 2 and "--dry-run" in capsys.readouterr().err
    assert gemm.main(["--device", "cuda", "--peers", "nonsense"]) == 2
    with pytest.raises(SystemExit):
        gemm.main(["--device", "cpu", "--shapes", "llama-8b-token"])


def test_the_script_is_bash_and_wants_a_directory():
    script = ROOT / "benchmarks" / "run_gpu.sh"
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
    done = subprocess.run(["bash", script, "--dry-run"], capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "usage" in done.stderr
