"""Resuming: a run that was ended anywhere and gone on with gives the bytes of a run that was not; or is refused."""

import gc
import json
import os

import pytest
from safetensors.torch import load_file

import mpq_kernels.calibrate.hessians
import mpq_kernels.packer.job
import mpq_kernels.packer.pack
import mpq_kernels.packer.unfinished
import mpq_kernels.packer.write
from mpq_kernels.calibrate.calibration import Calibration
from mpq_kernels.dense.checkpoint import DenseCheckpoint
from mpq_kernels.errors import CheckpointError
from mpq_kernels.packer.pack import pack
from mpq_kernels.plan.plan import Plan
from tests.made.checkpoints import tiny_model
from tests.made.packed import UNIFORM, digests, mixed_plan, small_plan
from tests.made.resumed import TOKENS, Killed, count_quantized, journal_of, killed_pack

pytestmark = pytest.mark.usefixtures("commit_at_once")


def expert_plan(path):
    """Another width for every expert; everything else as UNIFORM, the head kept."""
    specs = [spec for spec in DenseCheckpoint.open(path).linears() if spec.expert]
    rules = {spec.name: {"bits": 2 + spec.expert.index, "group_size": 16} for spec in specs}
    return Plan.from_dict({"version": 1, "default": {"bits": 4, "group_size": 16}, "modules": rules})


def few(path):
    """Two blocks of which some linears stay as they are, two share an input, and one reads what others have made."""
    rules = {r"re:.*(k_proj|v_proj|layers\.1\.mlp\.down_proj)": {"bits": 3, "group_size": -1}}
    return Plan.from_dict({"version": 1, "default": None, "modules": rules})


