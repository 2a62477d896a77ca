"""`gemm.py --device cuda` and run_gpu.sh without a GPU: files, resuming, the summary, peers, refusals, the dry run."""

import argparse
import json
import re
import shutil
import subprocess
import sys
import time

import pytest
import torch

from benchmarks.gpu import command, summary
from benchmarks.gpu.measure import Broken
from benchmarks.layers import gemm, plot, rows, timing
from benchmarks.layers.rows import set_ratios
from benchmarks.peers import installed
from benchmarks.peers.installed import all_peers
from benchmarks.peers.torch import symmetric_codes, symmetric_values
from tests.made.layers import CPU, ROOT, bench, row, small_shapes, unit  # noqa: F401  (a fixture)

# Files


@pytest.fixture
def session(tmp_path, monkeypatch):
    """Makes Sessions over the same three units and files; words change the arguments."""
    ceilings = {"copy_gbytes_per_s": 4.0, "read_gbytes_per_s": 3.0, "bf16_tflops": 0.5}
    monkeypatch.setattr(command, "cuda_ceilings", lambda device: ceilings)
    units = [unit(width=w, tokens=(1,)) for w in "432"]

    def make(bench_words=None, **words):
        args = {"device": CPU, "json": tmp_path / "out" / "gemm.json", "plot": None, "resume": False, "group": 64}
        args |= {"total_mb": 0.05, "seconds": 0.001, "budget_s": 60.0, "unit_s": 60.0} | words
        return command.Session(
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
    right = command.write_json
    monkeypatch.setattr(command, "write_json", lambda *words: (right(*words), sizes.append(len(words[2]))))
    one.run()
    assert sizes == [0, 1, 2, 3, 3] and not list(one.args.json.parent.glob("*.part"))


def test_a_lost_context_starts_the_program_anew(session, monkeypatch):
    started = []
    monkeypatch.setattr(command.os, "execv", lambda path, words: started.append(words))
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
    assert [plot.style(name) for name in ("packed 4", "packed 4 triton", "bf16")] == ["cuda", "triton", "peer"]
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


def test_the_summary_compares_triton_with_cuda_and_gemlite(tmp_path, capsys):
    (tmp_path / "steps.tsv").write_text("gemm\tpassed\t3\n")
    table = [row("packed 4", us, tokens=m, width="4", backend="cuda") for m, us in ((1, 6.0), (16, 9.0), (64, 9.0))]
    table += [
        row("packed 4 triton", us, tokens=m, width="4", backend="triton") for m, us in ((1, 8.0), (16, 10.0), (64, 9.0))
    ]
    table += [row("gemlite 4", 20.0, tokens=16, width="4"), row("packed 3 triton", None, width="3", backend="triton")]
    table[-1].reason = "wrong by 1"
    set_ratios(table)
    rows.write_json(tmp_path / "gemm.json", {"done": [], "left_out": []}, table)
    assert summary.main(tmp_path, tmp_path / "steps.tsv") == 0
    found = json.loads((tmp_path / "summary.json").read_text())["gemm"]["triton"]
    assert found == [
        {"width": "4", "tokens": "M <= 16", "over": "cuda", "least": 0.75, "median": pytest.approx(0.825), "cells": 2},
        {"width": "4", "tokens": "M <= 16", "over": "gemlite", "least": 2.0, "median": 2.0, "cells": 1},
        {"width": "4", "tokens": "M >= 64", "over": "cuda", "least": 1.0, "median": 1.0, "cells": 1},
    ]
    out = capsys.readouterr().out
    assert "packed 4      triton, M <= 16   : 0.82x cuda (least 0.75x of 2)" in out and "wrong by 1" in out
    assert "packed 4 triton" not in out  # beside cuda's the ratios are enough
    alone = [r for r in table if r.backend == "triton"]
    rows.write_json(tmp_path / "gemm.json", {"done": [], "left_out": []}, alone)
    summary.main(tmp_path, tmp_path / "steps.tsv")
    assert "packed 4 triton " in capsys.readouterr().out


def test_backends_that_do_not_work_are_left_out_unless_none_does():
    assert command.working({"cuda": "no _cuda.so", "triton": None}) == ("triton",)
    assert command.working({"cuda": None, "triton": None}) == ("cuda", "triton")
    assert command.working({"cuda": "no _cuda.so", "triton": "not installed"}) == ("cuda", "triton")


# Peers


def test_without_a_device_every_peer_says_why(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert all(peer.why_unavailable() for peer in all_peers(128).values())


def test_with_a_device_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("VLLM_LIB", raising=False)
    for module in ("humming", "gemlite", "bitsandbytes"):
        monkeypatch.setitem(sys.modules, module, None)
    reasons = {name: peer.why_unavailable() for name, peer in all_peers(128).items()}
    assert reasons["bf16"] is reasons["fp16"] is reasons["tinygemm"] is None
    assert "VLLM_LIB" in reasons["marlin"] and "tinygemm" in reasons["torchao"] and "gemlite" in reasons["hqq"]
    for name, module in (("humming", "humming"), ("gemlite", "gemlite"), ("bnb nf4", "bitsandbytes")):
        assert reasons[name].startswith(f"{module}") and "does not import" in reasons[name]
    monkeypatch.setenv("VLLM_LIB", "/nowhere.so")
    assert reasons["marlin"] != all_peers(128)["marlin"].why_unavailable() is not None


def test_shapes_that_a_peer_cannot_hold():
    peers = all_peers(128)
    assert (
        peers["tinygemm"].why_not_layer(8192, 8192, "4") is None
        and peers["marlin"].why_not_layer(8192, 8192, "4") is None
    )
    assert "K % 128" in peers["tinygemm"].why_not_layer(8192, 4160, "4")
    assert "N % 64" in peers["marlin"].why_not_layer(100, 4096, "4")


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
    words = installed.gptq_words(codes, 4)
    assert words.shape == (16, 64) and words.dtype == torch.int32
    assert all((int(words[2, 5]) >> (4 * i)) & 15 == codes[5, 16 + i] for i in range(8))
    scale = torch.arange(128.0).view(64, 2)
    permuted = installed.marlin_scales(scale)
    order = [i + 8 * j for i in range(8) for j in range(8)]
    assert torch.equal(permuted, scale.T[:, order])


def test_numbers_of_vllm_types():
    # Bit fields of csrc/core/scalar_type.hpp: exponent 8, mantissa 8, sign 1, bias 32, finite 1, NaN 8.
    assert installed.vllm_unsigned(4, 8) == 1125899907892224
    assert installed.vllm_unsigned(8, 128) >> 17 & (1 << 32) - 1 == 128


def test_an_operator_is_called_by_the_names_of_its_schema():
    op = torch.ops.aten.clamp.default  # (Tensor self, Scalar? min=None, Scalar? max=None)
    x = torch.tensor([-1.0, 3.0])
    given = installed.by_name(op, {"self": x, "max": 2.0, "unknown to it": 1})
    assert given.tolist() == [-1.0, 2.0]
    with pytest.raises(TypeError, match="argument other"):
        installed.by_name(torch.ops.aten.mul.Tensor, {"self": x})


def test_kernels_of_humming_are_asked_for_by_interval():
    text = installed._intervals(lambda config, shape_m: {"block": 8 if shape_m <= 8 else 16}, None, (16, 1, 8, 64))
    assert json.loads(text) == [[0, 8, {"block": 8}], [8, 64, {"block": 16}]]
    assert installed._intervals(lambda config, shape_m: {"kind": object()}, None, (1,)) is None


# Commands


def test_the_dry_run_plans_and_tries_every_width(capsys):
    assert gemm.main(["--device", "cuda", "--dry-run", "--shapes", "8192x8192,llama-8b-token", "--peers", "bf16"]) == 0
    out = capsys.readouterr().out
    assert (
        "8192x8192          packed 7" in out
        and "8192x8192          packed 7 triton" in out
        and "32 x " in out
        and "no figure above is a time" in out
    )
    assert all(f"small packed {bits} M=3: right" in out for bits in range(1, 9)) and "wrong" not in out


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a CUDA device")
def test_without_a_device_only_the_dry_run_works(capsys):
    assert gemm.main(["--device", "cuda"]) == 2 and "--dry-run" in capsys.readouterr().err
    assert gemm.main(["--device", "cuda", "--peers", "nonsense"]) == 2
    assert gemm.main(["--device", "cuda", "--backend", "cuda,nonsense"]) == 2
    assert "no backend nonsense; there are cuda, triton" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        gemm.main(["--device", "cpu", "--shapes", "llama-8b-token"])


def test_the_script_is_bash_and_wants_a_directory():
    script = ROOT / "benchmarks" / "run_gpu.sh"
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
    done = subprocess.run(["bash", script], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "usage" in done.stderr


def test_the_script_shows_its_steps_and_misses_no_file(tmp_path):
    """In a copy of the tree of names, from which one is taken away."""
    script = ROOT / "benchmarks" / "run_gpu.sh"
    done = subprocess.run(["bash", script, "--dry-run"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    lines = done.stdout.splitlines()
    names = [line.partition(":")[0] for line in lines]
    assert names.index("build") < names.index("first_contact") < names.index("gpu_tests") < names.index("gemm")
    assert names[-3:-1] == ["alone_tests", "summary"] and "missing" not in done.stdout
    # What the plan has, the script runs, and the other way round.
    text = script.read_text()
    run = set(re.findall(r"(?:^|\s)step ([a-z_]+) ", re.sub(r"#.*", "", text))) | {"summary"}
    only_dry = {"first_contact_compiles", "imports", "plan", "cases_on_cpu", "gpu_tests_collect"}
    assert set(names[:-1]) == run - only_dry
    limits = [int(line.split()[3]) for line in lines if ": at most" in line and not line.startswith("all")]
    assert sum(limits) <= 530 - 30 and 530 < 9 * 60  # gemm has half a minute if every other step takes all its time
    (tmp_path / "benchmarks").mkdir()
    shutil.copy(script, tmp_path / "benchmarks")
    done = subprocess.run(["bash", tmp_path / "benchmarks" / "run_gpu.sh", "--dry-run"], capture_output=True, text=True)
    assert done.returncode == 1 and "missing: benchmarks/gpu/first_contact.cu" in done.stdout
