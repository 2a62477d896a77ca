"""`mpq tune`: refused in words without a GPU; on one, what is stored and printed."""

import json

import pytest

from mpq_kernels.backends import triton
from mpq_kernels.backends.triton import configs, tune

ROWS = configs.TABLE["cuda"]


@pytest.fixture
def a_gpu(monkeypatch, tmp_path):
    """A GPU that takes no time: the configurations of the package's table win."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(triton, "why_unavailable", lambda: None)
    monkeypatch.setattr(tune, "tune_device", lambda: ("A GPU", None))
    monkeypatch.setattr(tune, "tune", lambda measure, say: say("16 tokens: measured") or ROWS)
    yield
    configs.stored.cache_clear()


def test_without_a_gpu_it_says_why(run, monkeypatch):
    monkeypatch.setattr(triton, "why_unavailable", lambda: "no CUDA or ROCm device")
    assert run("tune", code=1).err == (
        "mpq: nothing to tune, the Triton backend does not work here: no CUDA or ROCm device\n"
    )


def test_the_fastest_are_stored_and_named(run, a_gpu):
    done = run("tune")
    assert done.out == f"stored in {configs.cache_file()}\n" and "16 tokens: measured" in done.err
    assert json.loads(configs.cache_file().read_text()) and configs.read(configs.cache_file())["A GPU"] == ROWS
    assert run("tune", "--quiet").err == ""


def test_json_is_all_of_stdout(run, a_gpu):
    done = run("tune", "--json")
    data = done.json()
    assert (data["device"], data["file"], done.err) == ("A GPU", str(configs.cache_file()), "")
    assert [row["tokens"] for row in data["configurations"]] == list(configs.TOKEN_CLASSES)
    assert [row["block_m"] for row in data["configurations"]] == [row.block_m for row in ROWS]
