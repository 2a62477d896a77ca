"""Fixtures of several files here."""

from tests.made.resumed import commit_at_once  # noqa: F401  (a fixture)
