"""One packed weight as an ONNX model: x (tokens, K) -> y (tokens, N), or for embeddings ids (count) -> rows (count, K).

    operators  "nbits"   ONNX Runtime's MatMulNBits, one node for each segment: exact values, 2, 4 and 8 bits
               "custom"  mpq_kernels' own operator, over the words as they are stored: every width, one node
               "auto"    the first where it can be exact, else the second

               +- slice -> MatMulNBits -+
    x -> perm -+                        +- add -+            columns of a band
               +- slice -> MatMulNBits -+       +- concat -> add bias -> y
               +- MatMulNBits ------------------+            bands of rows

The custom operator is in capi.library(), which is given to the session: SessionOptions.register_custom_ops_library.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from ..errors import FormatError, UnsupportedError
from ..format.codes import SCALE_DTYPES
from ..format.weights import DTYPE_NAMES, PackedWeight, QuantizedBlock
from ..format.words import unpack_weight
from . import nbits

OPERATORS = ("auto", "nbits", "custom")
DTYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}
DOMAIN = "mpq_kernels"
OPSETS = {"": 21, "com.microsoft": 1, DOMAIN: 1}
IR_VERSION = 10  # of opset 21
ACTIVATIONS = ("exact", "int8")


class Graph:
    """Nodes and initializers in the making."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []

    def constant(self, name: str, values: np.ndarray) -> str:
        """A tensor that is stored; its name."""
        self.initializers.append(numpy_helper.from_array(np.ascontiguousarray(values), name))
        return name

    def node(self, operator: str, inputs: Sequence[str], output: str, domain: str = "", **attributes: int) -> str:
        """An operation; the name of its result."""
        made = helper.make_node(operator, list(inputs), [output], name=output, domain=domain, **attributes)
        self.nodes.append(made)
        return output

    def model(self, given: onnx.ValueInfoProto, result: onnx.ValueInfoProto) -> onnx.ModelProto:
        """The model of all of it."""
        graph = helper.make_graph(self.nodes, "mpq_kernels", [given], [result], self.initializers)
        opsets = [helper.make_opsetid(domain, version) for domain, version in OPSETS.items()]
        return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="mpq_kernels")


def export_module(
    weight: PackedWeight,
    bias: torch.Tensor | None = None,
    operators: str = "auto",
    dtype: str = "float32",
    activations: str = "exact",
    embedding: bool = False,
) -> onnx.ModelProto:
    """A model of one weight [N, K]. bias: [N]. dtype: of x and y, one of DTYPES; MatMulNBits takes float32 alone.

    activations: "int8" is of the custom operator. Raises UnsupportedError with every reason why operators="nbits"
    cannot be exact, FormatError for unknown names.
    """
    for value, known, name in ((operators, OPERATORS, "operators"), (dtype, DTYPES, "dtype")):
        if value not in known:
            raise FormatError(f"{name}={value!r} is not one of {', '.join(known)}")
    if activations not in ACTIVATIONS:
        raise FormatError(f"activations={activations!r} is not one of {', '.join(ACTIVATIONS)}")
    if operators == "custom":
        return _custom(weight, bias, dtype, activations, embedding)
    blocks = unpack_weight(weight).blocks
    reasons = _why_not(blocks, dtype, activations, embedding)
    if not reasons:
        return _nbits(weight, blocks, bias)
    if operators == "nbits":
        raise UnsupportedError("; ".join(reasons) + '; operators="custom" has no such limits')
    return _custom(weight, bias, dtype, activations, embedding)


def _why_not(
    blocks: Sequence[tuple[int, int, QuantizedBlock]], dtype: str, activations: str, embedding: bool
) -> list[str]:
    """Every reason why MatMulNBits cannot serve, each once."""
    found = [reason for _, _, block in blocks if (reason := nbits.why_not(block)) is not None]
    if dtype != "float32":
        found.append(f"MatMulNBits rounds with x of {dtype}")
    if activations != "exact":
        found.append("MatMulNBits has activations of its own")
    if embedding:
        found.append("MatMulNBits looks up no rows")
    return list(dict.fromkeys(found))


