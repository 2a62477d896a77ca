"""`mpq plan uniform`: the plan of the library, on stdout and in a file."""

import mpq_kernels as mpq
from tests.made.multimodal import tiny_multimodal


def test_plan_uniform_prints_and_writes_the_same(run, tmp_path):
    words = ["plan", "uniform", "dense", "--bits", 3, "--group-size", 32, "--symmetric", "--lm-head", 6]
    printed = run(*words)
    run(*words, "-o", tmp_path / "plan.json")
    assert (tmp_path / "plan.json").read_text() == printed.out
    wanted = mpq.Plan.uniform("dense", bits=3, group_size=32, symmetric=True, lm_head=6)
    assert mpq.Plan.from_file(tmp_path / "plan.json") == wanted


def test_towers_are_kept_unless_asked_for(run, tmp_path):
    source = tiny_multimodal("qwen3_vl", tmp_path / "vl")
    words = ["--bits", 4, "--group-size", 32]
    kept = mpq.Plan.from_dict(run("plan", "uniform", source, *words).json())
    asked = mpq.Plan.from_dict(run("plan", "uniform", source, *words, "--towers", 6).json())
    tower = "model.visual.blocks.0.mlp.linear_fc1"
    assert (kept.modules[tower].bits, asked.modules[tower].bits) == (16, 6)
    for option in ([], ["--towers", 6]):
        sizes = run("pack", source, tmp_path / "x", *words, *option, "--dry-run", "--json").json()
        assert (tower in sizes["kept"]) == (not option)
    assert "--towers goes with --bits" in run.misuse("pack", source, "out", "--plan", "plan.json", "--towers", 4)
