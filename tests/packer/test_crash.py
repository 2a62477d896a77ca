"""Packing is all or nothing: killed, interrupted or failing at the last step. And it always gives the same bytes."""

import itertools
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mpq_kernels.packer.job
import mpq_kernels.packer.output
from mpq_kernels.errors import CheckpointError
from mpq_kernels.packer.pack import pack
from tests.made.checkpoints import tiny_model
from tests.made.packed import UNIFORM, check_packed, digests, mixed_plan, small_plan


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama") / "model"
    tiny_model("llama", path, tied=True)
    return path


PACK_SCRIPT = """
import sys, torch
from mpq_kernels.packer.pack import pack
from mpq_kernels.plan import Plan
torch.set_num_threads(int(sys.argv[1]))
pack(sys.argv[2], sys.argv[3], Plan.from_file(sys.argv[4]), max_shard_bytes=20_000)
"""


def start(script, *arguments, **environment):
    """Run Python code in another process that imports the same package."""
    package = str(Path(mpq_kernels.__file__).parent.parent)
    environment = os.environ | {"PYTHONPATH": package} | environment
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def test_same_input_same_bytes(llama, tmp_path):
    """In one process with one and two threads, and in another process with another hash seed."""
    plan = small_plan(llama)
    plan.to_file(tmp_path / "plan.json")
    process = start(PACK_SCRIPT, 2, llama, tmp_path / "b", tmp_path / "plan.json", PYTHONHASHSEED="7")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        pack(llama, tmp_path / "a", plan, max_shard_bytes=20_000)
    finally:
        torch.set_num_threads(threads)
    pack(llama, tmp_path / "c", plan, max_shard_bytes=20_000)
    assert process.wait(60) == 0
    process.stdout.close()
    assert digests(tmp_path / "a") == digests(tmp_path / "b") == digests(tmp_path / "c")


def test_overwrite(llama, tmp_path):
    pack(llama, tmp_path / "out", UNIFORM, quantizer="rtn")
    (tmp_path / "out" / "notes.txt").write_text("")
    pack(llama, tmp_path / "out", mixed_plan(llama), quantizer="rtn", overwrite=True)
    check_packed(llama, tmp_path / "out", mixed_plan(llama))
    assert os.listdir(tmp_path) == ["out"] and not (tmp_path / "out" / "notes.txt").exists()


