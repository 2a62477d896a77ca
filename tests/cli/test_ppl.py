"""`mpq ppl`: the perplexity of the library, its error bar and stride, and what is refused."""

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

import mpq_kernels as mpq
from mpq_kernels.evaluate.perplexity import perplexity


@pytest.mark.parametrize("name", ["dense", "mixed"])
def test_ppl_is_perplexity(run, name):
    data = run("ppl", name, "--text", "text.txt", "--window", 64, "--max-tokens", 500, "--json").json()
    if name == "dense":
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()
    else:
        model = mpq.load(name, dtype=torch.float32)
    text = Path("text.txt").read_text(encoding="utf-8")
    wanted = perplexity(model, AutoTokenizer.from_pretrained(name), text, window=64, max_tokens=500)
    assert data["ppl"] == pytest.approx(wanted.ppl, rel=1e-6)
    assert (data["tokens"], data["predicted"], data["dtype"]) == (448, 7 * 63, "torch.float32")
    line = run("ppl", name, "--text", "text.txt", "--window", 64, "--max-tokens", 500).out
    assert line.startswith(f"perplexity {wanted.ppl:.3f}"[:14])


def test_ppl_refusals(run, tmp_path):
    (tmp_path / "short.txt").write_text("a few words")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 " * 100)
    for file, reason in (("short.txt", "less than one window"), ("latin.txt", "UTF-8"), ("none.txt", "No such file")):
        refused = run("ppl", "packed", "--text", tmp_path / file, code=1)
        assert reason in refused.err
        assert refused.out == ""


def test_ppl_has_an_error_bar_and_a_stride(run):
    words = ["ppl", "dense", "--text", "text.txt", "--max-tokens", "512", "--window", "128", "--json"]
    plain, strided = run(*words).json(), run(*words, "--stride", "64").json()
    assert 0 < plain["stderr"] < plain["ppl"] and plain["predicted"] == 4 * 127
    assert strided["predicted"] == 127 + 6 * 64
    assert "is not in 1..128" in run(*words, "--stride", "300", code=1).err


def test_help_tells_windows_from_strides(run):
    text = " ".join(run("ppl", "--help").out.replace("\u2502", " ").split())
    assert "side by side unless --stride makes them overlap" in text and "do not overlap" not in text
