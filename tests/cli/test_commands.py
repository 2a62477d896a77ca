"""The command line: what each command prints, as text and as JSON, and with which exit code it refuses."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoTokenizer

import mpq_kernels as mpq
from mpq_kernels.checkpoint.packed import PackedCheckpoint
from mpq_kernels.cli import output
from mpq_kernels.evaluate.perplexity import perplexity
from mpq_kernels.format.reference import dequantize
from tests.made.checkpoints import tiny_model
from tests.made.commands import HEAD, broken_copy

COMMANDS = ("plan", "pack", "inspect", "verify", "generate", "ppl", "bench", "doctor")


# The program


def test_help_names_every_command(run):
    text = run("--help").out
    assert all(f"\n│ {name} " in text or f" {name} " in text for name in COMMANDS)
    for name in COMMANDS:
        assert "--help" in run(name, "--help").out


def test_commands_import_nothing_heavy_before_they_run():
    program = (
        "import sys; from mpq_kernels.cli import main; code = main(['pack', '--help']);"
        "sys.exit(code or next((m for m in ('torch', 'transformers', 'numpy') if m in sys.modules), 0))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "words",
    [
        ["nonsense"],
        ["pack", "dense"],
        ["pack", "dense", "out"],
        ["pack", "dense", "out", "--bits", "4", "--plan", "plan.json"],
        ["pack", "dense", "out", "--bits", "9"],
        ["pack", "dense", "out", "--plan", "plan.json", "--group-size", "64"],
        ["pack", "dense", "out", "--plan", "plan.json", "--symmetric"],
        ["plan", "uniform", "dense", "--bits", "0"],
        ["ppl", "packed"],
        ["ppl", "packed", "--text", "text.txt", "--window", "1"],
        ["generate", "packed", "--prompt", "x", "--temperature", "-1"],
    ],
)
def test_wrong_usage_is_2(run, words):
    refused = run(*words, code=2)
    assert refused.out == ""
    assert "mpq" in refused.err
    assert not Path("out").exists()


def test_interrupt_is_130(run, monkeypatch):
    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr("mpq_kernels.cli.doctor.examine", interrupt)
    assert run("doctor", code=130).out == ""


def test_a_full_disk_is_one_message(run, monkeypatch):
    def full():
        raise OSError(28, "No space left on device", "/some/file")

    monkeypatch.setattr("mpq_kernels.cli.doctor.examine", full)
    assert run("doctor", code=1).err == "mpq: /some/file: No space left on device\n"


def test_a_defect_keeps_its_traceback(run, monkeypatch):
    def defect():
        raise ZeroDivisionError

    monkeypatch.setattr("mpq_kernels.cli.doctor.examine", defect)
    with pytest.raises(ZeroDivisionError):
        run("doctor")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_is_for_terminals(monkeypatch):
    for stream, hidden, shown in ((Terminal(), False, True), (Terminal(), True, False), (io.StringIO(), False, False)):
        monkeypatch.setattr(sys, "stderr", stream)
        with output.progress("packing", hidden) as report:
            assert (report is not None) == shown
            if report is not None:
                report(1, 2, "a[/b]")  # names are not markup
        assert ("packing" in stream.getvalue()) == shown


def test_no_color_is_respected(monkeypatch):
    stream = Terminal()
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    output.print_table("title", ["<name"], [["value"]])
    assert "value" in stream.getvalue()
    assert not any(f"\x1b[{code}" in stream.getvalue() for code in ("3", "9", "4"))


# plan


def test_plan_uniform_prints_and_writes_the_same(run, tmp_path):
    words = ["plan", "uniform", "dense", "--bits", 3, "--group-size", 32, "--symmetric", "--lm-head", 6]
    printed = run(*words)
    run(*words, "-o", tmp_path / "plan.json")
    assert (tmp_path / "plan.json").read_text() == printed.out
    wanted = mpq.Plan.uniform("dense", bits=3, group_size=32, symmetric=True, lm_head=6)
    assert mpq.Plan.from_file(tmp_path / "plan.json") == wanted


def test_plan_check_promises_what_pack_writes(run):
    data = run("plan", "check", "plan.json", "dense", "--json").json()
    checkpoint = PackedCheckpoint.open("mixed")
    assert [module["name"] for module in data["modules"]] == list(checkpoint.modules)
    for module in data["modules"]:
        tensors = checkpoint.weight(module["name"]).tensors().values()
        assert module["bytes"]["total"] == sum(tensor.nbytes for tensor in tensors)
    assert data["total"]["total"] == checkpoint.size().packed.total_bytes
    assert data["kept"] == {"lm_head": "plan: 16 bits"}
    text = run("plan", "check", "plan.json", "dense").out
    assert all(module["name"] in text for module in data["modules"])
    assert "3|5" in text
    assert f"{data['total']['total']:,}" in text


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        ({"version": 1, "modules": {"model.layers.9.mlp.up_proj": {"bits": 4}}}, "model.layers.9.mlp.up_proj"),
        ({"version": 1, "default": {"bits": 4, "group_size": 48}}, "48"),
        ({"version": 1, "default": {"bits": 4}, "surprise": 1}, "surprise"),
        ({"version": 7}, "version 7"),
    ],
)
def test_plans_that_do_not_fit_are_refused(run, tmp_path, plan, words):
    (tmp_path / "bad.json").write_text(json.dumps(plan))
    for command in (
        ["plan", "check", tmp_path / "bad.json", "dense"],
        ["pack", "dense", "o", "--plan", tmp_path / "bad.json"],
    ):
        refused = run(*command, code=1)
        assert words in refused.err
        assert refused.out == ""
    assert not Path("o").exists()


# inspect, verify


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


def test_verify_measures_the_error_of_every_layer(run):
    data = run("verify", "mixed", "--against", "dense", "--json").json()
    assert data["ok"] is True
    dense = load_file("dense/model.safetensors")
    errors = {layer["name"]: layer for layer in data["layers"]}
    assert len(errors) == 14
    checkpoint = PackedCheckpoint.open("mixed")
    qkv = dequantize(checkpoint.weight("model.layers.0.self_attn.qkv_proj"))
    for name, rows in (("q_proj", qkv[:128]), ("k_proj", qkv[128:192]), ("v_proj", qkv[192:])):
        wanted = dense[f"model.layers.0.self_attn.{name}.weight"].double()
        layer = errors[f"model.layers.0.self_attn.{name}"]
        assert layer["relative_error"] == pytest.approx(((rows - wanted).norm() / wanted.norm()).item(), rel=1e-6)
    assert errors["model.layers.0.self_attn.v_proj"]["bits"] == "5"
    assert errors["model.layers.0.mlp.down_proj"]["bits"] == "8|2"
    text = run("verify", "mixed", "--against", "dense").out
    assert "model.layers.1.self_attn.v_proj" in text
    assert ": good." in text
    assert run("verify", "packed", "--json").json()["layers"] is None


def test_verify_refuses_bad_values(run, tmp_path, space):
    def change(tensors):
        tensors["model.layers.1.mlp.up_proj.scales"][7] = float("nan")

    refused = run("verify", broken_copy(space, tmp_path, "packed", change), code=1)
    assert "model.layers.1.mlp.up_proj" in refused.err
    assert "NaN" in refused.err


def test_verify_refuses_another_model(run, tmp_path, space):
    def change(tensors):
        tensors["model.norm.weight"][0] += 1

    kept = run("verify", broken_copy(space, tmp_path, "packed", change), "--against", "dense", code=1)
    assert "model.norm.weight" in kept.err
    tiny_model("llama", tmp_path / "other", tied=False, sizes=HEAD | {"num_hidden_layers": 1})
    assert "another model" in run("verify", "packed", "--against", tmp_path / "other", code=1).err


@pytest.mark.parametrize("command", [["inspect"], ["verify"]])
def test_dense_and_missing_directories_are_refused(run, command):
    assert "dense" in run(*command, "dense", code=1).err
    assert "nowhere" in run(*command, "nowhere", code=1).err


# generate, ppl


def test_generate_is_greedy_generate(run):
    words = ["generate", "mixed", "--prompt", "The old man", "--max-new-tokens", 7]
    data = run(*words, "--json").json()
    tokenizer = AutoTokenizer.from_pretrained("mixed")
    inputs = tokenizer("The old man", return_tensors="pt")
    ids = mpq.load("mixed").generate(**inputs, max_new_tokens=7, do_sample=False, pad_token_id=0)[0]
    assert data["token_ids"] == ids[inputs["input_ids"].shape[1] :].tolist()
    assert data["new_tokens"] == len(data["token_ids"])
    streamed = run(*words)
    assert streamed.out.strip() == tokenizer.decode(ids, skip_special_tokens=True).strip()
    assert f"{data['new_tokens']} tokens in" in streamed.err
    assert run(*words, "--quiet").err == ""


def test_int8_activations_are_those_of_load(run):
    words = ["generate", "mixed", "--prompt", "The old man", "--max-new-tokens", 7, "--json", "--activations", "int8"]
    inputs = AutoTokenizer.from_pretrained("mixed")("The old man", return_tensors="pt")
    model = mpq.load("mixed", activations="int8")
    ids = model.generate(**inputs, max_new_tokens=7, do_sample=False, pad_token_id=0)[0]
    assert run(*words).json()["token_ids"] == ids[inputs["input_ids"].shape[1] :].tolist()
    words = ["ppl", "packed", "--text", "text.txt", "--max-tokens", "600", "--window", "64", "--json"]
    exact, rounded = run(*words).json()["ppl"], run(*words, "--activations", "int8").json()["ppl"]
    assert exact != rounded and abs(exact - rounded) < 0.05 * exact


def test_generate_samples_by_seed(run):
    words = ["generate", "dense", "--prompt", "The", "--max-new-tokens", 8, "--temperature", 1, "--json"]
    first, again, other = (run(*words, "--seed", seed).json()["token_ids"] for seed in (1, 1, 2))
    assert first == again
    assert first != other  # 2048 near-equal chances, 8 times: equal by accident once in 10**26 runs


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["mixed", "--prompt", ""], "empty"),
        (["mixed", "--prompt", "x", "--backend", "magic"], "magic"),
        (["dense", "--prompt", "x", "--backend", "cpu"], "dense"),
        (["dense", "--prompt", "x", "--device", "warp"], "warp"),
        (["mixed", "--prompt", "x", "--dtype", "float8"], "float8"),
        (["nowhere", "--prompt", "x"], "nowhere"),
    ],
)
def test_generate_refusals(run, words, reason):
    refused = run("generate", *words, code=1)
    assert reason in refused.err
    assert refused.out == ""


def test_a_model_without_tokenizer_is_refused(run, tmp_path):
    tiny_model("llama", tmp_path / "bare")
    assert "tokenizer" in run("generate", tmp_path / "bare", "--prompt", "x", code=1).err


@pytest.mark.parametrize("name", ["dense", "mixed"])
def test_ppl_is_perplexity(run, name):
    data = run("ppl", name, "--text", "text.txt", "--window", 64, "--max-tokens", 500, "--json").json()
    if name == "dense":
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()
    else:
        model = mpq.load(name, dtype=torch.float32)
    text = Path("text.txt").read_text(encoding="utf-8")
    wanted = perplexity(model, AutoTokenizer.from_pretrained(name), text, window=64, max_tokens=500)
    assert data["ppl"] == pytest.approx(wanted.ppl, rel=1e-6)
    assert (data["tokens"], data["predicted"], data["dtype"]) == (448, 7 * 63, "torch.float32")
    line = run("ppl", name, "--text", "text.txt", "--window", 64, "--max-tokens", 500).out
    assert line.startswith(f"perplexity {wanted.ppl:.3f}"[:14])


def test_ppl_refusals(run, tmp_path):
    (tmp_path / "short.txt").write_text("a few words")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 " * 100)
    for file, reason in (("short.txt", "less than one window"), ("latin.txt", "UTF-8"), ("none.txt", "No such file")):
        refused = run("ppl", "packed", "--text", tmp_path / file, code=1)
        assert reason in refused.err
        assert refused.out == ""
