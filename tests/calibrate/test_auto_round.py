"""auto-round: its codes, scales and zeros arrive unchanged, the plan reaches it, and what it cannot do is refused.

The library is an optional extra. All but the last test run on a stand-in for it, which rounds to nearest.
"""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

import mpq_kernels as mpq
from mpq_kernels.calibrate import auto_round
from mpq_kernels.calibrate.auto_round import QUANTIZER, layer_config, take
from mpq_kernels.calibrate.calibration import Calibration
from mpq_kernels.checkpoint.packed import PackedCheckpoint
from mpq_kernels.dense.checkpoint import DenseCheckpoint
from mpq_kernels.errors import QuantizeError
from mpq_kernels.format.codes import FORMATS
from mpq_kernels.format.layout import WeightLayout
from mpq_kernels.format.reference import dequantize
from mpq_kernels.format.weights import TORCH_DTYPES, QuantizedWeight
from mpq_kernels.format.words import unpack_weight
from mpq_kernels.plan.plan import EXPERTS
from mpq_kernels.plan.resolve import resolve
from mpq_kernels.quantize import quantize_weight
from tests.made.checkpoints import VOCAB, tiny_model
from tests.made.packed import digests

N, K = 48, 192
TOKENS = torch.randint(0, VOCAB, (6, 32), generator=torch.Generator().manual_seed(0))
RULES = {
    r"re:.*layers\.0\.(self_attn\.[qk]_proj|mlp\..*)": {"bits": 3, "group_size": 32},
    r"re:.*\.v_proj": {"bits": 5, "group_size": -1, "symmetric": True},
    r"re:.*layers\.1\.mlp\.up_proj": {"bits": 8, "group_size": 16, "symmetric": True},
    "model.layers.1.self_attn.o_proj": {"bits": 16},
    "lm_head": {"bits": 16},
}
FUSE = [{"name": "qkv_proj", "members": ["q_proj", "k_proj", "v_proj"]}]


def plan(**changes):
    rules = {"version": 1, "default": {"bits": 4, "group_size": 64}, "modules": RULES, "fuse": FUSE}
    return mpq.Plan.from_dict(rules | changes)


def dense(path, **changes):
    """A model whose sizes are multiples of 32."""
    return tiny_model("qwen2", path, **changes)


def tuned_layer(bits, zero, dtype, group_size=64, seed=0):
    """(layer as auto-round leaves it, its codes, zeros)."""
    generator = torch.Generator().manual_seed(seed)
    groups, top = K // group_size, FORMATS[bits].max_code
    codes = torch.randint(0, top + 1, (N, K), generator=generator)
    scales = (torch.rand(N, groups, generator=generator) * 0.1 + 1e-3).to(TORCH_DTYPES[dtype])
    zeros = torch.randint(0, top + 1, (N, groups), generator=generator).float()
    if zero == "none":
        scales *= torch.randint(0, 2, scales.shape, generator=generator) * 2 - 1
        zeros.fill_(2 ** (bits - 1))
    whole = codes.view(N, groups, -1) - zeros.unsqueeze(2)
    weight = (scales.unsqueeze(2) * whole).view(N, K)
    zp = 2 ** (bits - 1) if zero == "none" else zeros
    return SimpleNamespace(weight=weight, scale=scales, zp=zp), codes.to(torch.uint8), zeros


CASES = [
    (bits, zero, dtype, group)
    for bits in range(2, 9)
    for zero in ("int", "none")
    for dtype, group in (("float16", 64), ("bfloat16", K), ("float32", 16))
]


@pytest.mark.parametrize(("bits", "zero", "dtype", "group"), CASES)
def test_codes_scales_and_zeros_are_taken_as_they_are(bits, zero, dtype, group):
    layer, codes, zeros = tuned_layer(bits, zero, dtype, group)
    found = take(layer, WeightLayout.uniform(N, K, bits, group, zero, dtype), "m")
    assert found.layout == WeightLayout.uniform(N, K, bits, group, zero, dtype)
    block = found.blocks[0][2]
    assert torch.equal(block.codes, codes) and torch.equal(block.scales, layer.scale)
    assert block.zeros is None if zero == "none" else torch.equal(block.zeros.float(), zeros)
    assert torch.equal(dequantize(found), layer.weight.float())


