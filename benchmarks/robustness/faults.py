"""Faults while a model is packed, overwritten, loaded and run: each case starts processes and ends them badly.

After every fault the output is the old one, the new one or missing, byte for byte; a run that goes on ends with the
very files of an undisturbed one, and nothing is left beside them.
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch

import mpq_kernels
from benchmarks.models.packing import digests
from mpq_kernels.checkpoint.packed import PackedCheckpoint
from mpq_kernels.errors import CheckpointError, MPQError
from mpq_kernels.packer.pack import pack
from mpq_kernels.plan.plan import Plan

from .campaign import Run
from .world import PLAN, make_model

OLD = Plan.from_dict({"version": 1, "default": {"bits": 2, "group_size": 32}})
NEW = Plan.from_dict(PLAN)
GOOD, TYPED, RAW = 0, 3, 4  # exit codes of children
OUT = Path("work") / "out"


@dataclass(frozen=True)
class Scene:
    """The dense model, digests of what the two plans make of it, and how long packing takes, in seconds."""

    model: Path
    old: dict[str, str]
    new: dict[str, str]
    seconds: float


def spawn(work: Callable[[], object]) -> int:
    """Id of a forked child that does the work and says by its exit code how it ended."""
    child = os.fork()
    if child:
        return child
    code = RAW
    try:
        work()
        code = GOOD
    except MPQError:
        code = TYPED
    finally:
        os._exit(code)


def end_of(child: int) -> int:
    """Exit code, or the negative number of the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def pack_new(scene: Scene, model: Path | None = None, resume: bool | None = True) -> None:
    """Pack the new plan to OUT, over whatever is there."""
    pack(model or scene.model, OUT, NEW, "rtn", overwrite=True, resume=resume, max_shard_bytes=40_000)


def pack_old(scene: Scene) -> None:
    """Pack the old plan to OUT."""
    pack(scene.model, OUT, OLD, "rtn", overwrite=True, resume=True, max_shard_bytes=40_000)


def finish(scene: Scene) -> None:
    """AssertionError unless OUT is old, new or missing, and a run that goes on makes it new and leaves nothing."""
    if OUT.exists():
        assert digests(OUT) in (scene.old, scene.new), "half an output"
    pack_new(scene)
    assert digests(OUT) == scene.new, "another output than that of an undisturbed run"
    assert os.listdir(OUT.parent) == [OUT.name], f"left behind: {os.listdir(OUT.parent)}"


def signalled(scene: Scene, chance: Random, which: signal.Signals, times: int = 1) -> str:
    """A packing that gets a signal at a random moment, and so do runs that go on with it."""
    for _ in range(times):
        child = spawn(lambda: pack_new(scene))
        time.sleep(chance.uniform(0, scene.seconds * 1.1))
        os.kill(child, which)
        assert end_of(child) in (GOOD, -which, RAW), "a typed error for a signal"
    finish(scene)
    return f"{which.name} survived"


def killed(scene: Scene, chance: Random) -> str:
    """kill -9 while packing, once or several times."""
    return signalled(scene, chance, signal.SIGKILL, chance.choice((1, 1, 3)))


def killed_over(scene: Scene, chance: Random) -> str:
    """kill -9 while an older output is overwritten."""
    pack_old(scene)
    signalled(scene, chance, signal.SIGKILL)
    return "SIGKILL over an older output survived"


def interrupted(scene: Scene, chance: Random) -> str:
    """Ctrl-C, or SIGTERM."""
    return signalled(scene, chance, chance.choice((signal.SIGINT, signal.SIGTERM)))


def two_packers(scene: Scene, chance: Random) -> str:
    """Two runs for one output: each ends well or in words."""
    children = [spawn(lambda: pack_new(scene, resume=chance.choice((True, False))))]
    time.sleep(chance.uniform(0, scene.seconds))
    children.append(spawn(lambda: pack_new(scene)))
    codes = [end_of(child) for child in children]
    assert set(codes) <= {GOOD, TYPED} and GOOD in codes, f"they ended with {codes}"
    finish(scene)
    return "two packers at once"


def loaded_while_overwritten(scene: Scene, chance: Random) -> str:
    """What a reader opens while outputs are swapped is one of them, or refused in words; a loaded model stays."""
    pack_old(scene)
    ids = torch.arange(6)[None]
    model = mpq_kernels.load(OUT)
    before = model(input_ids=ids).logits
    child = spawn(lambda: [(pack_new(scene), pack_old(scene)) for _ in range(2)])
    opened = refused = 0
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        try:
            found = PackedCheckpoint.open(OUT)
            found.verify_values()
            opened += 1
        except CheckpointError:
            refused += 1
    assert opened and torch.equal(model(input_ids=ids).logits, before), "a loaded model has changed"
    finish(scene)
    return "loaded while overwritten"


