"""benchmarks/models/compiled.py: right parts measured, right arithmetic."""

import json

import pytest

from benchmarks.models import compiled

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 320,
}


def test_compiled_measures_and_writes(tmp_path, monkeypatch, capsys, without_inductor):
    monkeypatch.setattr(compiled, "LLAMA_1B", compiled.LLAMA_1B | SMALL | {"num_key_value_heads": 1})
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # restored afterwards
    words = ["--models", "llama-1b", "--tokens", "3", "--rounds", "2", "--prompt", "4", "--cache", "256"]
    assert compiled.main([*words, "--json", str(tmp_path / "out.json")]) == 0
    data = json.loads((tmp_path / "out.json").read_text())
    (row,) = data["results"]
    assert (row["model"], data["tokens"], data["cache"], data["rounds"]) == ("llama-1b", 3, 256, 2)
    for name in ("eager", "compiled"):
        best = row["ms_per_token"][name]
        assert best == pytest.approx(1e3 * min(row["rounds_seconds"][name])) and len(row["rounds_seconds"][name]) == 2
        assert row["ms_not_products"][name] == pytest.approx(best - row["ms_per_token"]["products"])
        assert row["first_token_ms"][name] > 0
    assert 0 < row["ms_per_token"]["products"] < row["ms_per_token"]["eager"]
    assert row["compile_seconds"] > row["compile_seconds_again"] * 0.1 > 0
    assert "llama-1b" in capsys.readouterr().out


def test_products_are_all_packed_ones(monkeypatch, tmp_path):
    monkeypatch.setattr(compiled, "LLAMA_1B", compiled.LLAMA_1B | SMALL | {"num_key_value_heads": 1})
    model = compiled.shape_of_1b(tmp_path, 4)
    called = []
    for name, layer in compiled.packed_modules(model):
        layer._linear = lambda x, *rest, name=name: called.append((name.rpartition(".")[2], x.shape[0]))
    compiled.products(model)()
    names = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj", "lm_head")
    assert sorted(called) == sorted((name, 1) for name in names)