def nudged(layer):
    layer.weight[3, 5] = torch.nextafter(layer.weight[3, 5], torch.tensor(torch.inf))


@pytest.mark.parametrize("zero", ["int", "none"])
def test_a_group_whose_scale_is_zero_is_a_group_of_zeros(zero):
    """Whatever the library leaves as its weight: its own scale may have had more digits."""
    layer, codes, _ = tuned_layer(4, zero, "float16")
    layer.scale[5, 1], layer.weight[5, 64:128] = 0, 1e-9
    block = take(layer, WeightLayout.uniform(N, K, 4, 64, zero, "float16"), "m").blocks[0][2]
    codes[5, 64:128] = 0
    assert torch.equal(block.codes, codes) and torch.equal(block.scales, layer.scale)
    assert not dequantize(QuantizedWeight.uniform(block))[5, 64:128].any()


WRONG = {
    "one bit of a weight": (nudged, "m: auto-round's weight is not .* bit by bit; auto-round 9.9 is installed"),
    "zeros between codes": (lambda x: x.zp.add_(0.5), "bit by bit"),
    "a code out of range": (lambda x: x.weight.mul_(2), "bit by bit"),
    "NaN": (lambda x: x.weight.fill_(torch.nan), "bit by bit"),
    "other groups": (lambda x: setattr(x, "scale", x.scale[:, :1]), "m: auto-round made 48 scales .* 48 x 3"),
    "left alone": (lambda x: delattr(x, "scale"), "m: auto-round left this linear as it was"),
}


@pytest.mark.parametrize("case", WRONG)
def test_anything_else_is_refused(case, stand_in):
    spoil, words = WRONG[case]
    layer, _, _ = tuned_layer(4, "int", "float16")
    spoil(layer)
    with pytest.raises(QuantizeError, match=words):
        take(layer, WeightLayout.uniform(N, K, 4, 64, "int", "float16"), "m")


@pytest.fixture
def stand_in(monkeypatch):
    """The library's interface; every linear in its layer_config is rounded to nearest. Gives the calls."""
    calls = []

    class AutoRound:
        def __init__(self, model, tokenizer, **options):
            self.model = model
            calls.append(options)
            print("words of auto-round")

        def quantize(self):
            for name, found in calls[-1]["layer_config"].items():
                layer = self.model.get_submodule(name)
                assert layer.weight.dtype == torch.float32
                if found["bits"] == 16:
                    continue
                dtype = str(found["scale_dtype"]).removeprefix("torch.")
                layout = WeightLayout.uniform(
                    *layer.weight.shape, found["bits"], found["group_size"], "none" if found["sym"] else "int", dtype
                )
                rounded = quantize_weight(layer.weight.detach(), layout, None, "rtn")
                block = rounded.blocks[0][2]
                layer.weight.data = dequantize(rounded)
                layer.scale = block.scales
                layer.zp = 2 ** (found["bits"] - 1) if block.zeros is None else block.zeros.float()
            return self.model, {}

    library = ModuleType("auto_round")
    library.AutoRound, library.__version__ = AutoRound, "9.9"
    library.SignRoundConfig = lambda **options: SimpleNamespace(**options)
    monkeypatch.setitem(sys.modules, "auto_round", library)
    return calls


def test_what_the_library_raises_comes_in_words(tmp_path, stand_in, monkeypatch):
    dense(tmp_path / "m", tied=False, dtype=torch.bfloat16)

    def quantize(self):
        raise KeyError("sliding_attention")

    monkeypatch.setattr(sys.modules["auto_round"].AutoRound, "quantize", quantize)
    with pytest.raises(QuantizeError, match=r"auto-round stopped \(KeyError: .*sliding.*Otherwise choose 'rtn'"):
        mpq.pack(tmp_path / "m", tmp_path / "out", plan(), QUANTIZER, Calibration(tokens=TOKENS))