def _nbits(
    weight: PackedWeight, blocks: Sequence[tuple[int, int, QuantizedBlock]], bias: torch.Tensor | None
) -> onnx.ModelProto:
    graph, layout = Graph(), weight.layout
    x = "x"
    if weight.perm is not None:
        x = graph.node("Gather", ["x", graph.constant("perm", weight.perm.numpy())], "x_in_order", axis=1)
    bands = [
        _band(graph, x, n0, layout.in_features, [(k0, block) for _, k0, block in band])
        for n0, band in groupby(blocks, key=lambda item: item[0])
    ]
    y = bands[0] if len(bands) == 1 else graph.node("Concat", bands, "y_of_bands", axis=1)
    if bias is not None:
        y = graph.node("Add", [y, graph.constant("bias", bias.float().numpy())], "y_and_bias")
    graph.node("Identity", [y], "y")
    return graph.model(*_ends("float32", layout.in_features, layout.out_features))


def _band(graph: Graph, x: str, n0: int, in_features: int, parts: Sequence[tuple[int, QuantizedBlock]]) -> str:
    """Sum of the products of the segments of one band of rows."""
    sums: list[str] = []
    for k0, block in parts:
        rows, cols = block.codes.shape
        name, given = f"rows_{n0}_columns_{k0}", x
        if cols != in_features:
            ends = [graph.constant(f"{name}_{end}", np.array([at])) for end, at in (("from", k0), ("to", k0 + cols))]
            axis = graph.constant(f"{name}_axis", np.array([1]))
            given = graph.node("Slice", [x, *ends, axis], f"{name}_x")
        inputs = [graph.constant(f"{name}_{key}", values) for key, values in nbits.operands(block).items()]
        size = nbits.block_size(block)
        # accuracy_level 1: sums in fp32.
        attributes = {"K": cols, "N": rows, "bits": block.bits, "block_size": size, "accuracy_level": 1}
        product = graph.node("MatMulNBits", [given, *inputs], name, "com.microsoft", **attributes)  # type: ignore[arg-type]
        sums.append(product if not sums else graph.node("Add", [sums[-1], product], f"{name}_sum"))
    return sums[-1]


def _ends(dtype: str, cols: int, rows: int) -> tuple[onnx.ValueInfoProto, onnx.ValueInfoProto]:
    return (
        helper.make_tensor_value_info("x", DTYPES[dtype], ["tokens", cols]),
        helper.make_tensor_value_info("y", DTYPES[dtype], ["tokens", rows]),
    )


def _custom(
    weight: PackedWeight, bias: torch.Tensor | None, dtype: str, activations: str, embedding: bool
) -> onnx.ModelProto:
    graph, layout = Graph(), weight.layout
    tensors = [(name, getattr(weight, name)) for name in ("qweight", "scales", "zeros", "perm")]
    if not embedding:
        tensors.append(("bias", bias))
    inputs = [graph.constant(name, _bytes(tensor)) for name, tensor in tensors]
    dtypes = [0 if t is None else SCALE_DTYPES.index(DTYPE_NAMES[t.dtype]) for t in (weight.scales, bias)]
    header = [layout.out_features, layout.in_features, *dtypes, ACTIVATIONS.index(activations)]
    table = graph.constant("table", np.array([*header, *layout.segment_ints()], np.int64))
    if not embedding:
        graph.node("Linear", ["x", *inputs, table], "y", DOMAIN)
        return graph.model(*_ends(dtype, layout.in_features, layout.out_features))
    graph.node("Embedding", ["ids", *inputs, table], "rows", DOMAIN)
    return graph.model(
        helper.make_tensor_value_info("ids", TensorProto.INT64, ["count"]),
        helper.make_tensor_value_info("rows", TensorProto.FLOAT, ["count", layout.in_features]),
    )


def _bytes(tensor: torch.Tensor | None) -> np.ndarray:
    return np.zeros(0, np.uint8) if tensor is None else tensor.detach().contiguous().view(torch.uint8).numpy()