def full_disk(scene: Scene, chance: Random) -> str:
    """A file may only become so large: the write fails as on a full disk."""
    largest = max(file.stat().st_size for file in scene.model.iterdir())

    def work() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        room = chance.randrange(largest)
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
        pack_new(scene)

    if chance.random() < 0.5:
        pack_old(scene)
    code = end_of(spawn(work))
    assert code in (GOOD, TYPED), f"a full disk ended with {code}"
    finish(scene)
    return "full disk"


def no_folder(scene: Scene, chance: Random) -> str:
    """Outputs that cannot be made."""
    (OUT.parent / "file").write_text("")
    (OUT.parent / "link").symlink_to("nowhere")
    for out in (Path("/proc/out"), OUT.parent / "none" / "out", OUT.parent / "file", OUT.parent / "link", scene.model):
        try:
            pack(scene.model, out, NEW, "rtn", overwrite=True)
        except CheckpointError:
            continue
        raise AssertionError(f"packed into {out}")
    (OUT.parent / "file").unlink()
    (OUT.parent / "link").unlink()
    return "refused"


def input_changed(scene: Scene, chance: Random) -> str:
    """The source is cut short or replaced while it is packed: words, or SIGBUS where it was cut under a mapped read."""
    model = Path("changing")
    shutil.rmtree(model, ignore_errors=True)
    shutil.copytree(scene.model, model)
    file = model / "model.safetensors"
    child = spawn(lambda: pack_new(scene, model))
    time.sleep(chance.uniform(0, scene.seconds))
    how = chance.choice(("cut", "replace", "remove"))
    if how == "cut":
        os.truncate(file, chance.randrange(file.stat().st_size))
    elif how == "replace":
        file.with_suffix(".new").write_bytes(file.read_bytes()[:-8] + b"\0" * 8)
        file.with_suffix(".new").replace(file)
    else:
        file.unlink()
    code = end_of(child)
    assert code in (GOOD, TYPED) or (how == "cut" and code == -signal.SIGBUS), f"{how}: ended with {code}"
    if OUT.exists():
        PackedCheckpoint.open(OUT).verify_values()
    shutil.rmtree(OUT.parent)
    OUT.parent.mkdir()
    return f"input: {how}" + (", SIGBUS" if code < 0 else "")


def threads(scene: Scene, chance: Random) -> str:
    """One model called by four threads, and by a process that is forked after it was loaded."""
    pack_new(scene)
    model = mpq_kernels.load(OUT)
    inputs = [torch.arange(4 + i)[None] % 160 for i in range(4)]
    with torch.no_grad():
        wanted = [model(input_ids=ids).logits for ids in inputs]
        wrong: list[int] = []

        def call(index: int) -> None:
            for _ in range(5):
                with torch.no_grad():
                    if not torch.equal(model(input_ids=inputs[index]).logits, wanted[index]):
                        wrong.append(index)

        running = [threading.Thread(target=call, args=(index,)) for index in range(4)]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join()
        assert not wrong, "threads disturb each other"

        def forked() -> None:
            assert torch.equal(model(input_ids=inputs[0]).logits, wanted[0])

        assert end_of(spawn(forked)) == GOOD, "a forked process gives something else"
    finish(scene)
    return "threads and a fork"


FAULTS = (killed, killed, killed, killed_over, killed_over, interrupted, two_packers, loaded_while_overwritten,
          full_disk, no_folder, input_changed, threads)  # fmt: skip


def prepare(folder: Path) -> Run:
    """Cases: one fault each."""
    model = make_model(folder)
    made = []
    for plan in (OLD, NEW):
        start = time.monotonic()
        pack(model, folder / "made", plan, "rtn", max_shard_bytes=40_000, overwrite=True)
        seconds = time.monotonic() - start
        made.append(digests(folder / "made"))
    mpq_kernels.load(folder / "made")(input_ids=torch.arange(3)[None])
    scene = Scene(model, *made, seconds)

    def run(chance: Random) -> str:
        shutil.rmtree(OUT.parent, ignore_errors=True)
        OUT.parent.mkdir()
        return chance.choice(FAULTS)(scene, chance)

    return run
