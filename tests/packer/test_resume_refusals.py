"""What cannot be gone on with is refused: other input, damaged work, a run that is not over; and rests are cleaned."""

import json
import os
import shutil
import subprocess

import pytest
import torch
from safetensors.torch import load_file, save_file

import mpq_kernels.calibrate.hessians
import mpq_kernels.packer.job
import mpq_kernels.packer.pack
import mpq_kernels.packer.unfinished
import mpq_kernels.packer.write
from mpq_kernels.calibrate.calibration import Calibration
from mpq_kernels.errors import CheckpointError
from mpq_kernels.packer.pack import pack
from mpq_kernels.plan.plan import Plan
from tests.made.packed import UNIFORM, digests
from tests.made.resumed import TOKENS, journal_of, killed_pack

pytestmark = pytest.mark.usefixtures("commit_at_once")


def change_weight(path):
    """Another value in the first tensor that packing reads; same size."""
    for file in sorted(path.glob("*.safetensors")):
        tensors = load_file(file)
        if "model.layers.0.self_attn.q_proj.weight" in tensors:
            tensors["model.layers.0.self_attn.q_proj.weight"][0, 0] += 1
            save_file(tensors, file, metadata={"format": "pt"})


def add_tensor(path):
    file = sorted(path.glob("*.safetensors"))[0]
    save_file(load_file(file) | {"more": torch.ones(1)}, file, metadata={"format": "pt"})


def edit_config(path):
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"note": "edited"}))


def other_version(monkeypatch, name, value):
    monkeypatch.setattr(mpq_kernels.packer.pack, name, value)


FEW = Plan.from_dict({"version": 1, "default": None, "modules": {r"re:.*0.*k_proj": {"bits": 3}}})
# name -> (damage to the source, change of the package, arguments, parts of the message)
MISFITS = {
    "quantizer": (None, None, {"quantizer": "hqq", "plan": FEW}, ["quantizer was rtn, is hqq"]),
    "version": (None, ("VERSION", "9.9"), {}, ["mpq_kernels was ", "is 9.9"]),
    "layout": (None, ("LAYOUT_ID", "mpq1-other"), {}, ["layout_id was ", "is mpq1-other"]),
    "config": (edit_config, None, {}, ["config sha256 was "]),
    "source": (add_tensor, None, {}, ["source.model-00001-of-", ".bytes was "]),
    "weights": (change_weight, None, {}, ["q_proj.weight", "has changed since"]),
}


@pytest.mark.parametrize("resume", [True, None])
@pytest.mark.parametrize("case", MISFITS)
def test_what_does_not_fit_is_refused(case, resume, llama, tmp_path, monkeypatch):
    damage, change, arguments, words = MISFITS[case]
    source, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(llama, source)
    given = {"plan": UNIFORM, "quantizer": "rtn", "max_shard_bytes": 40_000}
    killed_pack(3, source, out, **given)
    before = journal_of(out).read_bytes()
    if damage is not None:
        damage(source)
    if change is not None:
        monkeypatch.setattr(mpq_kernels.packer.pack, *change)
    with pytest.raises(CheckpointError) as caught:
        pack(source, out, resume=resume, **(given | arguments))
    if resume is None and case == "weights":
        words = ["3 of ", "kept by a run that was killed"]  # which would find out
    for word in [*words, "--restart"]:
        assert word in str(caught.value)
    assert journal_of(out).read_bytes() == before and not out.exists()
    pack(source, out, resume=False, **(given | arguments))
    pack(source, tmp_path / "wanted", **(given | arguments))
    assert digests(out) == digests(tmp_path / "wanted")
    assert sorted(os.listdir(tmp_path)) == ["model", "out", "wanted"]


def test_another_calibration_does_not_fit(llama, tmp_path):
    def weights(hidden, tokens, block):
        return torch.ones(tokens.shape)

    first = Calibration(tokens=TOKENS, token_weights=weights)
    killed_pack(3, llama, tmp_path / "out", UNIFORM, quantizer="gptq", calibration=first)
    for other, word in (
        (Calibration(tokens=TOKENS), r"calibration.token_weights was a function, in run \S+, is None"),
        (Calibration(tokens=TOKENS + 0, token_weights=weights), "calibration.token_weights was a function"),
        (Calibration(tokens=TOKENS.flip(0)), "calibration.sha256 was "),
        (Calibration(tokens=TOKENS, damping=0.1), "calibration.damping was 0.05, is 0.1"),
    ):
        with pytest.raises(CheckpointError, match=word):
            pack(llama, tmp_path / "out", UNIFORM, "gptq", other, resume=True)


def test_files_that_were_only_touched_fit(llama, tmp_path):
    shutil.copytree(llama, tmp_path / "model")
    killed_pack(3, tmp_path / "model", tmp_path / "out", UNIFORM, quantizer="rtn")
    for file in (tmp_path / "model").iterdir():
        os.utime(file, (1, 1))
    assert pack(tmp_path / "model", tmp_path / "out", UNIFORM, "rtn", resume=True).resumed == 3
    pack(llama, tmp_path / "wanted", UNIFORM, "rtn")
    assert digests(tmp_path / "out") == digests(tmp_path / "wanted")


