"""Packed modules in ONNX Runtime: its own MatMulNBits where that is exact, ours for the rest. `make test-onnx`."""

import numpy as np
import pytest
import torch

onnx = pytest.importorskip("onnx", reason="needs onnx: make test-onnx")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime: make test-onnx")

import mpq_kernels as mpq  # noqa: E402
import mpq_kernels.backends.ops  # noqa: E402, F401  (registers the operators)
from mpq_kernels import capi  # noqa: E402
from mpq_kernels.checkpoint.packed import PackedCheckpoint  # noqa: E402
from mpq_kernels.cli import main  # noqa: E402
from mpq_kernels.format import reference  # noqa: E402
from mpq_kernels.format.layout import Segment  # noqa: E402
from mpq_kernels.format.weights import QuantizedWeight  # noqa: E402
from mpq_kernels.format.words import pack_weight  # noqa: E402
from mpq_kernels.onnx import export_directory, export_module  # noqa: E402
from tests.made.checkpoints import tiny_model  # noqa: E402
from tests.made.mixtures import expert_plan  # noqa: E402
from tests.made.packed import mixed_plan  # noqa: E402
from tests.made.weights import BITS, ZEROS, mixed_weight, random_block, random_perm, random_weight  # noqa: E402

BFLOAT16 = 16  # of ONNX; numpy has none, so onnxruntime takes it as OrtValue


def operands(packed):
    return packed.qweight, packed.scales, packed.zeros, packed.perm


def shape(packed):
    return packed.layout.segment_ints(), packed.layout.out_features, packed.layout.in_features


def session(model, custom=True):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    if custom:
        options.register_custom_ops_library(str(capi.library()))
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run(model, x, **words):
    return torch.from_numpy(session(model, **words).run(None, {"x": x.numpy()})[0])


def kinds(model):
    return {node.op_type for node in model.graph.node}


def same_bits(a, b):
    integers = {2: torch.int16, 4: torch.int32}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.view(integers), b.contiguous().view(integers))


def exact_zeros(weight):
    """The same weight with zeros that are codes, which MatMulNBits can store."""
    for _, _, block in weight.blocks:
        if block.zeros is not None:
            block.zeros.clamp_(max=2**block.bits - 1)
    return weight


def check_nbits(packed, bias=None):
    """One-hot x gives the dequantized weight bit for bit; random x its product, within what fp32 sums may be off."""
    model = export_module(packed, bias, operators="nbits")
    onnx.checker.check_model(model)
    assert "MatMulNBits" in kinds(model) and "Linear" not in kinds(model)
    dense, k = reference.dequantize(packed), packed.layout.in_features
    if bias is None:
        assert torch.equal(run(model, torch.eye(k), custom=False), dense.T)
        assert torch.equal(run(model, torch.eye(k)[3:4], custom=False), dense[:, 3:4].T)
    for tokens in (1, 7, 40):
        x = torch.randn(tokens, k)
        wanted = x.double() @ dense.double().T + (0 if bias is None else bias.double())
        # K products and sums, one more for a bias, in any order: (K + 2) * 2**-24 of the sum of magnitudes, margin 2.
        size = x.double().abs() @ dense.double().abs().T + (0 if bias is None else bias.double().abs())
        assert ((run(model, x, custom=False).double() - wanted).abs() <= (k + 2) * 2.0**-23 * size).all()


