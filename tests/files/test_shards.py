"""Files that change after they were checked: what is mapped stays, and what was cut is not read."""

import os

import pytest
import torch
from safetensors.torch import save_file

from mpq_kernels.errors import CheckpointError
from mpq_kernels.files.shards import TensorFiles


@pytest.fixture
def opened(tmp_path):
    save_file({"a": torch.arange(5000.0), "b": torch.ones(2000)}, tmp_path / "model.safetensors")
    files = TensorFiles.open_directory(tmp_path)
    files.read("a")
    return files


@pytest.mark.parametrize("size", [0, 100, 10_000])
def test_a_file_that_was_cut_is_not_read(opened, size):
    """To touch a mapped page behind the end of its file ends the process."""
    os.truncate(opened.files[0], size)
    for name in "ab":
        with pytest.raises(CheckpointError, match=f"'{name}'.*was cut to {size} bytes while it was used"):
            opened.read(name)


@pytest.mark.parametrize("how", ["removed", "replaced"])
def test_what_is_mapped_stays(opened, how, tmp_path):
    os.rename(opened.files[0], tmp_path / "old") if how == "replaced" else os.unlink(opened.files[0])
    if how == "replaced":
        save_file({"a": torch.zeros(9000)}, opened.files[0])
    assert torch.equal(opened.read("a"), torch.arange(5000.0)) and bool((opened.read("b") == 1).all())
