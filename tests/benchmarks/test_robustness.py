"""A small sample of every kind of the robustness campaign; the whole runs by `python -m benchmarks.robustness`."""

import json
import os
import random
import signal
import time

import pytest
import torch

from benchmarks.robustness import __main__ as command
from benchmarks.robustness import mutate
from benchmarks.robustness.campaign import Kind, Tally, campaign, run_cases
from benchmarks.robustness.kinds import KINDS
from mpq_kernels.errors import FormatError

SEED = 52  # with which sixteen cases end in all ways
SAMPLES = {"models": 20, "faults": 6, "texts": 30, "operators": 60, "numbers": 60, "values": 60}  # the others: 200


@pytest.fixture
def threadless():
    """A forked process cannot use the threads that torch had."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
@pytest.mark.parametrize("name", KINDS)
def test_a_sample_of_each_kind_ends_well(name, tmp_path, monkeypatch, threadless):
    kind, count = KINDS[name], SAMPLES.get(name, 200)
    (tmp_path / "cases").mkdir()
    monkeypatch.chdir(tmp_path / "cases")
    tally = run_cases(name, kind, kind.prepare(tmp_path), 1, range(count), lambda case: None)
    assert not tally.failed, tally.failures
    assert tally.cases == sum(tally.outcomes.values()) == count
    assert any(what.islower() for what in tally.outcomes)  # a right result: not all mutations are refused


def end(how):
    """A case that ends as `how` says."""
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "memory":
        bytearray(2**32)
    if how == "slow":
        while True:
            time.sleep(0)
    if how == "raw":
        raise ValueError("raw")
    if how == "wrong":
        raise AssertionError
    if how == "typed":
        raise FormatError("typed")
    if how == "hidden":
        try:
            bytearray(2**32)
        except MemoryError as error:
            raise FormatError("typed") from error
    return "right"


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_every_way_to_end_badly_is_counted(tmp_path, threadless):
    ways = ("right", "killed", "typed", "memory", "raw", "wrong", "slow", "hidden")

    def prepare(folder):
        return lambda chance: end(ways[int(chance.random() * 1e9) % len(ways)])

    kind = Kind("made", prepare, 16, chunk=16, seconds=0.05, bytes=200 * 2**20)
    wanted = [ways[int(random.Random(f"made {SEED} {case}").random() * 1e9) % len(ways)] for case in range(16)]
    assert set(wanted) == set(ways)
    (step,) = campaign("made", kind, SEED, 0, 16, 1, tmp_path)
    tally = step[1]
    assert step[0] == tally.cases == 16
    names = {"right": "right", "killed": "FAILURE the process ended with status 9", "typed": "FormatError",
             "memory": "FAILURE MemoryError", "raw": "FAILURE ValueError", "wrong": "FAILURE AssertionError",
             "slow": "FAILURE TooSlow", "hidden": "FAILURE out of memory"}  # fmt: skip
    assert tally.outcomes == {names[way]: wanted.count(way) for way in set(wanted)}
    assert tally.failed == sum(way not in ("right", "typed") for way in wanted)
    assert tally.slowest[0] >= 0.05


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_a_campaign_is_gone_on_with(tmp_path, threadless, monkeypatch, capsys):
    monkeypatch.setitem(KINDS, "made", Kind("made", lambda folder: lambda chance: f"word{chance.randrange(3)}", 90, 30))
    monkeypatch.setattr(command, "facts", lambda device: {"date": "today"})
    out = tmp_path / "results.json"
    for cases in (40, 90, 90):
        words = ["robustness", "made", "--cases", str(cases), "-o", str(out), "--work", str(tmp_path)]
        monkeypatch.setattr("sys.argv", words)
        assert command.main() == 0
        held = json.loads(out.read_text())["made"]
        assert held["cases"] == cases and sum(held["outcomes"].values()) == cases
    wanted = Tally()
    for case in range(90):
        wanted.outcomes[f"word{random.Random(f'made 0 {case}').randrange(3)}"] += 1
    assert held["outcomes"] == wanted.outcomes and held["limits"] == {"seconds": 5.0, "bytes": 500 * 2**20}
    assert "90 cases" in capsys.readouterr().out


def test_mutations_are_decided_by_the_seed_alone():
    value = {"a": [1, 2.5, "x", None, True], "b": {"c": {}}}
    one, two = ([mutate.mutate_json(random.Random(case), value) for case in range(300)] for _ in range(2))
    assert one == two and len(set(one)) > 200 and value == {"a": [1, 2.5, "x", None, True], "b": {"c": {}}}