def test_a_torn_line_is_made_again(llama, tmp_path):
    """A crash may cut the last line off anywhere; the part is then not finished."""
    pack(llama, tmp_path / "wanted", UNIFORM, "rtn")
    killed_pack(2, llama, tmp_path / "start", UNIFORM, quantizer="rtn")
    text, directory = journal_of(tmp_path / "start").read_bytes(), journal_of(tmp_path / "start").with_suffix("")
    lines = text.splitlines(keepends=True)
    for cut, resumed in ((1, 1), (len(lines[2]), 1), (len(lines[2]) + 1, 0), (len(text) - 5, 0)):
        out = tmp_path / f"out{cut}"
        shutil.copytree(directory, journal_of(out).with_suffix(""))
        journal_of(out).write_bytes(text[:-cut])
        assert pack(llama, out, UNIFORM, "rtn", resume=True).resumed == resumed
        assert digests(out) == digests(tmp_path / "wanted")


def garble(data):
    return data.replace(b'"part"', b'"prat"', 1)


def break_line(data):
    return data.replace(b"\n", b"?\n", 1)


def forge(data):
    return data.replace(b'"inputs": {', b'"inputs": {"x": 1, ', 1)


def retype(data):
    return data.replace(b'"identity": {', b'"identity": 7, "was": {', 1)


def newer(data):
    return data.replace(b'{"journal": 2', b'{"journal": 3', 1)


def elsewhere(data):
    return data.replace(b'"ending": "', b'"ending": "../', 1)


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (garble, "is damaged"),
        (break_line, "not valid JSON"),
        (forge, "is damaged"),
        (retype, "is damaged"),
        (newer, "journal=3, and this version"),
        (elsewhere, r"is damaged: its directory ends with '\.\./'"),
    ],
)
def test_damaged_journals_are_refused(damage, word, llama, tmp_path):
    killed_pack(2, llama, tmp_path / "out", UNIFORM, quantizer="rtn")
    path = journal_of(tmp_path / "out")
    path.write_bytes(damage(path.read_bytes()))
    for resume in (True, None):
        with pytest.raises(CheckpointError, match=f"{word}.*--restart"):
            pack(llama, tmp_path / "out", UNIFORM, "rtn", resume=resume)
    pack(llama, tmp_path / "out", UNIFORM, "rtn", resume=False)
    assert os.listdir(tmp_path) == ["out"]


def test_damaged_work_is_refused(llama, tmp_path):
    """Every byte that a finished part has written is checked, whatever overwrote it."""
    killed_pack(2, llama, tmp_path / "out", UNIFORM, quantizer="rtn")
    file = journal_of(tmp_path / "out").with_suffix("") / "model.safetensors"
    data = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    data[start + 100] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="q_proj is not as its run left it.*--res"):
        pack(llama, tmp_path / "out", UNIFORM, "rtn", resume=True)
    file.write_bytes(data[:-1])
    with pytest.raises(CheckpointError, match="not those of the tensors to be packed"):
        pack(llama, tmp_path / "out", UNIFORM, "rtn", resume=True)


def test_a_running_one_is_left_alone(llama, tmp_path):
    """The lock says so, not the process id, which may have gone to another process, or be the same in a container."""

    def progress(done, total, name):
        with pytest.raises(CheckpointError, match="another run is still writing it"):
            pack(llama, tmp_path / "out", UNIFORM, "rtn", resume=True)
        for resume in (None, False):
            with pytest.raises(CheckpointError, match="this process is already packing into"):
                pack(llama, tmp_path / "out", UNIFORM, "rtn", resume=resume)
        steps.append(name)

    steps = []
    report = pack(llama, tmp_path / "out", UNIFORM, "rtn", progress=progress)
    assert len(steps) == report.parts


def test_several_killed_runs(llama, tmp_path):
    killed_pack(2, llama, tmp_path / "out", UNIFORM, quantizer="rtn")
    dead = subprocess.Popen(["true"])
    dead.wait()
    path = journal_of(tmp_path / "out")
    for name in (path, path.with_suffix("")):
        other = name.with_name(name.name.replace(str(os.getpid()), str(dead.pid)))
        shutil.copytree(name, other) if name.is_dir() else shutil.copy(name, other)
    for resume in (True, None):
        with pytest.raises(CheckpointError, match="several runs were killed"):
            pack(llama, tmp_path / "out", UNIFORM, "rtn", resume=resume)
    pack(llama, tmp_path / "out", UNIFORM, "rtn", resume=False)
    assert os.listdir(tmp_path) == ["out"]


def test_rests_without_work_are_cleaned(llama, tmp_path):
    """A directory without a journal, a journal without a directory, and one in which nothing is finished."""
    dead = [subprocess.Popen(["true"]) for _ in range(3)]
    for process in dead:
        process.wait()
    pids = [process.pid for process in dead]
    (tmp_path / f".out.partial-{pids[0]}").mkdir()
    (tmp_path / f".out.partial-{pids[1]}.journal").write_text("")
    (tmp_path / f".out.partial-{pids[2]}").mkdir()
    head = {"journal": 2, "ending": "", "parts": 3, "identity": {}}
    (tmp_path / f".out.partial-{pids[2]}.journal").write_text(json.dumps(head) + "\n")
    pack(llama, tmp_path / "out", UNIFORM, "rtn")
    assert os.listdir(tmp_path) == ["out"]
