"""`mpq inspect`: what a packed directory holds, adding up."""

from pathlib import Path

import pytest
from safetensors import safe_open


@pytest.mark.parametrize("name", ["packed", "mixed"])
def test_inspect_adds_up(run, name):
    data = run("inspect", name, "--json").json()
    purposes = ("codes", "scales", "zeros", "metadata", "padding")
    for part in [module["bytes"] for module in data["modules"]] + [data["total"]]:
        assert sum(part[p] for p in purposes) == part["total"]
        assert part["bpw"] == pytest.approx(8 * part["total"] / part["weights"])
    assert sum(module["bytes"]["total"] for module in data["modules"]) == data["total"]["total"]
    assert data["files"] == {path.name: path.stat().st_size for path in Path(name).iterdir()}
    with safe_open(Path(name) / "model.safetensors", framework="pt") as file:
        held = sum(file.get_tensor(key).nbytes for key in file.keys())  # noqa: SIM118
    assert held == data["total"]["total"] + data["total"]["bias"] + data["total"]["kept"]
    text = run("inspect", name).out
    assert all(module["name"] in text for module in data["modules"])
    assert "plan: 16 bits" in text
