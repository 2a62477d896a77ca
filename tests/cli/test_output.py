"""Tables, progress and numbers, as terminals, pipes and NO_COLOR want them."""

import io
import sys

from mpq_kernels.cli import output


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_is_for_terminals(monkeypatch):
    for stream, hidden, shown in ((Terminal(), False, True), (Terminal(), True, False), (io.StringIO(), False, False)):
        monkeypatch.setattr(sys, "stderr", stream)
        with output.progress("packing", hidden) as report:
            assert (report is not None) == shown
            if report is not None:
                report(1, 2, "a[/b]")  # names are not markup
        assert ("packing" in stream.getvalue()) == shown


def test_no_color_is_respected(monkeypatch):
    stream = Terminal()
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    output.print_table("title", ["<name"], [["value"]])
    assert "value" in stream.getvalue()
    assert not any(f"\x1b[{code}" in stream.getvalue() for code in ("3", "9", "4"))


def test_counts_have_their_plural():
    assert [output.count(n, "file") for n in (0, 1, 2, 1000)] == ["0 files", "1 file", "2 files", "1,000 files"]