@pytest.mark.parametrize("group", [16, 32, 48, 64, -1])
@pytest.mark.parametrize("zero", ["none", "int"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_matmul_nbits_is_exact(bits, zero, group):
    for n, k in ((70, 192), (3, 172) if group == -1 else (5, 768)):
        check_nbits(pack_weight(exact_zeros(random_weight(n, k, bits, group, zero))))


@pytest.mark.parametrize("scale_dtype", ["float16", "bfloat16", "float32"])
def test_bands_columns_and_permutation(scale_dtype):
    segments = (
        Segment(0, 70, 0, 128, 4, 64, "int"),
        Segment(0, 70, 128, 320, 8, 32, "none"),
        Segment(70, 134, 0, 320, 2, 320, "none"),
    )
    blocks = [
        (s.n0, s.k0, random_block(s.rows, s.cols, s.bits, s.group_size, s.zero, scale_dtype, i))
        for i, s in enumerate(segments)
    ]
    weight = exact_zeros(QuantizedWeight(tuple(blocks), random_perm(320)))
    check_nbits(pack_weight(weight))
    check_nbits(pack_weight(weight), torch.randn(134).half())


REFUSALS = {
    "3 bits": ({"bits": 3}, {}, "has no 3-bit codes"),
    "groups": ({"bits": 4, "group_size": 24}, {}, "no groups of 24"),
    "half zeros": ({"bits": 4, "zero": "half"}, {}, "zeros of kind half"),
    "float zeros": ({"bits": 4, "zero": "float"}, {}, "zeros of kind float"),
    "minima": ({"bits": 4, "zero": "min"}, {}, "zeros of kind min"),
    "x of fp16": ({"bits": 4, "zero": "none"}, {"dtype": "float16"}, "rounds with x of float16"),
    "int8": ({"bits": 4, "zero": "none"}, {"activations": "int8"}, "activations of its own"),
    "an embedding": ({"bits": 4, "zero": "none"}, {"embedding": True}, "looks up no rows"),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_what_matmul_nbits_cannot_do_is_told_and_goes_to_our_operator(what):
    fields, words, text = REFUSALS[what]
    packed = pack_weight(random_weight(8, 192, **{"group_size": 64} | fields))
    with pytest.raises(mpq.UnsupportedError, match=f'{text}.*operators="custom"'):
        export_module(packed, operators="nbits", **words)
    assert kinds(export_module(packed, **words)) <= {"Linear", "Embedding"}


def test_zeros_outside_of_the_codes_are_told():
    weight = random_weight(8, 192, 4, 64)
    weight.blocks[0][2].zeros[0, 0] = 16
    with pytest.raises(mpq.UnsupportedError, match="no zero of 16 for 4-bit codes"):
        export_module(pack_weight(weight), operators="nbits")


@pytest.mark.parametrize("zero", ZEROS)
@pytest.mark.parametrize("bits", BITS)
def test_our_operator_is_that_of_torch(bits, zero):
    packed = pack_weight(random_weight(70, 192, bits, 64, zero, permuted=bits % 2 == 0))
    bias, x = torch.randn(70).bfloat16(), torch.randn(5, 192)
    for dtype in (torch.float32, torch.float16):
        for activations, product in (("exact", torch.ops.mpq.linear), ("int8", torch.ops.mpq.linear_int8)):
            name = str(dtype).removeprefix("torch.")
            model = export_module(packed, bias, "custom", name, activations)
            wanted = product(x.to(dtype), *operands(packed), bias, *shape(packed))
            assert same_bits(run(model, x.to(dtype)), wanted)


def test_our_operator_with_bfloat16():
    packed, x = pack_weight(mixed_weight(permuted=True)), torch.randn(4, 320).bfloat16()
    made = session(export_module(packed, None, "custom", "bfloat16"))
    value = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(x.view(torch.int16).numpy(), BFLOAT16)
    binding = made.io_binding()
    binding.bind_ortvalue_input("x", value)
    binding.bind_output("y", "cpu")
    made.run_with_iobinding(binding)
    (y,) = binding.get_outputs()
    got = torch.utils.dlpack.from_dlpack(y._ortvalue.to_dlpack()) if hasattr(y._ortvalue, "to_dlpack") else None
    assert y.element_type() == BFLOAT16 and got is not None
    assert same_bits(got, torch.ops.mpq.linear(x, *operands(packed), None, *shape(packed)))


def test_large_weights_use_threads():
    packed, x = pack_weight(random_weight(1030, 1024, 3, 64)), torch.randn(3, 1024)
    wanted = torch.ops.mpq.linear(x, *operands(packed), None, *shape(packed))
    assert same_bits(run(export_module(packed), x), wanted)


def test_sessions_together():
    """The threads are those of all sessions."""
    packed, x = pack_weight(random_weight(1030, 1024, 3, 64)), torch.randn(1, 1024)
    made = [session(export_module(packed)) for _ in range(2)]
    wanted = torch.ops.mpq.linear(x, *operands(packed), None, *shape(packed))
    for _ in range(5):
        assert all(same_bits(torch.from_numpy(s.run(None, {"x": x.numpy()})[0]), wanted) for s in made)


def test_embeddings():
    packed = pack_weight(mixed_weight(permuted=True))
    made, ids = session(export_module(packed, embedding=True)), torch.tensor([3, 199, 0, 70])
    rows = torch.from_numpy(made.run(None, {"ids": ids.numpy()})[0])
    wanted = torch.ops.mpq.embedding(ids, *operands(packed), *shape(packed), torch.float32)
    assert same_bits(rows, wanted)
    with pytest.raises(Exception, match="an id is outside"):
        made.run(None, {"ids": np.array([200])})


def test_a_damaged_model_is_refused_when_it_runs():
    packed = pack_weight(random_weight(8, 192, 3, 64))
    for name, text in (("qweight", "qweight has"), ("table", "the table has no header"), ("bias", None)):
        model = export_module(packed, None, "custom")
        tensor = next(t for t in model.graph.initializer if t.name == name)
        if text is None:
            tensor.dims[:], tensor.raw_data, text = [3], b"abc", "bias has 3 bytes"
        else:
            size = tensor.dims[0] - 1
            tensor.raw_data = tensor.raw_data[: len(tensor.raw_data) // tensor.dims[0] * size]
            tensor.dims[0] = size
        with pytest.raises(Exception, match=text):
            run(model, torch.randn(2, 192))


def test_a_directory(tmp_path, capsys):
    tiny_model("qwen2", tmp_path / "model", tied=False)
    mpq.pack(tmp_path / "model", tmp_path / "out", mixed_plan(tmp_path / "model"), quantizer="rtn")
    assert main(["export", str(tmp_path / "out"), str(tmp_path / "onnx"), "--to", "onnx"]) == 0
    assert "model.layers.0.mlp.gate_proj.onnx" in capsys.readouterr().out
    checkpoint = PackedCheckpoint.open(tmp_path / "out")
    assert {f.name for f in (tmp_path / "onnx").iterdir()} == {f"{name}.onnx" for name in checkpoint.modules}
    for name in checkpoint.modules:
        packed, bias = checkpoint.weight(name), checkpoint.bias(name)
        x = torch.randn(3, packed.layout.in_features)
        y = run(onnx.load(tmp_path / "onnx" / f"{name}.onnx"), x)
        wanted, bound = reference.linear(x, packed, bias), reference.error_bound(x, packed, bias)
        assert ((y.double() - wanted).abs() <= bound).all(), name
    assert main(["export", str(tmp_path / "out"), str(tmp_path / "onnx"), "--to", "onnx"]) == 1
    assert "exists already" in capsys.readouterr().err


def test_experts_are_left_out_and_nothing_is_left_of_a_refusal(tmp_path):
    tiny_model("mixtral", tmp_path / "model")
    mpq.pack(tmp_path / "model", tmp_path / "out", expert_plan(tmp_path / "model"), quantizer="rtn")
    found = {item.module: item for item in export_directory(tmp_path / "out", tmp_path / "onnx")}
    experts = [name for name, m in PackedCheckpoint.open(tmp_path / "out").modules.items() if m.experts]
    assert experts and all(found[name].file is None and "experts" in found[name].reason for name in experts)
    with pytest.raises(mpq.UnsupportedError, match="MatMulNBits"):
        export_directory(tmp_path / "out", tmp_path / "other", operators="nbits")
    assert not (tmp_path / "other").exists()
