"""benchmarks/gpu/first_contact: what is made of a device's numbers. All numbers here are made up, none is measured."""

import json
import shutil
import subprocess

import pytest

from benchmarks.gpu import first_contact
from benchmarks.gpu.model.machines import GRAPH_NODE_US, LATENCY, MACHINES
from mpq_kernels.format import reference

CLOCK = 1.5e9


def chain(shared_bytes, overlap, node_us):
    """Rows of two spins with a known step between kernels."""
    return [
        {"shared_bytes": shared_bytes, "overlap": overlap, "spin_cycles": spin, "us": node_us + spin / CLOCK * 1e6}
        for spin in (0, 10_000)
    ]


def rings(bandwidth, latency_us, multiprocessors=100):
    """Rates of a memory with a known bandwidth and latency; bulk copies a little faster."""
    rows = []
    for kb in (4, 8, 16, 32, 64, 128):
        rate = min(bandwidth, multiprocessors * 1024 * kb / (latency_us * 1e-6)) / 1e9
        rows.append({"kb": kb, "warps": 8, "piece": 512, "depth": 1, "lanes_gbps": 0.9 * rate, "bulk_gbps": rate})
    return rows


def tensor(cycles, subnormal=False, exact=True, warps=16):
    return {"warps": warps, "subnormal": subnormal, "cycles": cycles, "exact": exact}


def made_up(**changes):
    """Every part that first_contact.cu prints."""
    raw = {
        "device": "NVIDIA H200", "capability": 90, "multiprocessors": 100, "l2_bytes": 50_000_000,
        "shared_bytes": 227 * 1024, "clock_hz": CLOCK,
        "chain": [*chain(1024, False, 2.0), *chain(96 * 1024, False, 1.5), *chain(96 * 1024, True, 0.5)],
        "copies": rings(4e12, 0.8), "l2_gbps": 5000, "shared_rate": 125.0, "reads": [{"mb": 8, "us": 3.0}],
        "pipes": {"int": 2.1, "imad": 2.2, "fma": 1.1, "half": 2.3, "special": 8.4},
        "hmma": [tensor(9.0, warps=4), tensor(8.2), tensor(8.2, subnormal=True)],
        "cycles": {"shared": 29.0, "constant": 38.0, "special": 18.0, "l2": 270.0, "atomic": 650.0,
                   "store_and_fence": 900.0, "fence": 300.0, "shuffle": 23.0, "matrix": 33.0,
                   "barrier_of_8_warps": 25.0, "dram": 700.0},
        "complete": True,
    }  # fmt: skip
    return raw | changes


def values(raw, machine="h200"):
    found = first_contact.constants(raw, MACHINES[machine] if machine else None)
    return {c.name: c for c in found}


def test_every_number_finds_its_constant():
    found = values(made_up())
    measured = {name: c.measured for name, c in found.items()}
    assert measured["clock"] == CLOCK and measured["multiprocessors"] == 100 and measured["shared_rate"] == 125
    assert measured["l2_bandwidth"] == 5e12 and measured["pipes.tensor"] == 8.2 and measured["pipes.imad"] == 2.2
    # The model's fence waits for stores that are on their way.
    assert measured["latency.fence"] == 900 and measured["latency.barrier"] == 25 and measured["latency.dram"] == 700
    assert found["latency.l2"].present == LATENCY["l2"] and found["latency.l2"].ratio == 270 / LATENCY["l2"]
    assert found["GRAPH_NODE_US"].present == GRAPH_NODE_US and found["clock"].present == MACHINES["h200"].clock
    names = {f"pipes.{n}" for n in ("int", "imad", "fma", "half", "special", "tensor")}
    names |= {f"latency.{n}" for n in ("shared", "matrix", "constant", "special", "shuffle", "l2", "dram", "atomic",
                                       "fence", "barrier")}  # fmt: skip
    assert names <= set(found) and set(found) - names == {
        "GRAPH_NODE_US", "multiprocessors", "clock", "shared_bytes", "bandwidth", "l2_bandwidth", "shared_rate",
    }  # fmt: skip


def test_the_step_between_kernels_is_without_their_own_time():
    raw = made_up()
    assert first_contact.node_us(raw, overlap=False) == pytest.approx(1.5)
    assert first_contact.node_us(raw, overlap=True) == pytest.approx(0.5)
    assert first_contact.node_us(made_up(chain=[]), overlap=False) is None


@pytest.mark.parametrize(("bandwidth", "latency_us"), [(4e12, 0.8), (1e12, 0.6), (3e12, 1.2)])
def test_bandwidth_and_latency_are_found_again(bandwidth, latency_us):
    most, cycles = first_contact.copies_fit(made_up(copies=rings(bandwidth, latency_us)))
    assert most == pytest.approx(bandwidth) and cycles == pytest.approx(latency_us * 1e-6 * CLOCK)