# name -> (family, plan, other arguments of pack)
CASES = {
    "fused, segments, permutation": ("llama", mixed_plan, {"quantizer": "rtn"}),
    "biases": ("qwen2", small_plan, {"quantizer": "hqq"}),
    "experts stored one by one": ("mixtral", expert_plan, {"quantizer": "rtn"}),
    "experts stored merged": ("gpt_oss", expert_plan, {"quantizer": "rtn"}),
    "calibrated": ("llama", few, {"quantizer": "gptq", "calibration": Calibration(tokens=TOKENS)}),
    "calibrated, ordered": (
        "qwen2",
        few,
        {"quantizer": "gptq", "calibration": Calibration(tokens=TOKENS, act_order=True)},
    ),
    "experts calibrated, some without tokens, stored merged": (
        "gpt_oss",
        expert_plan,
        {"quantizer": "gptq", "calibration": Calibration(tokens=TOKENS)},
    ),
    "experts calibrated, some without tokens, stored one by one": (
        "mixtral",
        expert_plan,
        {"quantizer": "gptq", "calibration": Calibration(tokens=TOKENS[:1, :1])},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_ended_after_any_part(case, tmp_path, monkeypatch):
    """Several interruptions in a row; no weight is quantized twice, and report and bytes are those of one run."""
    family, make_plan, arguments = CASES[case]
    source, out = tmp_path / "model", tmp_path / "out"
    tiny_model(family, source, max_shard_size="60KB")
    plan = make_plan(source)
    arguments = {"max_shard_bytes": 40_000} | arguments
    wanted = pack(source, tmp_path / "wanted", plan, **arguments)
    members = sum(len(module.members) for module in wanted.modules)
    names = count_quantized(monkeypatch)
    for after in (1, 1, members // 2, members - members // 2):
        killed_pack(after, source, out, plan, resume=True, **arguments)
        assert not out.exists()
    # What is killed is the part that was just made: it is not finished, and made again.
    done = 1 + 1 + members // 2 + members - members // 2
    killed_pack(done, source, out, plan, resume=True, **arguments)
    report = pack(source, out, plan, resume=True, **arguments)
    assert digests(out) == digests(tmp_path / "wanted")
    assert report.resumed == done and report.parts == wanted.parts
    assert report.modules == wanted.modules and report.packed == wanted.packed
    assert report.unreached == wanted.unreached and bool(wanted.unreached) == ("without tokens" in case)
    twice = {name for name in names if names.count(name) > 1}
    assert len(set(names)) == members and len(twice) <= 5
    assert sorted(os.listdir(tmp_path)) == ["model", "out", "wanted"]


def test_nothing_to_resume(llama, tmp_path):
    report = pack(llama, tmp_path / "out", UNIFORM, "rtn", resume=True)
    assert report.resumed == 0 and report.parts == len(report.modules) + 6
    with pytest.raises(CheckpointError, match="is not empty .a run that is to be resumed may have come to its end."):
        pack(llama, tmp_path / "out", UNIFORM, "rtn", resume=True)


def mended(plan, **modules):
    """The plan with other rules for some linears."""
    changed = {name: type(plan.default)(**rule) for name, rule in modules.items()}
    return plan.model_copy(update={"modules": {**changed, **plan.modules}})


TEXT = {"calibration": Calibration(tokens=TOKENS)}
UP = "model.layers.0.mlp.up_proj"  # the sixth linear
# name -> (family, quantizer, other arguments, the linear that another plan changes, its rule; linears finished before,
# and how many of them still count)
MENDED = {
    "another width": ("mistral", "rtn", {}, UP, {"bits": 3}, 9, 8),
    "kept": ("mistral", "rtn", {}, UP, {"bits": 16}, 9, 8),
    "not there yet": ("mistral", "rtn", {}, "model.layers.1.mlp.up_proj", {"bits": 3}, 9, 9),
    "on a text, what comes before": ("mistral", "gptq", TEXT, UP, {"bits": 3}, 9, 5),
    "on a text, not there yet": ("mistral", "gptq", TEXT, "model.layers.1.mlp.up_proj", {"bits": 3}, 9, 9),
    "an expert, the others move": (
        "mixtral",
        "rtn",
        {},
        "model.layers.0.block_sparse_moe.experts.1.w2",
        {"bits": 3},
        22,
        21,
    ),
}


@pytest.mark.parametrize("case", MENDED)
def test_under_another_plan_what_it_leaves_as_it_was_is_kept(case, tmp_path, monkeypatch):
    family, quantizer, arguments, name, rule, before, still = MENDED[case]
    source, out = tmp_path / "model", tmp_path / "out"
    tiny_model(family, source, tied=False, max_shard_size="60KB")
    first = Plan.from_dict({"version": 1, "default": {"bits": 4, "group_size": 16}})
    other = mended(first, **{name: {"group_size": 16} | rule})
    killed_pack(before, source, out, first, quantizer=quantizer, max_shard_bytes=40_000, **arguments)
    if rule["bits"] == 16:
        assert name in {spec.name for spec in DenseCheckpoint.open(source).linears()}
    names = count_quantized(monkeypatch)
    report = pack(source, out, other, quantizer, resume=True, max_shard_bytes=50_000, **arguments)
    assert report.resumed == still and len(names) == sum(len(m.members) for m in report.modules) - still
    assert pack(source, tmp_path / "wanted", other, quantizer, max_shard_bytes=50_000, **arguments).resumed == 0
    assert digests(out) == digests(tmp_path / "wanted")
    assert sorted(os.listdir(tmp_path)) == ["model", "out", "wanted"]


def test_a_plan_that_is_refused_at_the_end_is_mended(llama, tmp_path, monkeypatch):
    """Twice, since what was arranged once can be arranged again."""

    def refuse(*args):
        raise CheckpointError("refused")

    out, plans = tmp_path / "out", [UNIFORM, mended(UNIFORM, **{UP: {"bits": 3, "group_size": 16}})]
    plans.append(mended(plans[1], **{"model.layers.1.self_attn.o_proj": {"bits": 16}}))
    for number, plan in enumerate(plans[:2]):
        with monkeypatch.context() as patch:
            patch.setattr(mpq_kernels.packer.pack, "_finish", refuse)
            with pytest.raises(CheckpointError, match="refused") as caught:
                pack(llama, out, plan, "rtn", resume=bool(number))
        assert "also under another plan" in caught.value.__notes__[0]
    with pytest.raises(CheckpointError, match=r"kept by a run that was killed: resume=True"):
        pack(llama, out, plans[2], "rtn")
    report = pack(llama, out, plans[2], "rtn", resume=True)
    assert report.resumed == report.parts - 1  # o_proj itself is kept, and copied
    pack(llama, tmp_path / "wanted", plans[2], "rtn")
    assert digests(out) == digests(tmp_path / "wanted")
    assert sorted(os.listdir(tmp_path)) == ["out", "wanted"]


@pytest.mark.parametrize("place", ["mkdir", "copied", "named", "removed"])
def test_killed_while_parts_are_arranged(place, llama, tmp_path, monkeypatch):
    """Before the new journal has the old one's place, or after it: the finished parts count in both."""
    out, plan = tmp_path / "out", mended(UNIFORM, **{UP: {"bits": 3, "group_size": 16}})
    killed_pack(9, llama, out, UNIFORM, quantizer="rtn")

    def kill(*args, **kwargs):
        raise Killed

    unfinished = mpq_kernels.packer.unfinished
    where = {
        "mkdir": (unfinished.Path, "mkdir"),
        "copied": (unfinished, "arrange"),
        "named": (unfinished.Journal, "take_place_of"),
        "removed": (unfinished.shutil, "rmtree"),
    }[place]
    with monkeypatch.context() as patch:
        patch.setattr(*where, kill)
        with pytest.raises(Killed):
            pack(llama, out, plan, "rtn", resume=True)
    gc.collect()  # a process that is killed lets go of its lock
    assert pack(llama, out, plan, "rtn", resume=True).resumed == 8
    pack(llama, tmp_path / "wanted", plan, "rtn")
    assert digests(out) == digests(tmp_path / "wanted")
    assert sorted(os.listdir(tmp_path)) == ["out", "wanted"]


def test_what_is_arranged_is_compared(llama, tmp_path):
    killed_pack(9, llama, tmp_path / "out", UNIFORM, quantizer="rtn")
    file = journal_of(tmp_path / "out").with_suffix("") / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[8 + int.from_bytes(data[:8], "little") + 100] ^= 1
    file.write_bytes(data)
    plan = mended(UNIFORM, **{"model.layers.1.mlp.up_proj": {"bits": 3, "group_size": 16}})
    with pytest.raises(CheckpointError, match="q_proj is not as its run left it"):
        pack(llama, tmp_path / "out", plan, "rtn", resume=True)
    pack(llama, tmp_path / "out", plan, "rtn", resume=False)


def test_journal_says_what_was_read_and_written(llama, tmp_path):
    """Digests computed here from the files."""
    import hashlib

    from mpq_kernels.files.safetensors import read_header

    killed_pack(3, llama, tmp_path / "out", UNIFORM, quantizer="rtn")
    head, *lines = map(json.loads, journal_of(tmp_path / "out").read_text().splitlines())
    assert head["journal"] == 2 and set(head["identity"]["source"]) == {file.name for file in llama.glob("*.safet*s")}
    assert [line["part"] for line in lines] == [f"packed model.layers.0.self_attn.{x}_proj" for x in "qkv"]
    file = tmp_path / f".out.partial-{os.getpid()}" / "model.safetensors"
    entries, data = read_header(file).tensors, file.read_bytes()
    tensors = {name: tensor for shard in llama.glob("*.safetensors") for name, tensor in load_file(shard).items()}
    for line in lines:
        name = line["part"].removeprefix("packed ")
        weight = hashlib.sha256(tensors[f"{name}.weight"].numpy().tobytes()).hexdigest()
        assert line["inputs"] == {f"{name}.weight": weight}
        output = hashlib.sha256()
        for key in ("qweight", "scales", "zeros"):
            entry = entries[f"{name}.{key}"]
            output.update(data[entry.start : entry.end])
        assert line["output"] == output.hexdigest()
