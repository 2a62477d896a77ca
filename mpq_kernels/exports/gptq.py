"""GPTQ v2: 2, 3, 4 and 8 bits, module by module under `dynamic`.

    qweight int32 [K * bits / 32, N]   qzeros int32 [groups, N * bits / 32]   scales [groups, N]   g_idx int32 [K]

Zeros are stored as they are. Source: GPTQModel 7.7 (utils.model_dequant, quantization.config).
"""

from __future__ import annotations

import re
from collections import Counter
from functools import partial
from typing import Any

import torch

from ..files.safetensors import Spec
from ..version import VERSION
from .form import Form
from .fused import unlike
from .integers import Shape, Wanted, integers, pack_words, shapes_of
from .source import Linear, PackedSource

WANTED = Wanted("gptq", (2, 3, 4, 8), (torch.float16, torch.bfloat16), permuted=True, rows=32, cols=32)
HEAD = "lm_head"


def gptq_form(source: PackedSource) -> Form:
    """Raises CheckpointError for weights that it cannot hold."""
    shapes = shapes_of(source, WANTED)
    specs = {linear.name: _specs(linear, shapes[linear.name]) for linear in source.linears}
    own = {linear.name: _scheme(linear, shapes[linear.name]) for linear in source.linears}
    common = dict(Counter(tuple(scheme.items()) for scheme in own.values()).most_common(1)[0][0])
    dynamic: dict[str, Any] = {f"+:^{re.escape(name)}$": own[name] for name in own if own[name] != common}
    dynamic |= {f"-:^{re.escape(name)}$": {} for name in source.checkpoint.packing.kept}
    config = {
        "quant_method": "gptq",
        "checkpoint_format": "gptq_v2",
        **common,
        "lm_head": any(name.rpartition(".")[2] == HEAD for name in own),
        "dynamic": dynamic,
        "pack_dtype": "int32",
        "meta": {"quantizer": [f"mpq_kernels:{VERSION}"]},
    }
    says = {name: f"{s.bits} bits, groups of {s.group}" + (", g_idx" * s.permuted) for name, s in shapes.items()}
    make = partial(_make, source, shapes)
    return Form(specs, make, says, {"quantization_config": config}, notes=unlike(source, shapes))


def _scheme(linear: Linear, shape: Shape) -> dict[str, Any]:
    size = shape.group if shape.group < linear.cols else -1
    return {"bits": shape.bits, "group_size": size, "sym": shape.symmetric, "desc_act": shape.permuted}


def _specs(linear: Linear, shape: Shape) -> dict[str, Spec]:
    groups, bits = linear.cols // shape.group, shape.bits
    return {
        f"{linear.name}.qweight": (torch.int32, (linear.cols * bits // 32, linear.rows)),
        f"{linear.name}.qzeros": (torch.int32, (groups, linear.rows * bits // 32)),
        f"{linear.name}.scales": (shape.scales, (groups, linear.rows)),
        f"{linear.name}.g_idx": (torch.int32, (linear.cols,)),
    }


def _make(source: PackedSource, shapes: dict[str, Shape], linear: Linear) -> dict[str, torch.Tensor]:
    shape = shapes[linear.name]
    made = integers(source.weight(linear), shape)
    return {
        f"{linear.name}.qweight": pack_words(made.codes, shape.bits).T.contiguous(),
        f"{linear.name}.qzeros": pack_words(made.zeros.T, shape.bits),
        f"{linear.name}.scales": made.scales.T.contiguous(),
        f"{linear.name}.g_idx": made.g_idx,
    }
