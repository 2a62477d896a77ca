"""`mpq doctor` tells the truth about this machine, and reports a broken part instead of breaking on it."""

import json
import subprocess
import sys

import pytest
import torch
import transformers

from mpq_kernels.backends import BACKENDS, ops
from mpq_kernels.cli import doctor, main
from mpq_kernels.format.codes import LAYOUT_ID


def test_facts():
    data = doctor.examine()
    assert data["packages"]["torch"] == torch.__version__
    assert data["packages"]["transformers"] == transformers.__version__
    assert data["packages"]["python"] == sys.version.split()[0]
    for part in data["compiled"].values():
        assert (part["layout_id"], part["reason"]) == (LAYOUT_ID, None)
    operators = data["compiled"]["operators"]
    assert operators["file"] == str(ops.LIBRARY)
    assert operators["isas"] == torch.ops.mpq.cpu_isas().split(",")
    assert operators["isa"] in operators["isas"]
    refusal = torch.ops.mpq.cpu_isa_refusal("amx")
    assert ("amx" in operators["isas"]) == (refusal == "")
    assert operators["amx"] == (refusal or doctor.AMX_WORKS)
    assert [item["name"] for item in data["backends"]] == list(BACKENDS)
    assert bool(data["gpus"]["devices"]) == torch.cuda.is_available()
    assert data["healthy"] is True


def test_the_instruction_set_in_use_is_reported(isa):
    assert doctor.compiled_parts()["operators"]["isa"] == isa


def test_text_names_every_part_and_backend(capsys):
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    for word in (torch.__version__, LAYOUT_ID, torch.ops.mpq.cpu_isa(), *BACKENDS):
        assert word in text
    assert f"\namx: {torch.ops.mpq.cpu_isa_refusal('amx') or doctor.AMX_WORKS}\n" in text


def test_as_a_program_json_is_all_of_stdout():
    done = subprocess.run([sys.executable, "-m", "mpq_kernels", "doctor", "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["healthy"] is True


def test_a_part_of_another_build_is_unhealthy(monkeypatch, capsys):
    import mpq_kernels._host as host

    monkeypatch.setattr(host, "LAYOUT_ID", "mpq1-other")
    assert main(["doctor", "--json"]) == 1
    data = json.loads(capsys.readouterr().out)
    assert "another layout" in data["compiled"]["host"]["reason"]
    assert data["healthy"] is False


def test_a_part_that_does_not_load_is_a_reason(monkeypatch, capsys):
    def refuse(name):
        raise ImportError(f"{name} is gone")

    monkeypatch.setattr(doctor.importlib, "import_module", refuse)
    assert main(["doctor"]) == 1
    assert "mpq_kernels._host is gone" in capsys.readouterr().out


@pytest.mark.parametrize("content", ["#!/bin/sh\necho release 13.0\n", "#!/bin/sh\nexit 3\n"])
def test_nvcc_is_found_on_the_path(tmp_path, monkeypatch, content):
    program = tmp_path / "nvcc"
    program.write_text(content)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    found = doctor.examine()["nvcc"]
    assert str(program) in found
    assert ("13.0" in found) == ("echo" in content)


def test_no_nvcc(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    assert doctor.examine()["nvcc"] is None
