"""`mpq plan uniform`: the plan of the library, on stdout and in a file."""

import mpq_kernels as mpq


def test_plan_uniform_prints_and_writes_the_same(run, tmp_path):
    words = ["plan", "uniform", "dense", "--bits", 3, "--group-size", 32, "--symmetric", "--lm-head", 6]
    printed = run(*words)
    run(*words, "-o", tmp_path / "plan.json")
    assert (tmp_path / "plan.json").read_text() == printed.out
    wanted = mpq.Plan.uniform("dense", bits=3, group_size=32, symmetric=True, lm_head=6)
    assert mpq.Plan.from_file(tmp_path / "plan.json") == wanted
