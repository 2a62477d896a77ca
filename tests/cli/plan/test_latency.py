"""`mpq plan latency`: a table that `allocate` takes, and what is refused."""

from mpq_kernels.allocate import LatencyTable


def test_latency_measures_a_table_that_allocate_takes(run):
    words = ["--bits", "3,4,16", "--group-sizes", "32,64", "--rounds", "2", "--seconds", "0.001", "-o", "us.json"]
    found = run("plan", "latency", "dense/config.json", *words, "--json").json()

    shapes = {(entry["out_features"], entry["in_features"]) for entry in found["entries"]}
    assert len(found["entries"]) == 5 * len(shapes) and all(entry["us"] > 0 for entry in found["entries"])
    assert "1 token" in found["device"] and found["spread"] >= 0
    table = LatencyTable.from_file("us.json")
    assert {(bits, size) for *_, bits, size in table.us} == {(3, 32), (3, 64), (4, 32), (4, 64), (16, -1)}
    limit = sum(table.us.values()) * 100
    choices = ["--bits", "3,4,16", "--group-sizes", "32,64", "--latency", "us.json"]
    got = run("plan", "allocate", "dense", "--budget", f"{limit}us", "--method", "frobenius", *choices, "-o", "l.json",
              "--quantizer", "rtn", "--json").json()  # fmt: skip
    assert 0 < got["us"] <= limit and got["loss"] == 0  # so much time is given that every weight is kept


def test_latency_refuses(run):
    assert "device='moon'" in run("plan", "latency", "dense", "--device", "moon", "-o", "x.json", code=1).err
    assert (
        "none of the group sizes [7]"
        in run("plan", "latency", "dense", "--group-sizes", "7", "-o", "x.json", code=1).err
    )