def test_pack_takes_what_the_library_made(tmp_path, stand_in, capsys):
    """Fused members of different widths, a kept linear, a packed head: the codes of the stand-in, and nothing else."""
    dense(tmp_path / "m", tied=False, dtype=torch.bfloat16)
    rules = plan(modules=RULES | {"lm_head": {"bits": 6, "group_size": 32, "scale_dtype": "bfloat16"}})
    report = mpq.pack(tmp_path / "m", tmp_path / "out", rules, QUANTIZER, Calibration(tokens=TOKENS, max_tokens=160))
    mpq.pack(tmp_path / "m", tmp_path / "rtn", rules, "rtn")
    packed, plain = PackedCheckpoint.open(tmp_path / "out"), PackedCheckpoint.open(tmp_path / "rtn")
    assert packed.packing.quantizer == report.quantizer == QUANTIZER and packed.modules.keys() == plain.modules.keys()
    for name in packed.modules:
        found, wanted = unpack_weight(packed.weight(name)), unpack_weight(plain.weight(name))
        for (_, _, one), (_, _, other) in zip(found.blocks, wanted.blocks, strict=True):
            assert torch.equal(one.codes, other.codes) and torch.equal(one.scales, other.scales), name
    (options,) = stand_in
    assert torch.equal(torch.cat(options["dataset"]), TOKENS[:5]) and options["seqlen"] == 32
    assert (options["nsamples"], options["batch_size"], options["amp"]) == (5, 5, False)
    assert options["alg_configs"].iters == auto_round.STEPS
    assert capsys.readouterr().out == ""
    with torch.no_grad():
        assert torch.isfinite(mpq.load(tmp_path / "out")(TOKENS[:1]).logits).all()


def test_every_linear_is_named_to_the_library(tmp_path):
    dense(tmp_path / "m")
    linears = DenseCheckpoint.open(tmp_path / "m").linears()
    resolved = resolve(plan(), linears)
    members = [member for weight in resolved.weights for member in weight.members]
    found = layer_config(members, ["model.layers.1.self_attn.o_proj"])
    assert found.keys() == {spec.name for spec in linears if not spec.is_head}
    seen = {name: (row["bits"], row.get("group_size"), row.get("sym")) for name, row in found.items()}
    assert seen["model.layers.0.mlp.down_proj"] == (3, 32, False)
    assert seen["model.layers.1.self_attn.v_proj"] == (5, 64, True)
    assert seen["model.layers.1.mlp.up_proj"] == (8, 16, True)
    assert seen["model.layers.1.self_attn.o_proj"] == (16, None, None)
    assert all(row["act_bits"] == 16 for row in found.values())


