"""Packings that are ended and gone on with: what their tests share."""

import os

import pytest
import torch

import mpq_kernels.packer.job
import mpq_kernels.packer.write
from mpq_kernels.packer.pack import pack
from tests.made.checkpoints import tiny_model

TOKENS = torch.randint(0, 160, (6, 16), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def commit_at_once(monkeypatch):
    """Every part counts as soon as it is written, so that what a run has finished does not depend on the disk.

    Layers here are so small that threads would mostly wait for each other, so there is only one.
    """
    monkeypatch.setattr(mpq_kernels.packer.write, "COMMIT_SHARE", 0)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama") / "model"
    tiny_model("llama", path, tied=False, max_shard_size="60KB")
    return path


class Killed(BaseException):
    """Ends a run where a kill would."""


def killed_pack(after, *args, **kwargs):
    """Pack, but for all after so many parts have been made; they are finished all the same."""
    left = after

    def progress(done, total, name):
        nonlocal left
        left -= 1
        if left < 0:
            raise Killed

    with pytest.raises(Killed):
        pack(*args, progress=progress, **kwargs)


def count_quantized(monkeypatch):
    names = []
    real = mpq_kernels.packer.job.quantize_weight

    def watch(weight, layout, perm, method, name, *rest):
        names.append(name)
        return real(weight, layout, perm, method, name, *rest)

    monkeypatch.setattr(mpq_kernels.packer.job, "quantize_weight", watch)
    return names


def journal_of(out):
    return out.with_name(f".{out.name}.partial-{os.getpid()}.journal")