def leftovers(path):
    """What a run of this process leaves for the output "out" when it ends early."""
    kept = f".out.partial-{os.getpid()}"
    return {name for name in os.listdir(path) if name.startswith(".")} == {kept, f"{kept}.journal"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_interrupted(error, llama, tmp_path):
    """The old output stays, what is finished is kept and named, and a resumed run ends as if nothing had happened."""
    pack(llama, tmp_path / "wanted", mixed_plan(llama), quantizer="rtn")
    pack(llama, tmp_path / "out", UNIFORM, quantizer="rtn")
    before = digests(tmp_path / "out")

    def stop(done, total, name):
        if done > total // 2:
            raise error

    with pytest.raises(error) as caught:
        pack(llama, tmp_path / "out", mixed_plan(llama), quantizer="rtn", overwrite=True, progress=stop)
    assert digests(tmp_path / "out") == before and leftovers(tmp_path)
    assert "parts are finished and kept: resume=True (--resume)" in "".join(caught.value.__notes__)
    report = pack(llama, tmp_path / "out", mixed_plan(llama), quantizer="rtn", overwrite=True, resume=True)
    assert 0 < report.resumed < report.parts
    assert digests(tmp_path / "out") == digests(tmp_path / "wanted")
    assert sorted(os.listdir(tmp_path)) == ["out", "wanted"]


def test_interrupted_before_anything_is_finished(llama, tmp_path, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(mpq_kernels.packer.job.PackJob, "_quantize", stop)
    with pytest.raises(KeyboardInterrupt):
        pack(llama, tmp_path / "out", UNIFORM, quantizer="rtn")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("step", ["rename", "fsync"])
def test_swap_that_fails_brings_the_old_one_back(step, llama, tmp_path, monkeypatch):
    pack(llama, tmp_path / "out", UNIFORM, quantizer="rtn")
    before = digests(tmp_path / "out")
    rename, fsync = os.rename, mpq_kernels.packer.output.fsync_directory

    def failing_rename(source, target):
        if ".partial-" in str(source):
            raise OSError(5, "Input/output error")
        rename(source, target)

    def failing_fsync(path):
        if path == tmp_path:
            raise OSError(5, "Input/output error")
        fsync(path)

    with monkeypatch.context() as patch:
        if step == "rename":
            patch.setattr(mpq_kernels.packer.output.os, "rename", failing_rename)
        else:
            patch.setattr(mpq_kernels.packer.output, "fsync_directory", failing_fsync)
        with pytest.raises(CheckpointError, match="Input/output error"):
            pack(llama, tmp_path / "out", mixed_plan(llama), quantizer="rtn", overwrite=True)
    assert digests(tmp_path / "out") == before and leftovers(tmp_path)
    report = pack(llama, tmp_path / "out", mixed_plan(llama), quantizer="rtn", overwrite=True, resume=True)
    assert report.resumed == report.parts and os.listdir(tmp_path) == ["out"]
    check_packed(llama, tmp_path / "out", mixed_plan(llama))


KILL_SCRIPT = """
import sys, threading, time
from mpq_kernels.packer.pack import pack
from mpq_kernels.plan import Plan
def stop(done, total, name):
    if done > total // 2:
        print("half\\n", end="", flush=True)  # one write: two threads print
        time.sleep(60)
def run(out):
    pack(sys.argv[1], out, Plan.from_file(sys.argv[2]), quantizer="rtn", overwrite=True, progress=stop)
for out in sys.argv[3:]:
    threading.Thread(target=run, args=(out,)).start()
"""


def test_kill_9(llama, tmp_path):
    """A killed run leaves the older output or none, never half of one; the next run asks what to do with its rest."""
    plan = mixed_plan(llama)
    plan.to_file(tmp_path / "plan.json")
    new, old = tmp_path / "new", tmp_path / "old"
    pack(llama, old, UNIFORM, quantizer="rtn")
    before = digests(old)
    process = start(KILL_SCRIPT, llama, tmp_path / "plan.json", new, old)
    assert [process.stdout.readline() for _ in range(2)] == ["half\n"] * 2
    process.send_signal(signal.SIGKILL)
    process.wait(60)
    process.stdout.close()
    rests = {f".{name}.partial-{process.pid}{end}" for name in ("new", "old") for end in ("", ".journal")}
    assert set(os.listdir(tmp_path)) == rests | {"old", "plan.json"}
    assert digests(old) == before
    for out, resume in ((new, True), (old, False)):
        with pytest.raises(CheckpointError, match=r"kept by a run that was killed: resume=True .*, resume=False"):
            pack(llama, out, plan, quantizer="rtn", overwrite=True)
        report = pack(llama, out, plan, quantizer="rtn", overwrite=True, resume=resume)
        assert (report.resumed > 0) == resume
        check_packed(llama, out, plan)
    assert set(os.listdir(tmp_path)) == {"new", "old", "plan.json"}
    assert digests(new) == digests(old)


def test_killed_between_the_two_renames(llama, tmp_path):
    """The old output waits under its other name; the next run brings it back before anything else."""
    pack(llama, tmp_path / "out", UNIFORM, quantizer="rtn")
    before = digests(tmp_path / "out")
    dead = subprocess.Popen(["true"])
    dead.wait()
    os.rename(tmp_path / "out", tmp_path / f".out.replaced-{dead.pid}")

    def stop(*step):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(llama, tmp_path / "out", UNIFORM, quantizer="rtn", progress=stop)
    assert digests(tmp_path / "out") == before


def test_living_runs_are_left_alone(llama, tmp_path):
    other = tmp_path / f".out.partial-{os.getppid()}"
    other.mkdir()
    pack(llama, tmp_path / "out", UNIFORM, quantizer="rtn")
    assert sorted(os.listdir(tmp_path)) == sorted([other.name, "out"])


@pytest.mark.parametrize("umask", [0o027, 0o077])
def test_modes_follow_umask(umask, llama, tmp_path):
    before = os.umask(umask)
    try:
        pack(llama, tmp_path / "out", UNIFORM, quantizer="rtn", max_shard_bytes=20_000)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o777 & ~umask
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()}
    assert modes == {0o666 & ~umask}


FAULTS = {"full": (28, "No space left on device"), "denied": (13, "Permission denied"), "broken": (5, "Input/output")}


@pytest.mark.parametrize("call", ["write", "pwrite", "fsync", "ftruncate", "open", "mkdir"])
@pytest.mark.parametrize("fault", FAULTS)
def test_every_call_that_may_fail(fault, call, llama, tmp_path, monkeypatch):
    """From the n-th call on, for n = 1, 2, 4, ...: the old output stays, and what was finished is gone on with."""
    number, text = FAULTS[fault]
    plan, out = mixed_plan(llama), tmp_path / "out"
    pack(llama, tmp_path / "wanted", plan, quantizer="rtn", max_shard_bytes=30_000)
    pack(llama, out, UNIFORM, quantizer="rtn")
    before, real = digests(out), getattr(os, call)
    for n in (2**i for i in range(12)):
        calls = itertools.count(1)

        def failing(*args, calls=calls, n=n, **kwargs):
            # Reading is not what fails: only files that are opened to be written count.
            if (call != "open" or args[1] & (os.O_WRONLY | os.O_RDWR)) and next(calls) >= n:
                raise OSError(number, text, *(args[:1] if call in ("open", "mkdir") else ()))
            return real(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, failing)
            try:
                report = pack(llama, out, plan, "rtn", None, True, 30_000, resume=True)
            except CheckpointError as error:
                assert text in str(error)
                assert digests(out) == before
                continue
        break
    assert digests(out) == digests(tmp_path / "wanted")
    assert sorted(os.listdir(tmp_path)) == ["out", "wanted"]
    assert report.resumed > 0 or call in ("mkdir", "ftruncate", "open")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_directory(llama, tmp_path):
    (tmp_path / "shut").mkdir(mode=0o555)
    with pytest.raises(CheckpointError, match="Permission denied"):
        pack(llama, tmp_path / "shut" / "out", UNIFORM, quantizer="rtn")
