"""`mpq plan methods`: the importance methods of the table, for people and programs."""

from __future__ import annotations

from ..options import JsonFlag
from ..output import print_json, print_table


def command(as_json: JsonFlag = False) -> None:
    """The importance methods: what they look at, what they cost, where they come from."""
    from dataclasses import asdict

    from ...allocate.methods import METHODS

    rows = [{key: value for key, value in asdict(m).items() if key != "run"} for m in METHODS.values()]
    if as_json:
        print_json({"methods": rows})
        return
    cells = [[m["name"], "yes" if m["needs_text"] else "no", m["cost"], m["summary"], m["source"]] for m in rows]
    print_table(None, ["<method", "<text", "<cost", "<loss", "<source"], cells)
