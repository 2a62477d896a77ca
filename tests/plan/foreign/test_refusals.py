"""Foreign files that are refused: hostile ones before anything runs, and those that say what cannot be had."""

import json
import os
import pickle
import zipfile

import pytest
import torch

from mpq_kernels import PlanError
from mpq_kernels.plan.foreign import FORMATS, read_foreign
from mpq_kernels.plan.foreign.documents import MAX_BYTES, MAX_YAML_BYTES
from tests.made.foreign import linears, write
from tests.plan.foreign.test_reads import COMPRESSED, FLOAT, GPTQ, ROUND, slim, weights

EXPERTS = {str(block): {str(expert): 2 for expert in range(3)} for block in range(2)}
Q0 = "model.layers.0.self_attn.q_proj"


class Bomb:
    """Makes a directory when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def changed(base, **more):
    return base | more


def group(**more):
    return COMPRESSED | {"config_groups": {"g": {"targets": ["Linear"], "weights": weights(4, 128)} | more}}


SLIM, SHIFT = ("slim-llm", "llama", "a.json"), ("shiftaddllm", "llama", "a.json")
MC_MOE, STRING = ("mc-moe", "mixtral", "a.json"), ("quantmoe", "mixtral", "a.txt")
MIXDQ, MODEL = ("mixdq", "llama", "w.yaml"), ("gptqmodel", "llama", "a.json")
ROUNDS, TENSORS = ("auto-round", "llama", "a.json"), ("compressed-tensors", "llama", "a.json")

JSON = ", ".join(name for name, row in FORMATS.items() if "json" in row.kinds)

# format, model, file, content, options, words of the message
REFUSED = [
    (*SLIM, {"0": {"self_attn.qq_proj": [2, 2]}}, {}, "did you mean self_attn.q_proj"),
    (*SLIM, {"7": {"self_attn.q_proj": [2, 2]}}, {}, "layer 7, self_attn.q_proj"),
    (*SLIM, {"0": {"self_attn.q_proj": [2]}}, {}, "K=256 has 2 groups of 128 columns"),
    (*SLIM, {"0": {"self_attn.q_proj": [2, 9]}}, {}, r"q_proj\[1\]: bits=9 is neither"),
    (*SLIM, {"0": {"self_attn.q_proj": [2, 2.0]}}, {}, r"bits=2\.0 is neither"),
    (*SLIM, {"0": {"self_attn.q_proj": [2, True]}}, {}, "bits=True is neither"),
    (*SLIM, {"0": {"self_attn.q_proj": [2, 16]}}, {}, "cannot be kept in 16 bits"),
    (*SLIM, {"0": {"self_attn.q_proj": 2}}, {}, "2 is not a list of widths"),
    (*SLIM, {"0": [1]}, {}, "is not a table of module names"),
    (*SLIM, {"x": {}}, {}, "layer 'x': is not the number of a layer"),
    (*SLIM, {"0": {}, "00": {}}, {}, "layer 0: appears twice"),
    ("slim-llm", "llama", "a.pt", {0: {"self_attn.q_proj": torch.ones(2)}}, {}, "is no list of widths"),
    ("slim-llm", "llama", "a.pt", slim(int), {"group_size": 100}, "100 is not a multiple of 64"),
    ("slim-llm", "llama", "a.pt", slim(int), {"attention_bits": 4}, "attention_bits=4: slim-llm files say that"),
    ("mc-moe", "llama", "a.json", EXPERTS, {}, "the model has none that can be packed"),
    (*MC_MOE, EXPERTS | {"2": {"0": 2}}, {}, r"experts 0\.\.2 in blocks 0\.\.1"),
    (*MC_MOE, EXPERTS | {"1": {"0": 2}}, {}, "expert 1 has no width, nor have 1 others"),
    (*MC_MOE, EXPERTS | {"1": {"0": 2, "1": 0, "2": 2}}, {}, "block 1, expert 1: bits=0"),
    (*MC_MOE, EXPERTS | {"1": {"0": 2, "1": 16, "2": 2}}, {}, "--kept-experts 8"),
    (*MC_MOE, EXPERTS, {"attention_bits": 9}, "attention_bits: bits=9"),
    (*MC_MOE, EXPERTS, {"kept_experts": 16}, r"kept_experts=16 is not a width 1\.\.8"),
    ("mixdq", "llama", "act/8.yaml", f"{Q0}: 8\n", {}, "quantizes weights alone"),
    ("mixdq", "llama", "act_7.77.yaml", f"{Q0}: 8\n", {}, "quantizes weights alone"),
    (*MIXDQ, f"{Q0}x: 8\n", {}, f"did you mean {Q0}"),
    (*MIXDQ, f"{Q0}: 8.5\n", {}, r"bits=8\.5"),
    (*MIXDQ, f"{Q0}: [4]\n", {}, r"bits=\[4\]"),
    (*MIXDQ, "4: 4\n", {}, "is not the name of a module"),
    (*MIXDQ, "- 4\n", {}, "is not a table of module names"),
    (*MIXDQ, f"{Q0}: 8\n{Q0}: 4\n", {}, "line 2: the key .* appears twice"),
    (*MIXDQ, f"a: &x 4\n{Q0}: *x\n", {}, "line 2: aliases are not read"),
    (*MIXDQ, f"{Q0}: !!python/object/apply:os.mkdir [made]\n", {}, "not YAML that is safe to load"),
    (*MIXDQ, "[" * 200 + "]" * 200, {}, "nested more than 100 deep"),
    (*MIXDQ, "? [a, b]\n: 4\n", {}, "not YAML that is safe to load"),
    (*MIXDQ, f"{Q0}: {'9' * 5000}\n", {}, "not YAML that is safe to load"),
    (*MIXDQ, "#" * (MAX_YAML_BYTES + 1), {}, "bytes of YAML, more than the limit"),
    (*MIXDQ, b"\xff\xfe", {}, "not YAML that is safe to load"),
    ("mixdq", "llama", "w.json", {Q0: 4}, {}, "holds json, and this format is read from yaml"),
    (*MIXDQ, f"{Q0}: 8\n", {"group_size": 0}, "group_size=0 is neither"),
    (*MIXDQ, f"{Q0}: 8\n", {"group_size": 48}, "group_size=48 does not divide K=256"),
    (*SHIFT, {Q0: {"bits": 3, "colwise": True}}, {}, "'colwise' is unknown; did you mean columnwise"),
    (*SHIFT, {Q0: {"columnwise": True}}, {}, "key 'bits' is missing"),
    (*SHIFT, {Q0: {"bits": 3, "columnwise": 1}}, {}, "columnwise: 1 is neither true nor false"),
    (*SHIFT, {Q0: 3}, {}, "3 is not an object such as"),
    (*SHIFT, {"model.layers.0.fc1": {"bits": 2, "columnwise": True}}, {}, "no linear of this name"),
    ("quantmoe", "llama", "a.txt", "main_2", {}, "the model has none that can be packed"),
    (*STRING, "main_2.atn_4", {}, r"word 2 at character 7, 'atn_4': is not a word .* attn_B"),
    (*STRING, "main_2..attn_4", {}, "word 2 at character 7, ''"),
    (*STRING, "attn_4", {}, "main_B, the width of all experts, is missing"),
    (*STRING, "main_2.main_3", {}, "word 2 at character 7, 'main_3': main_ was already given: word 1"),
    (*STRING, "main_16", {}, "word 1 at character 0, 'main_16': this word takes one digit"),
    (*STRING, "main_9", {}, "bits=9 is neither"),
    (*STRING, "main_2.exp_l0e3_4", {}, "word 2 at character 7, 'exp_l0e3_4': there is no such"),
    (*STRING, "main_2.layer_2_4", {}, "there is no such thing in the model"),
    (*STRING, "main_2.keyword__gate_proj__4", {}, "there is no such thing in the model"),
    (*STRING, "main_2.exp_l0e1_16", {}, "--kept-experts 8"),
    (*STRING, "main_2.layer_0_12", {}, "bits=12 is neither"),
    ("quantmoe", "shared", "a.txt", "moe.shared_4.other.3+other_block_4", {}, "did you mean moe.shared_4.other.2"),
    (*MODEL, changed(GPTQ, bits=9), {}, "the config.bits: bits=9"),
    (*MODEL, changed(GPTQ, bits="4"), {}, "bits='4'"),
    (*MODEL, {"group_size": 128}, {}, "bits: is missing"),
    (*MODEL, changed(GPTQ, group_size=0), {}, "group_size=0 is neither"),
    (*MODEL, changed(GPTQ, sym="yes"), {}, "sym: 'yes' is neither true nor false"),
    (*MODEL, changed(GPTQ, quant_method="awq"), {}, "'awq' is not 'gptq'"),
    (*MODEL, changed(GPTQ, dynamic=[1]), {}, "dynamic: .* is not an object"),
    (*MODEL, changed(GPTQ, dynamic={"(": {}}), {}, "is not a regular expression"),
    (*MODEL, changed(GPTQ, dynamic={"a" * 1001: {}}), {}, "of 1001 characters, more than 1000"),
    (*MODEL, changed(GPTQ, dynamic={f".*{i}": {} for i in range(1001)}), {}, "more than 1000 reg"),
    (*MODEL, changed(GPTQ, dynamic={"q_proj": {"bits": 8}}), {}, "the beginning of no linear's name"),
    (
        *MODEL, changed(GPTQ, dynamic={r"^model\.layers\.0\.mlp\.up_pro$": {"bits": 8}}), {},
        "did you mean model.layers.0.mlp.up_proj",
    ),
    (*MODEL, changed(GPTQ, dynamic={".*": {"method": "fp8"}}), {}, "'fp8' is another method"),
    (*MODEL, changed(GPTQ, group_size=100), {}, "group_size=100 does not divide K=256"),
    (*MODEL, GPTQ, {"group_size": 64}, "gptqmodel files say that themselves"),
    (*ROUNDS, changed(ROUND, quant_method="awq"), {}, "'awq' is not 'auto-round'"),
    (*ROUNDS, changed(ROUND, bits=9), {}, "bits=9 is neither"),
    (*ROUNDS, changed(ROUND, data_type="mx_fp"), {}, "'mx_fp' is not a plain integer type"),
    (*ROUNDS, changed(ROUND, data_type="int_asym_dq"), {}, "--keep-floats"),
    (*ROUNDS, changed(ROUND, group_size=[128, 128]), {}, r"group_size=\[128, 128\]"),
    (*ROUNDS, changed(ROUND, dynamic={"a": {}}), {}, "write them as extra_config"),
    (*ROUNDS, changed(ROUND, to_quant_block_names="model.lay.0"), {}, "no linear's name begins"),
    (*ROUNDS, changed(ROUND, block_name_to_quantize=4), {}, "4 is neither text nor a list"),
    (*ROUNDS, changed(ROUND, extra_config={Q0 + "x": {"bits": 8}}), {}, f"did you mean {Q0}"),
    (*ROUNDS, changed(ROUND, extra_config={"*": {"bits": 8}}), {}, "is not a regular expression"),
    (*ROUNDS, changed(ROUND, extra_config={Q0: 8}), {}, "8 is not an object"),
    (*TENSORS, {"config_groups": {}}, {}, "is missing or empty"),
    (*TENSORS, changed(COMPRESSED, quant_method="gptq"), {}, "'gptq' is not"),
    (*TENSORS, {"config_groups": {"W4A16": ["Linear"]}}, {}, "the name of a preset scheme"),
    (*TENSORS, group(weights=FLOAT), {}, "not fp8, nvfp4 or mxfp4; keep_floats"),
    (*TENSORS, group(weights=weights(12)), {}, "num_bits: bits=12"),
    (*TENSORS, group(weights={"num_bitz": 4}), {}, "num_bitz: .*did you mean num_bits"),
    (*TENSORS, group(weight={}), {}, "weight: is an unknown key; did you mean weights"),
    (*TENSORS, group(weights=weights(4, dynamic=True)), {}, "cannot be packed"),
    (*TENSORS, group(weights={"strategy": "block"}), {}, "'block' is not one of"),
    (*TENSORS, group(weights={"strategy": "group"}), {}, "needs a positive one"),
    (*TENSORS, group(targets=["Linaer"]), {}, "did you mean Linear"),
    (*TENSORS, group(targets=["re:layers"]), {}, "the beginning of no linear's name"),
    (*TENSORS, group(targets="Linear"), {}, "'Linear' is not a list of names"),
    (*TENSORS, changed(COMPRESSED, ignore=["re:("]), {}, "is not a regular expression"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("form", "model", "file", "content", "options", "words"), REFUSED, ids=lambda v: v if isinstance(v, str) else ""
)
def test_refusals_say_what_and_where(form, model, file, content, options, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path, file, content)
    if words is None:
        assert set(rule.bits for rule in read_foreign(path, form, linears(model), **options).plan.modules.values()) == {
            16
        }
        return
    with pytest.raises(PlanError, match=words) as caught:
        read_foreign(path, form, linears(model), **options)
    named = options and ("files say" in str(caught.value) or "kept_experts" in str(caught.value))
    assert str(path) in str(caught.value) or named
    assert not (tmp_path / "made").exists()


def test_every_format_is_refused_something():
    assert {row[0] for row in REFUSED} == set(FORMATS)


@pytest.mark.parametrize("text", ["a: !!bool x", "a: !!int x", "a: 2001-99-99", "a: !!float x", "a: &b 1\n? [*b]: 2"])
def test_yaml_that_pyyaml_cannot_make_is_refused(text, tmp_path):
    with pytest.raises(PlanError, match=r"w\.yaml"):
        read_foreign(write(tmp_path, "w.yaml", text), "mixdq", linears("llama"))


@pytest.mark.parametrize("odd", [torch.empty(2, device="meta"), torch.ones(2).to_sparse(), torch.ones(1).expand(10**9)])
def test_tensors_without_plain_numbers_are_refused(odd, tmp_path):
    for form, value in (("slim-llm", {0: {"self_attn.q_proj": odd}}), ("mc-moe", {0: {0: odd.to_dense()[:1].sum()}})):
        model = "llama" if form == "slim-llm" else "mixtral"
        with pytest.raises(PlanError, match=r"a\.pt"):
            read_foreign(write(tmp_path, "a.pt", value), form, linears(model))


def test_damaged_archives_are_refused(tmp_path):
    path = write(tmp_path, "a.pt", {0: {"self_attn.q_proj": [2, 2]}})
    data = bytearray(path.read_bytes())
    at = data.rfind(b"data.pkl")
    data[at : at + 4], data[8 + data.rfind(b"PK\1\2")] = b"\xff" * 4, 255  # no UTF-8, and said to be UTF-8
    for cut in (data, data[:-30], data[: len(data) // 2], data[:4]):
        with pytest.raises(PlanError, match=r"a\.pt: "):
            read_foreign(write(tmp_path, "a.pt", bytes(cut)), "slim-llm", linears("llama"))


def torch_zip(path, payload: bytes):
    """What torch.save writes, with another pickle in it."""
    torch.save({}, path)
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, payload if name.endswith("/data.pkl") else data)


@pytest.mark.parametrize("form", ["mc-moe", "slim-llm", "gptqmodel", "auto"])
@pytest.mark.parametrize("protocol", [0, 2, 5])
@pytest.mark.parametrize("name", ["plan.pkl", "plan.pt", "plan.json", "plan"])
def test_a_pickle_is_never_loaded(form, protocol, name, tmp_path):
    made = tmp_path / "made"
    path = write(tmp_path, name, pickle.dumps(Bomb(made), protocol))
    with pytest.raises(PlanError, match=str(path)) as caught:
        read_foreign(path, form, linears("mixtral"))
    assert not made.exists()
    if protocol or name in ("plan.pkl", "plan.pt"):
        assert "runs whatever code it holds" in str(caught.value) and "json.dump" in str(caught.value)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol 5")
@pytest.mark.parametrize("form", ["mc-moe", "slim-llm", "auto"])
def test_a_pickle_inside_a_torch_file_is_not_executed(form, tmp_path):
    made = tmp_path / "made"
    for number, payload in enumerate((pickle.dumps(Bomb(made), 2), pickle.dumps(Bomb(made), 5), b"garbage")):
        torch_zip(tmp_path / f"{number}.pt", payload)
        with pytest.raises(PlanError, match="restricted reader refuses it"):
            read_foreign(tmp_path / f"{number}.pt", form, linears("mixtral"))
        assert not made.exists()
    pickle.loads(pickle.dumps(Bomb(made), 2))  # the bomb works
    assert made.exists()


def test_zip_archives_that_torch_does_not_write_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "other.pt", "w") as archive:
        archive.writestr("x/data.txt", "1")
    with zipfile.ZipFile(tmp_path / "large.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", b"\0" * (MAX_BYTES + 1))
    write(tmp_path, "cut.pt", b"PK\x03\x04 and no more")
    for name, words in (("other", "has no data.pkl"), ("large", "unpacks to"), ("cut", "damaged zip archive")):
        with pytest.raises(PlanError, match=words):
            read_foreign(tmp_path / f"{name}.pt", "auto", linears("mixtral"))
    assert (tmp_path / "large.pt").stat().st_size < MAX_BYTES // 100


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.json", '{"bits": 4, "bits": 8}', "the key 'bits' appears twice"),
        ("a.json", '{"bits": NaN}', "NaN is not JSON"),
        ("a.json", '{"bits": ', "not valid JSON"),
        ("a.json", '{"a":' * 100_000, "not valid JSON"),
        ("a.json", b"{\xff", "not valid JSON"),
        ("a.txt", b"\xffmain", "neither UTF-8 text nor"),
        ("a.json", " " * (MAX_BYTES + 1), "the limit for a plan"),
        (
            "a.json",
            {"modules": {}},
            rf"looks like none of {JSON}, which json can hold; say which with --from",
        ),
        ("a.json", COMPRESSED | ROUND, "could be auto-round or compressed-tensors; say which"),
        ("a.txt", "2 bits please", "looks like none of quantmoe, which text can hold"),
    ],
)
def test_unreadable_and_ambiguous_files_are_refused(name, content, words, tmp_path):
    path = write(tmp_path, name, content)
    with pytest.raises(PlanError, match=words) as caught:
        read_foreign(path, "auto", linears("llama"))
    assert str(path) in str(caught.value)


def test_what_is_no_file_or_no_format_is_refused(tmp_path):
    with pytest.raises(PlanError, match="is not a file"):
        read_foreign(tmp_path / "none.json", "gptqmodel", linears("llama"))
    with pytest.raises(PlanError, match="is not a file"):
        read_foreign(tmp_path, "auto", linears("llama"))
    with pytest.raises(PlanError, match="'slim' is not a known format; did you mean slim-llm"):
        read_foreign(tmp_path, "slim", linears("llama"))
    with pytest.raises(PlanError, match="no linear layers"):
        read_foreign(write(tmp_path, "q.json", json.dumps(GPTQ)), "gptqmodel", [])
