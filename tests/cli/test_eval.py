"""`mpq eval` without the harness; with it, tests/evaluate/test_lm_eval.py."""

from mpq_kernels.cli import eval as command


def test_a_missing_harness_is_said_in_words(run, monkeypatch):
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    refused = run("eval", "mixed", "--tasks", "piqa", code=1)
    assert refused.err == "mpq: mpq eval needs lm-evaluation-harness: pip install 'lm_eval>=0.4.9'\n"


def test_tasks_must_be_named(run, monkeypatch):
    monkeypatch.setattr(command, "find_spec", lambda name: True)
    assert "--tasks names none" in run.misuse("eval", "mixed", "--tasks", " ,")
    run.misuse("eval", "mixed")