DOWN = "model.layers.0.mlp.down_proj"
HALVES = [{"cols": [0, 64], "bits": 2}, {"cols": [64, None], "bits": 4}]
REFUSED = {
    "segments": ({DOWN: {"bits": 4, "group_size": 32, "segments": HALVES}}, "down_proj .its rows or columns have diff"),
    "permutation": ({DOWN: {"bits": 4, "perm": list(range(128))[::-1]}}, "down_proj .its columns are permuted"),
    "float zeros": ({DOWN: {"bits": 4, "zero": "float"}}, "down_proj .its zeros are float"),
    "1 bit": ({DOWN: {"bits": 1}}, "down_proj .1 bit"),
    "8 bits": ({DOWN: {"bits": 8}}, "down_proj .8 bits need symmetric=true"),
    "tied head": ({"lm_head": {"bits": 4}}, "lm_head .its weight is also the embedding"),
    "many": ({"re:.*proj": {"bits": 1}}, r"q_proj .1 bit., .*k_proj .*v_proj .1 bit. and 11 more: change the plan"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_it_cannot_do_is_refused_before_any_work(case, tmp_path, stand_in):
    rules, words = REFUSED[case]
    dense(tmp_path / "m", tied=True)
    changed = plan(modules={"lm_head": {"bits": 16}} | rules, fuse=[])
    with pytest.raises(QuantizeError, match=words):
        mpq.pack(tmp_path / "m", tmp_path / "out", changed, QUANTIZER, Calibration(tokens=TOKENS))
    assert not stand_in and not (tmp_path / "out").exists()


def test_sizes_that_it_would_skip_are_refused(tmp_path, stand_in):
    tiny_model("llama", tmp_path / "m")  # 172 is no multiple of 32
    rules = mpq.Plan.from_dict({"version": 1, "default": {"bits": 4, "group_size": -1}})
    with pytest.raises(QuantizeError, match=r"mlp.gate_proj .172 x 64: N and K must be multiples of 32.* and 3 more"):
        mpq.pack(tmp_path / "m", tmp_path / "out", rules, QUANTIZER, Calibration(tokens=TOKENS))


def test_mixture_models_are_refused(tmp_path, stand_in):
    tiny_model("mixtral", tmp_path / "m")
    for rules, words in (({}, "it belongs to an expert"), ({EXPERTS: {"bits": 16}}, "is a mixture model")):
        chosen = mpq.Plan.from_dict({"version": 1, "default": {"bits": 4, "group_size": -1}, "modules": rules})
        with pytest.raises(QuantizeError, match=words):
            mpq.pack(tmp_path / "m", tmp_path / "out", chosen, QUANTIZER, Calibration(tokens=TOKENS))


@pytest.mark.parametrize("option", [{"act_order": True}, {"token_weights": lambda h, t, b: torch.ones(t.shape)}])
def test_options_that_it_lacks_are_refused(option, tmp_path, stand_in):
    dense(tmp_path / "m")
    with pytest.raises(QuantizeError, match=f"'auto-round' has no {next(iter(option))}"):
        mpq.pack(tmp_path / "m", tmp_path / "out", plan(), QUANTIZER, Calibration(tokens=TOKENS, **option))


def test_without_the_library_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "auto_round", None)
    dense(tmp_path / "m")
    with pytest.raises(QuantizeError, match=r"pip install 'mpq_kernels\[auto-round\]'"):
        mpq.pack(tmp_path / "m", tmp_path / "out", plan(), QUANTIZER, Calibration(tokens=TOKENS))
    assert not (tmp_path / "out").exists()
    with pytest.raises(QuantizeError, match="'auto-round' uses no Hessian"):
        quantize_weight(torch.ones(2, 2), WeightLayout.uniform(2, 2, 4, 2), None, QUANTIZER, hessian=torch.eye(2))


def test_a_kept_linear_that_was_quantized_is_noticed(tmp_path, stand_in, monkeypatch):
    dense(tmp_path / "m")
    monkeypatch.setattr(auto_round, "KEPT_BITS", 4)
    monkeypatch.setattr(
        auto_round, "layer_config", lambda members, kept: layer_config(members, ()) | dict.fromkeys(kept, ROW)
    )
    with pytest.raises(QuantizeError, match="auto-round quantized model.layers.1.self_attn.o_proj, which the plan kee"):
        mpq.pack(tmp_path / "m", tmp_path / "out", plan(), QUANTIZER, Calibration(tokens=TOKENS))


ROW = {"bits": 4, "group_size": 32, "sym": False, "scale_dtype": torch.float16}


def test_the_library_itself(tmp_path, monkeypatch):
    """Every width that it has, beside each other; the same bytes twice; nearer to the model's output than rounding."""
    pytest.importorskip("auto_round", reason="auto-round is not installed: pip install 'mpq_kernels[auto-round]'")
    monkeypatch.setattr(auto_round, "STEPS", 20)
    model = dense(tmp_path / "m", tied=False)
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    widths = zip(names, (2, 3, 4, 5, 6, 7, 8), strict=True)
    rules = {rf"re:.*layers\.0.*{n}": {"bits": b, "group_size": 32, "symmetric": b == 8} for n, b in widths}
    chosen = plan(
        modules=rules | {r"re:.*layers\.1\..*": RULES["re:.*\\.v_proj"] | {"bits": 2}, "lm_head": {"bits": 4}}
    )
    for out in ("a", "b"):
        mpq.pack(tmp_path / "m", tmp_path / out, chosen, QUANTIZER, Calibration(tokens=TOKENS))
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    mpq.pack(tmp_path / "m", tmp_path / "rtn", chosen, "rtn")
    off = {}
    with torch.no_grad():
        wanted = model.float()(TOKENS).logits
        for kind in ("a", "rtn"):
            found = mpq.load(tmp_path / kind, dtype=torch.float32)(TOKENS).logits
            off[kind] = float((found - wanted).square().mean())
    assert off["a"] < off["rtn"]
