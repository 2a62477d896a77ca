"""One packed directory on every backend, run by pytest in a process of its own under TRITON_INTERPRET=1.

test_interpreted.py starts it. The layers that `load` makes of the same files multiply with cpu, reference and triton,
and with the CUDA kernels behind csrc/torch/cuda_ops.cpp in the simulator of csrc/sim.
"""

import itertools

import pytest
import torch

from mpq_kernels import Plan, load, pack
from mpq_kernels.backends import BACKENDS
from mpq_kernels.backends.triton import configs, launch
from mpq_kernels.backends.triton.configs import Config
from mpq_kernels.checkpoint.packed import PackedCheckpoint
from mpq_kernels.format import reference
from mpq_kernels.format.codes import FORMATS, SCALE_DTYPES
from mpq_kernels.format.kinds import ZERO_KINDS
from mpq_kernels.format.words import pack_weight
from mpq_kernels.nn.linear import packed_modules
from tests.backends.cuda import simulated
from tests.made.checkpoints import tiny_model
from tests.made.weights import random_weight

DTYPES = (torch.float16, torch.bfloat16)
LOADED = ("cpu", "reference", "triton")
SIZES = {"intermediate_size": 100, "vocab_size": 60}
INT, FLOAT = {"group_size": 32}, {"group_size": -1, "zero": "float"}
SYMMETRIC = {"group_size": 64, "symmetric": True}
PLAN = {
    "version": 1,
    "default": {"bits": 16},
    "modules": {
        "model.layers.0.self_attn.q_proj": {"bits": 3} | INT,
        "model.layers.0.self_attn.k_proj": {"bits": 4} | SYMMETRIC,
        "model.layers.0.self_attn.v_proj": {"bits": 8, "group_size": 32, "zero": "half"},
        "model.layers.0.self_attn.o_proj": {"bits": 1, "scale_dtype": "bfloat16"} | INT,
        "model.layers.0.mlp.gate_proj": {"bits": 2} | FLOAT,
        "model.layers.0.mlp.up_proj": {"bits": 7, "group_size": 16, "zero": "min"},
        "model.layers.0.mlp.down_proj": {"bits": 5, "group_size": 25},  # the slow kernel
        "model.layers.1.mlp.down_proj": {
            "bits": 4,
            "segments": [{"cols": [0, 64], "bits": 8, "group_size": 16}, {"cols": [64, None], "bits": 2}],
            "group_size": 36,
            "perm": torch.randperm(100, generator=torch.Generator().manual_seed(1)).tolist(),
            "scale_dtype": "float32",
        },
        "lm_head": {"bits": 6} | SYMMETRIC,
    },
    "fuse": [
        {"name": "qkv_proj", "members": ["q_proj", "k_proj", "v_proj"]},
        {"name": "gate_up_proj", "members": ["gate_proj", "up_proj"]},
    ],
}
PACKED = (
    *("model.layers.0." + name for name in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj")),
    *(f"model.layers.{layer}.mlp.down_proj" for layer in (0, 1)),
    "lm_head",
)


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """The interpreter takes its time for every program."""
    monkeypatch.setattr(configs, "choose", lambda *_: Config(64, num_warps=1, programs_per_unit=1))


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """The packed files of a model of two layers with biases."""
    path = tmp_path_factory.mktemp("agreement")
    tiny_model("qwen2", path / "dense", tied=False, dtype=torch.bfloat16, sizes=SIZES)
    pack(path / "dense", path / "packed", Plan.from_dict(PLAN), quantizer="rtn")
    return path / "packed"


@pytest.fixture(scope="module")
def layers(directory):
    """Backend -> {name of a packed module: the module}."""
    return {backend: dict(packed_modules(load(directory, backend=backend))) for backend in LOADED}


def outputs(layers, name, x, with_bias):
    """Backend -> y of the packed module of that name."""
    made = {}
    for backend in LOADED:
        layer = layers[backend][name]
        assert layer.backend == backend
        shape = (layer.layout.segment_ints(), layer.out_features, layer.in_features)
        weight = (layer.qweight, layer.scales, layer.zeros, layer.perm)
        bias = layer.bias if with_bias else None
        made[backend] = layer(x) if bias is layer.bias else BACKENDS[backend].linear(x, *weight, None, *shape)
    held = [None if tensor is None else simulated.aligned(tensor) for tensor in weight]
    made["simulated"] = simulated.operators().linear(x, *held, bias, *shape)
    return made


def test_the_plan_has_every_kind_of_weight(directory, layers):
    checkpoint = PackedCheckpoint.open(directory)
    assert set(checkpoint.modules) == set(PACKED) == set(layers["triton"])
    layouts = [module.layout for module in checkpoint.modules.values()]
    segments = [segment for layout in layouts for segment in layout.segments]
    assert {segment.bits for segment in segments} == set(FORMATS)
    assert {segment.zero for segment in segments} == set(ZERO_KINDS)
    assert {layout.scale_dtype for layout in layouts} == set(SCALE_DTYPES)
    assert {launch.work_step(layout) > 0 for layout in layouts} == {True, False}
    assert any(layout.permuted and len(layout.segments) > 1 for layout in layouts)
    assert any(module.bias for module in checkpoint.modules.values())
    for name, layer in ((name, of[name]) for of in layers.values() for name in PACKED):
        stored = checkpoint.weight(name).tensors()
        assert all(torch.equal(tensor, stored[key]) for key, tensor in layer.packed.tensors().items())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PACKED)
