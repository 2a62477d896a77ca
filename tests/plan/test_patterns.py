"""Expressions of a stranger's plan: they mean what Python's mean, and none of them can hang or fill the memory."""

import re
import sys
import time

import pytest

from mpq_kernels.errors import PlanError
from mpq_kernels.plan.foreign import read_foreign
from mpq_kernels.plan.patterns import MATCH_SECONDS, Clock, compile_pattern, why_no_pattern, why_too_many
from mpq_kernels.plan.plan import Plan
from mpq_kernels.plan.resolve import resolve
from tests.made.foreign import linears, write

NAMES = [spec.name for model in ("llama", "mixtral") for spec in linears(model)]
# Expressions that take a backtracking matcher forever on one of the names.
ENDLESS = (r"(?:(.*?)(?:[a-z]|\.)){16}[0-9][0-9]", r"(?:(?:(.*?)(?:[a-z]|\.)){4}){4}[0-9][0-9]")
PLAIN = (r"model\.layers\.(0|1)\..*", r".*\.(q|k)_proj", r".*experts\.\d{1,2}\.w[13]", r"(?!.*mlp).*", r"(?i)LM_HEAD",
         r"(?<!x)model.*(?:up|down)_proj$", r"(?P<a>.).*(?P=a).*", r".*?\bmlp\b.*", "lm_head", r"[^.]+",
         r"(?>model).*w1", r".*\.[a-z]{2}_proj", r"model\.layers\.[01]\..{3,40}")  # fmt: skip


@pytest.mark.parametrize("method", ["fullmatch", "match", "search"])
@pytest.mark.parametrize("text", PLAIN)
def test_plain_expressions_mean_what_they_mean_to_python(text, method):
    pattern, own = compile_pattern(text, "plan", Clock()), re.compile(text)
    found = [getattr(pattern, method)(name) for name in NAMES]
    assert found == [getattr(own, method)(name) is not None for name in NAMES] and any(found)


@pytest.mark.parametrize("text", ENDLESS)
def test_endless_expressions_are_given_up(text):
    plan = Plan.from_dict({"version": 1, "modules": {f"re:{text}": {"bits": 3}}})
    start = time.process_time()
    with pytest.raises(PlanError, match=r"modules\['re:.*took longer than 2 s"):
        resolve(plan, linears("mixtral"))
    assert time.process_time() - start < MATCH_SECONDS + 2


def test_many_slow_expressions_share_one_limit():
    """Each takes some milliseconds on a name, all of them on all names minutes."""
    rules = {rf"re:(?:(.*?)(?:[a-z]|\.)){{4}}[0-9][0-9]{{{i}}}|.*": {"bits": 3} for i in range(1, 999)}
    start = time.process_time()
    with pytest.raises(PlanError, match="took longer"):
        resolve(Plan.from_dict({"version": 1, "modules": rules}), linears("mixtral"))
    assert time.process_time() - start < MATCH_SECONDS + 2


@pytest.mark.parametrize(
    ("form", "content"),
    [
        ("gptqmodel", {"bits": 4, "group_size": 128, "dynamic": {ENDLESS[0]: {"bits": 8}}}),
        ("auto-round", {"quant_method": "auto-round", "bits": 4, "group_size": 128,
                        "extra_config": {ENDLESS[0]: {"bits": 8}}}),
        ("compressed-tensors", {"config_groups": {"g": {"targets": ["Linear"], "weights": {"num_bits": 4}}},
                                "ignore": [f"re:{ENDLESS[0]}"]}),
    ],
)  # fmt: skip
def test_foreign_plans_have_the_same_limit(form, content, tmp_path):
    path = write(tmp_path, "plan.json", content)
    with pytest.raises(PlanError, match=r"plan\.json: .*took longer than 2 s"):
        read_foreign(path, form, linears("mixtral"))


REFUSED = {
    "fuzzy": ("(?:foo){e<=2}", "outside of repeats"),
    "literal brace": ("a{", "outside of repeats"),
    "empty repeat": ("a{}", "outside of repeats"),
    "open repeat": ("a{,}", "outside of repeats"),
    "class in a set": ("[[:alpha:]]+", "outside of repeats"),
    "much memory": ("(?:a{1000}){1000}", "more than 100000"),
    "nested": ("(?:" * 90 + "a" + "){1,9}" * 90, "more than 100000"),
    "all characters": (r"(?i)[\x00-\U0010ffff]", "is ASCII"),
    "other characters": ("ü", "is ASCII"),
    "long": ("a" * 1001, "1001 characters"),
    "malformed": ("(", "not a regular expression"),
    "only of the other engine": (r"\p{L}", "not a regular expression"),
    "deep": ("(" * 450 + ")" * 450, "too much"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_expressions_are_refused_before_they_are_tried(case):
    text, words = REFUSED[case]
    before = sys.getrecursionlimit()  # a compiler of models may have raised it, and less is too deep then
    sys.setrecursionlimit(1000)
    try:
        with pytest.raises(PlanError, match=words):
            compile_pattern(text, "plan", Clock())
    finally:
        sys.setrecursionlimit(before)


def test_there_may_be_so_many():
    assert why_too_many(["a"] * 1000) is None and "1001 regexes" in why_too_many(["a"] * 1001)
    assert "characters together" in why_too_many(["a" * 1000] * 101)
    assert why_no_pattern(r"a\{1\}") is None  # an escaped brace is one
