"""`mpq pack --resume` and `--restart`: what an interrupted or killed run has finished."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import mpq_kernels
from mpq_kernels import Plan
from mpq_kernels.checkpoint.packed import PackedCheckpoint
from tests.made.checkpoints import tiny_model
from tests.made.commands import Runner
from tests.made.packed import digests

EXAMPLE = Path(__file__).parents[2] / "examples" / "gutenberg-6m"


INTERRUPTED = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job's children begin with it ignored
import mpq_kernels.packer.job
from mpq_kernels.cli import main
real, names = mpq_kernels.packer.job.quantize_weight, []
def quantize_weight(*args):
    names.append(args[4])
    if len(names) == 10:
        os.kill(os.getpid(), signal.SIGINT)
    return real(*args)
mpq_kernels.packer.job.quantize_weight = quantize_weight
sys.exit(main(sys.argv[1:]))
"""


def test_interrupted_command_is_resumed(tmp_path, capsys):
    """Ctrl-C: exit code 130, and one line says what is kept; without --resume or --restart nothing happens to it."""
    out, run = tmp_path / "out", Runner(capsys)
    environment = os.environ | {"PYTHONPATH": str(Path(mpq_kernels.__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", INTERRUPTED, "pack", EXAMPLE, out, "--bits", "4", "--quantizer", "hqq"]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    err = process.stderr
    assert process.returncode == 130
    assert "parts are finished and kept: resume=True (--resume) goes on with it" in err and "Traceback" not in err
    words = ["pack", EXAMPLE, out, "--bits", "4", "--quantizer", "hqq"]
    assert "--restart" in run(*words, code=1).err
    assert "goes on with what a killed run" in " ".join(run(*words, "--resume", "--restart", code=2).err.split())
    other = run(*words[:-1], "rtn", "--resume", code=1)
    assert "quantizer was hqq, is rtn" in other.err
    note = run(*words, "--resume").err
    assert "9 of 74 parts had been finished by an earlier run" in note
    assert "0 of 74 parts" in run(*words[:2], tmp_path / "wanted", *words[3:], "--resume").err
    assert digests(out) == digests(tmp_path / "wanted")
    assert sorted(os.listdir(tmp_path)) == ["out", "wanted"]


def test_restart(tmp_path, capsys, monkeypatch):
    import mpq_kernels.packer.write

    monkeypatch.setattr(mpq_kernels.packer.write, "COMMIT_SHARE", 0)

    def stop(done, total, name):
        if done > total // 2:
            raise RuntimeError

    out, plan = tmp_path / "out", Plan.uniform(EXAMPLE, 4)
    with pytest.raises(RuntimeError):
        mpq_kernels.pack(EXAMPLE, out, plan, "rtn", progress=stop)
    words = ["pack", EXAMPLE, out, "--bits", "2", "--quantizer", "rtn"]
    assert "kept by a run that was killed" in Runner(capsys)(*words, code=1).err
    Runner(capsys)(*words, "--restart")
    assert os.listdir(tmp_path) == ["out"]
    assert {s.bits for m in PackedCheckpoint.open(out).modules.values() for s in m.layout.segments} == {2}


def test_random_kills(tmp_path):
    """Two kills -9 of each of three models at random moments, each resumed; the script does twenty."""
    sizes = {"hidden_size": 128, "num_hidden_layers": 4}
    models = [tmp_path / name for name in ("mixtral", "gpt_oss")]
    for path in models:
        tiny_model(path.name, path, sizes=sizes)
    script = Path(__file__).parents[2] / "benchmarks" / "models" / "packing.py"
    command = [sys.executable, script, "kills", "--count", "2", "--work", tmp_path, "--json", tmp_path / "kills.json"]
    done = subprocess.run([*command, "--models", EXAMPLE, *models], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "kills.json").read_text())["kills"]
    assert result["same"] == result["kills"] == 6 and {row["model"] for row in result["rows"]} == {
        "gutenberg-6m", "mixtral", "gpt_oss",
    }  # fmt: skip
