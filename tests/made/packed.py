"""Plans over the tiny models, and the checks that a packed directory must pass."""

from __future__ import annotations

import hashlib
import json

import torch

from mpq_kernels.checkpoint.config import IMPORT_FIRST, WEIGHTS_KEY
from mpq_kernels.checkpoint.packed import PackedCheckpoint
from mpq_kernels.dense.checkpoint import DenseCheckpoint
from mpq_kernels.files.safetensors import tensor_bytes
from mpq_kernels.format.reference import dequantize
from mpq_kernels.plan.plan import Plan
from mpq_kernels.plan.resolve import resolve
from mpq_kernels.quantize import quantize_weight

UNIFORM = Plan.from_dict({"version": 1, "default": {"bits": 4, "group_size": -1}})


def mixed_plan(path):
    """Widths by regex and name, a kept module, column segments, a permutation; q/k/v fused where they are apart."""
    linears = DenseCheckpoint.open(path).linears()
    names = [spec.name for spec in linears]
    last = next(spec for spec in linears if spec.name.endswith(("layers.1.mlp.down_proj", "layers.1.mlp.fc2")))
    perm = torch.randperm(last.in_features, generator=torch.Generator().manual_seed(1)).tolist()
    columns = [{"cols": [0, 64], "bits": 8}, {"cols": [64, None], "bits": 2, "group_size": last.in_features - 64}]
    plan = {
        "version": 1,
        "default": {"bits": 3, "group_size": 32},
        "modules": {
            r"re:.*layers\.0\.(mlp\.(down_proj|fc2)|self_attn\.(o_proj|dense))": {"bits": 5, "group_size": -1},
            last.name: {"bits": 2, "group_size": 32, "segments": columns, "perm": perm, "scale_dtype": "float32"},
            "model.layers.1.self_attn.o_proj": {"bits": 16},
            "lm_head": {"bits": 6, "group_size": 32, "symmetric": True, "scale_dtype": "bfloat16"},
        },
    }
    if "model.layers.1.self_attn.o_proj" not in names:
        del plan["modules"]["model.layers.1.self_attn.o_proj"]
    if "model.layers.0.self_attn.q_proj" in names:
        plan["modules"][r"re:.*\.v_proj"] = {"bits": 4, "group_size": 32, "symmetric": True}
        plan["fuse"] = [{"name": "qkv_proj", "members": ["q_proj", "k_proj", "v_proj"]}]
    return Plan.from_dict(plan)


def small_plan(path):
    """The fused q/k/v of one layer and the head: enough for the slower quantizer."""
    rules = mixed_plan(path).model_dump(mode="json")
    rules["default"] = None
    rules["modules"] = {
        r"re:.*layers\.0\.self_attn\.q_proj": {"bits": 3, "group_size": 32},
        r"re:.*layers\.0\.self_attn\.(k|v)_proj": {"bits": 4, "group_size": -1, "symmetric": True},
        "lm_head": rules["modules"]["lm_head"],
    }
    return Plan.from_dict(rules)


def digests(path):
    """File name -> SHA-256 of its bytes."""
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(path.iterdir())}


def check_packed(source_dir, out, plan, quantizer="rtn"):
    """Every packed weight is the quantizer's, bit for bit, and every other tensor the source's."""
    source, packed = DenseCheckpoint.open(source_dir), PackedCheckpoint.open(out)
    packed.verify_values()
    resolved = resolve(plan, source.linears())
    assert list(packed.modules) == [weight.name for weight in resolved.weights]
    assert packed.packing.kept == resolved.kept
    for weight in resolved.weights:
        rows, held = 0, dequantize(packed.weight(weight.name))
        for member in weight.members:
            perm = None if member.perm is None else torch.tensor(member.perm, dtype=torch.int32)
            wanted = quantize_weight(source.weight(member.spec), member.layout, perm, quantizer)
            assert torch.equal(held[rows : rows + member.spec.out_features], dequantize(wanted)), member.spec.name
            bias = source.bias(member.spec)
            if bias is not None:
                part = packed.bias(weight.name)[rows : rows + member.spec.out_features]
                assert torch.equal(part, bias)
            rows += member.spec.out_features
        assert rows == len(held)
    config = json.loads((out / "config.json").read_text())
    assert config.pop("quantization_config") == packed.packing.to_dict()
    assert config.pop(WEIGHTS_KEY) == IMPORT_FIRST
    assert config == source.config
    return source, packed


def check_kept(source, packed, renamed=None):
    """Kept tensors are the source's, bit for bit. renamed: name in the output -> name in the source."""
    renamed = renamed or {}
    for name in packed.kept_tensors():
        wanted, got = source.read(renamed.get(name, name)), packed.read(name)
        assert wanted.dtype == got.dtype and wanted.shape == got.shape
        assert bytes(tensor_bytes(wanted)) == bytes(tensor_bytes(got)), name
