"""Fixtures of several files here."""

from tests.made.resumed import commit_at_once, llama  # noqa: F401  (fixtures)
