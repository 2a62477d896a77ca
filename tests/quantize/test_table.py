"""The table of quantizers: complete, and the only list of their names; documents that have one are compared with it."""

import re
from pathlib import Path

import pytest

from mpq_kernels.quantize import QUANTIZERS, Quantizer, suitable

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", QUANTIZERS)
def test_a_row_is_complete(name):
    row = QUANTIZERS[name]
    assert row.name == name and row.summary and all(row.exempt.values())
    assert (row.steps is None) == row.whole_model
    assert row.takes_calibration or not (row.needs_calibration or row.act_order)


def test_an_exemption_names_a_property():
    with pytest.raises(AssertionError, match="nearrest"):
        Quantizer("toy", "", None, exempt={"nearrest": "a slip"})


def test_messages_list_names_from_the_table():
    for suits in (lambda row: not row.needs_calibration, lambda row: not row.whole_model, lambda row: row.whole_model):
        names = [name for name, row in QUANTIZERS.items() if suits(row)]
        said = suitable(suits)
        assert said.replace(" or ", ", ").split(", ") == [repr(name) for name in names]
        assert said.count(" or ") == min(1, len(names) - 1)


def test_documents_list_every_quantizer():
    cli = (ROOT / "docs" / "cli.md").read_text()
    usages = {frozenset(names.split("|")) for names in re.findall(r"--quantizer ([a-z-]+(?:\|[a-z-]+)+)", cli)}
    text_free = {name for name, row in QUANTIZERS.items() if not row.needs_calibration}
    assert frozenset(QUANTIZERS) in usages and usages <= {frozenset(QUANTIZERS), frozenset(text_free)}
    assert set(QUANTIZERS) <= set(re.findall(r"`(?:--quantizer )?([a-z-]+)`", cli)), "each is explained by name"


def test_no_file_of_the_package_types_the_names_out():
    """A message or help text with several of the names would be a second table. Formats of other programs have the
    same names.
    """
    names = "|".join(QUANTIZERS)
    several = re.compile(rf"\b({names})\b(\W{{1,5}}| and | or )\b({names})\b")
    found = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in sorted((ROOT / "mpq_kernels").rglob("*.py"))
        if path.parent.name not in ("imports", "exports")
        for line in path.read_text().splitlines()
        if several.search(line)
    ]
    assert not found