def test_a_device_without_bulk_copies():
    rows = [row | {"bulk_gbps": 0} for row in rings(4e12, 0.8)]
    assert first_contact.copies_fit(made_up(copies=rows))[0] == pytest.approx(3.6e12)
    nothing = [row | {"lanes_gbps": 0} for row in rows]
    assert first_contact.copies_fit(made_up(copies=nothing)) is None
    assert "bandwidth" not in values(made_up(copies=nothing))


def test_what_is_missing_is_left_out():
    assert first_contact.constants({}, None) == []
    found = values({"device": "x", "multiprocessors": 3, "cycles": {"l2": 200.0}}, None)
    assert set(found) == {"multiprocessors", "latency.l2"} and found["latency.l2"].ratio is None


@pytest.mark.parametrize(
    ("name", "machine"),
    [("NVIDIA H200", "h200"), ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA GeForce RTX 4090", "rtx4090"), ("x", None)],
)
def test_machines_are_known_by_name(name, machine):
    assert first_contact.machine_of({"device": name}) == machine


def test_doubts():
    assert first_contact.doubts(made_up()) == [] == first_contact.doubts({})
    slow = [tensor(8.0), tensor(16.0, subnormal=True, exact=False)]
    late = [*chain(1024, False, 1.0), *chain(1024, True, 1.1)]
    found = first_contact.doubts(made_up(hmma=slow, chain=late))
    assert found == [
        "products of subnormal operands are not exact", "products of subnormal operands take 2.00 times as long",
        "programmatic overlap makes the step between kernels no shorter",
    ]  # fmt: skip


def test_the_report_is_json_and_short_lines(tmp_path):
    products = [{"bits": "4", "tokens": 1, "us": 11.5, "of_floor": 0.7, "reason": None}]
    made = first_contact.report(made_up(), products, {"one-hot": "no device"})
    first_contact.write(tmp_path / "a.json", made)
    back = json.loads((tmp_path / "a.json").read_text())
    assert back["constants"]["latency.dram"]["measured"] == 700 and back["complete"] and back["machine"] == "h200"
    assert back["loaded_latency_cycles"] == pytest.approx(0.8e-6 * CLOCK) and back["raw"]["reads"][0]["us"] == 3.0
    text = "\n".join(first_contact.lines(made))
    assert "4 bits, M=1: 11.50 us" in text and "one-hot: no device" in text and "GRAPH_NODE_US" in text


def program(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_lines_that_came_before_an_end_are_kept(tmp_path):
    dies = program(tmp_path / "dies", """echo '{"clock_hz": 1}'; echo '{"half of'; echo out of luck >&2; exit 3""")
    text, reason = first_contact.device_lines(dies, 10)
    assert first_contact.parsed(text) == {"clock_hz": 1} and reason == "ended with 3: out of luck"
    hangs = program(tmp_path / "hangs", """echo '{"clock_hz": 2}'; exec sleep 60""")
    text, reason = first_contact.device_lines(hangs, 0.5)
    assert first_contact.parsed(text) == {"clock_hz": 2} and "stopped after" in reason


def test_the_source_prints_what_is_read():
    """Names of parts and of their fields, so that a change of one side alone is seen."""
    source = first_contact.SOURCE.read_text().replace('\\"', '"')
    for key, value in made_up().items():
        assert f'"{key}"' in source
        inner = value[0] if isinstance(value, list) else value if isinstance(value, dict) else {}
        assert all(f'"{name}"' in source for name in inner)


def test_one_hot_tokens_find_a_wrong_width(monkeypatch):
    assert first_contact.wrong_widths("cpu") == []
    right = reference.dequantize
    monkeypatch.setattr(reference, "dequantize", lambda w: right(w) + (w.layout.segments[0].bits == 3))
    assert {text[:6] for text in first_contact.wrong_widths("cpu")} == {"3 bits"}


def test_a_dry_run_says_what_it_would_do(monkeypatch, capsys):
    monkeypatch.setenv("PATH", "/nowhere")
    assert first_contact.dry_run() == 0
    out = capsys.readouterr().out
    assert "sm_90a: no nvcc on the PATH" in out and "one-hot: at most 15 s" in out


def test_the_parts_fit_two_minutes():
    assert first_contact.BUDGET_S <= 120 and sum(first_contact.BUDGETS.values()) - 45 <= first_contact.BUDGET_S


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on the PATH")
@pytest.mark.parametrize("arch", first_contact.ARCHES)
def test_it_compiles(tmp_path, arch):
    """Without code for a device, which takes three times as long: errors of the language are found all the same."""
    command = [
        "nvcc",
        "-std=c++17",
        "-Werror",
        "all-warnings",
        "-arch",
        f"compute_{arch}",
        "-ptx",
        first_contact.SOURCE,
    ]
    command += ["-Wno-deprecated-gpu-targets", "-o", tmp_path / "out.ptx"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert ("cp.async.bulk" in (tmp_path / "out.ptx").read_text()) == (arch == "90a")
