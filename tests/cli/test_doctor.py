"""`mpq doctor` tells the truth about this machine, and reports a broken part instead of breaking on it."""

import json
import subprocess
import sys

import pytest
import torch
import transformers

from mpq_kernels.backends import BACKENDS, cuda, ops
from mpq_kernels.backends.triton import configs
from mpq_kernels.cli import doctor, main
from mpq_kernels.format.codes import LAYOUT_ID


def test_facts():
    data = doctor.examine()
    assert data["packages"]["torch"] == torch.__version__
    assert data["packages"]["transformers"] == transformers.__version__
    assert data["packages"]["python"] == sys.version.split()[0]
    for name in ("operators", "host"):
        part = data["compiled"][name]
        assert (part["layout_id"], part["reason"], part["broken"]) == (LAYOUT_ID, None, False)
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
    operators = doctor.compiled_parts([])["operators"]
    assert operators["isa"] == isa
    first = {path["activations"]: path for path in reversed(operators["paths"])}
    assert set(first) == {"bf16", "fp16 or fp32", "rounded to int8"}
    assert all(path["tokens_from"] == "1" for path in first.values())


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


def test_the_cuda_kernels_are_a_part(monkeypatch, tmp_path):
    """Absent: said, and no fault. Present: loaded with a device, else not loaded, with the backend's reason."""
    part = doctor.examine()["compiled"]["cuda"]
    assert (part["file"] is not None) == cuda.LIBRARY.exists() and part["broken"] is False
    if part["file"] and not torch.cuda.is_available():
        assert part["reason"] == f"not loaded: {cuda.BACKEND.why_unavailable()}" and part["layout_id"] is None
    monkeypatch.setattr(doctor, "CUDA_FILE", "_gone.so")
    data = doctor.examine()
    assert data["compiled"]["cuda"]["file"] is None and "nvcc" in data["compiled"]["cuda"]["reason"]
    assert data["healthy"] is True


def test_a_cuda_library_that_should_load_and_does_not_is_broken(monkeypatch):
    monkeypatch.setattr(doctor, "CUDA_FILE", "version.py")  # any file that is there
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.ops.mpq, "cuda_layout_id", lambda: "mpq1-other", raising=False)
    part = doctor._cuda([{"name": "cuda", "reason": "built for another layout"}])
    assert part["broken"] is True and part["reason"] == "not loaded: built for another layout"
    monkeypatch.setattr(torch.ops.mpq, "cuda_layout_id", lambda: LAYOUT_ID)
    assert doctor._cuda([]) | {"file": None} == {"file": None, "layout_id": LAYOUT_ID, "reason": None, "broken": False}


def test_where_triton_configurations_come_from(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert "no `mpq tune`" in doctor.examine()["triton_configurations"]
    configs.write(configs.cache_file(), {"A GPU": configs.TABLE["cuda"]})
    assert doctor.examine()["triton_configurations"] == f"measured for A GPU ({configs.cache_file()})"
    configs.cache_file().write_text("no JSON")
    assert doctor.examine()["triton_configurations"].startswith("unknown (")
