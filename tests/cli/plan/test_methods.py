"""`mpq plan methods`: the table, with sources."""


def test_methods_are_listed_with_their_sources(run):
    rows = {row["name"]: row for row in run("plan", "methods", "--json").json()["methods"]}
    assert rows["zd"]["needs_text"] is False and rows["fisher"]["needs_text"] is True
    assert all(row["source"].startswith("https://") for row in rows.values())
    assert "2406.17415" in run("plan", "methods").out