def test_all_agree_within_the_bound(layers, name, dtype):
    layer = layers["cpu"][name]
    for tokens in (1, 5, 17):
        x = torch.randn(tokens, layer.in_features).to(dtype)
        exact = reference.linear(x, layer.packed, layer.bias)
        bound = reference.error_bound(x, layer.packed, layer.bias)
        made = outputs(layers, name, x, with_bias=True)
        assert all(y.dtype == dtype for y in made.values())
        for backend, y in made.items():
            assert ((y.double() - exact).abs() <= bound).all(), f"{backend}, {tokens} tokens"
        for (one, y), (other, z) in itertools.combinations(made.items(), 2):
            assert ((y.double() - z.double()).abs() <= 2 * bound).all(), f"{one} and {other}, {tokens} tokens"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PACKED)
def test_one_hot_x_gives_the_same_bits_everywhere(layers, name, dtype):
    packed = layers["cpu"][name].packed
    wanted = reference.dequantize(packed, dtype).T
    for backend, y in outputs(layers, name, torch.eye(packed.layout.in_features).to(dtype), with_bias=False).items():
        assert torch.equal(y, wanted), backend


@pytest.mark.parametrize(("zero", "group"), [*((zero, 64) for zero in ZERO_KINDS), ("int", 9)])
def test_an_infinite_x_leaves_no_finite_number_in_its_row_and_the_others_alone(zero, group):
    """Inf times the code 0 is NaN, whatever the weight; docs/robustness.md has what each backend gives."""
    packed = pack_weight(random_weight(64, 72 if group == 9 else 64, 2, group, zero))
    operands = (packed.qweight, packed.scales, packed.zeros, packed.perm)
    shape = (packed.layout.segment_ints(), packed.layout.out_features, packed.layout.in_features)
    held = [None if tensor is None else simulated.aligned(tensor) for tensor in operands]
    clean = torch.randn(3, packed.layout.in_features).half()
    x = clean.clone()
    x[1, 5] = float("inf")
    made = {}
    for backend in (*LOADED, "simulated"):
        linear = simulated.operators().linear if backend == "simulated" else BACKENDS[backend].linear
        weight = held if backend == "simulated" else operands
        made[backend], wanted = (linear(rows, *weight, None, *shape) for rows in (x, clean))
        assert not made[backend][1].isfinite().any(), backend
        assert torch.equal(made[backend][[0, 2]], wanted[[0, 2]]), backend
    # A dense product: NaN where the weight is 0, else its sign.
    column = reference.dequantize(packed, torch.float16)[:, 5].double()
    dense = (column * float("inf")).half()
    assert torch.equal(made["reference"][1].nan_to_num(), dense.nan_to_num())
    as_dense = torch.equal(made["triton"][1].nan_to_num(), dense.nan_to_num())
    # Zeros that are subtracted in operand A, and weights that are decoded first.
    assert as_dense == (zero not in ("float", "min") or group == 9)
