"""Peers from other packages, which may be absent. Nothing of theirs is imported before `available` asks for it.

A peer that cannot serve says why and appears in the table with that reason. Interfaces as of humming-kernels 0.1.19,
gemlite 0.6.0, bitsandbytes 0.50.2, and the operators of vLLM's stable-ABI library.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.layers.timing import Call
from benchmarks.peers.torch import Dense, Held, Peer, Tinygemm, symmetric_codes, symmetric_values


def look_into_site() -> None:
    """Find packages in the directory PEERS_SITE too, after all others."""
    site = os.environ.get("PEERS_SITE")
    if site and site not in sys.path:
        sys.path.append(site)
        importlib.invalidate_caches()


def missing(*modules: str) -> str | None:
    """None when all modules import, else the first one that does not, and why."""
    for module in modules:
        try:
            importlib.import_module(module)
        except Exception as error:  # what a foreign package raises on import is its own affair; the reason is kept
            return f"{module} does not import: {type(error).__name__}: {str(error).strip().splitlines()[:1]}"
    return None


class Humming(Peer):
    """humming-kernels: 1 to 8 bits, symmetric, one NVRTC kernel for each shape, width and number of tokens."""

    name = "humming"
    widths = ("1", "2", "3", "4", "5", "6", "7", "8")
    compiles = True

    def why_unavailable(self) -> str | None:
        """The package needs a device already on import."""
        return super().why_unavailable() or missing("humming.layer", "humming.tune")

    def hold(self, dense: torch.Tensor, width: str, tokens: Sequence[int]) -> Held:
        """Its own quantizer and its own repacking; its heuristics choose the kernels for `tokens`."""
        layer_module, tune = importlib.import_module("humming.layer"), importlib.import_module("humming.tune")
        rows, cols = dense.shape
        config = {"dtype": f"int{width}", "group_size": self.group}
        layer = layer_module.HummingLayer(
            shape_n=rows, shape_k=cols, weight_config=config, torch_dtype=self.dtype
        ).cuda()
        layer.load_from_unquantized(dense.to(self.dtype))
        wanted = layer.weight_schema.dequant_tensors(dict(layer.state_dict())).float()  # before it is repacked
        layer.transform()
        kernels = _intervals(tune.get_heuristics_config, layer.humming_config, tokens)
        names = [name for name in ("weight", "weight_scale", "zero_point") if getattr(layer, name, None) is not None]
        return Held(
            tuple(getattr(layer, name).detach() for name in names), wanted, (layer.humming_config, names, kernels)
        )

    def call(self, held: Held, tensors: tuple[torch.Tensor, ...]) -> Call:
        """Its functional forward; every copy has locks of its own, as every layer has."""
        forward = importlib.import_module("humming.forward").humming_forward
        config, names, kernels = held.extra
        words = dict(zip(names, tensors, strict=True))
        locks = torch.zeros(2048, dtype=torch.int32, device=tensors[0].device)
        return lambda x: forward(config, inputs=x, locks=locks, tuning_config=kernels, **words)


def _intervals(heuristics: Any, config: Any, tokens: Sequence[int]) -> str | None:
    """Humming's own choice for each M of `tokens` as [[above, up to, kernel], ...]; None leaves all M to it.

    Without it the first call would compile the kernels of every M up to 8192.
    """
    table: list[list[Any]] = []
    for count in sorted(tokens):
        kernel = heuristics(config, shape_m=count)
        if table and table[-1][2] == kernel:
            table[-1][1] = count
        else:
            table.append([table[-1][1] if table else 0, count, kernel])
    try:
        return json.dumps(table)
    except TypeError:
        return None


class Gemlite(Peer):
    """gemlite: Triton kernels, 1, 2, 4 and 8 bits, fp16 x. Tunes itself for each M, which takes seconds."""

    name = "gemlite"
    widths = ("4", "2", "8", "1")
    dtype = torch.float16
    tokens = (1, 16, 64)

    def why_unavailable(self) -> str | None:
        """The package reads the device's name on import."""
        return super().why_unavailable() or missing("gemlite")

    def hold(self, dense: torch.Tensor, width: str, tokens: Sequence[int]) -> Held:
        """Symmetric codes with their zero given as a tensor; gemlite stores -zero * scale instead, rounded."""
        gemlite = importlib.import_module("gemlite")
        tuned = (
            Path(str(gemlite.__file__)).parent / "configs" / "h100.json"
        )  # nearest to an H200; it has none of its own
        if tuned.exists():
            gemlite.load_config(str(tuned))
        bits, (rows, cols) = int(width), dense.shape
        codes, scale = symmetric_codes(dense, bits, self.group, self.dtype)
        zeros = torch.full_like(scale, 1 << (bits - 1))
        maker = importlib.import_module("gemlite.helper").A16Wn(device=str(dense.device), dtype=self.dtype)
        layer = maker.from_weights(codes, scale, zeros, bits, self.group)
        shifts = (-zeros.float() * scale.float()).to(self.dtype).float().unsqueeze(-1)
        grouped = codes.view(rows, cols // self.group, self.group).float()
        wanted = (grouped * scale.float().unsqueeze(-1) + shifts).view(rows, cols)
        return Held(tuple(tensor.detach() for tensor in layer.get_tensor_args()), wanted, layer.get_meta_args())

    def call(self, held: Held, tensors: tuple[torch.Tensor, ...]) -> Call:
        """Its operator."""
        forward = importlib.import_module("gemlite").forward_functional
        return lambda x: forward(x, None, list(tensors), held.extra)


class BitsandbytesNF4(Peer):
    """bitsandbytes' NF4: a table of 16 values, one fp32 absmax for each 64 weights."""

    name = "bnb nf4"
    widths = ("4",)
    BLOCK = 64

    def why_unavailable(self) -> str | None:
        """The package and its CUDA library."""
        return super().why_unavailable() or missing("bitsandbytes") or _bitsandbytes_library()

    def label(self, width: str) -> str:
        """The width is in the name."""
        return self.name

    def hold(self, dense: torch.Tensor, width: str, tokens: Sequence[int]) -> Held:
        """Its quantizer and its dequantizer."""
        functional = importlib.import_module("bitsandbytes.functional")
        packed, state = functional.quantize_4bit(dense.to(self.dtype), blocksize=self.BLOCK, quant_type="nf4")
        wanted = functional.dequantize_4bit(packed, state).view(dense.shape).float()
        return Held((packed.view(-1, 1), state.absmax), wanted, list(dense.shape))

    def call(self, held: Held, tensors: tuple[torch.Tensor, ...]) -> Call:
        """Its operator; beyond some M it dequantizes and calls cuBLAS."""
        packed, absmax = tensors
        return lambda x: torch.ops.bitsandbytes.gemm_4bit(x, packed, held.extra, absmax, self.BLOCK, "nf4")


class BitsandbytesInt8(BitsandbytesNF4):
    """bitsandbytes' LLM.int8 without outliers: x is rounded to 8 bits for each token, which is in its error."""

    name = "bnb int8 (x in int8)"
    widths = ("8",)
    dtype = torch.float16
    tolerance = 3e-2  # rounding x to 127 steps of its largest value; 0.7e-2 was seen on normal x, K=512

    def hold(self, dense: torch.Tensor, width: str, tokens: Sequence[int]) -> Held:
        """One scale for each row."""
        codes, stats, _ = torch.ops.bitsandbytes.int8_vectorwise_quant(dense.to(self.dtype), 0.0)
        return Held((codes, stats), codes.float() * (stats.float() / 127).unsqueeze(1))

    def call(self, held: Held, tensors: tuple[torch.Tensor, ...]) -> Call:
        """Quantize x, multiply in int8, scale."""
        codes, stats = tensors
        ops = torch.ops.bitsandbytes

        def run(x: torch.Tensor) -> torch.Tensor:
            rounded, x_stats, _ = ops.int8_vectorwise_quant(x, 0.0)
            return ops.int8_scaled_mm(rounded, codes, x_stats, stats, bias=None, dtype=x.dtype)

        return run


def _bitsandbytes_library() -> str | None:
    """None when the CUDA library is loaded, else the reason."""
    library = importlib.import_module("bitsandbytes.cextension").lib
    return None if getattr(library, "compiled_with_cuda", False) else "bitsandbytes loaded no CUDA library"


class Marlin(Peer):
    """Marlin as vLLM builds it, from the file VLLM_LIB (_C_stable_libtorch.abi3.so); 4 and 8 bits, symmetric."""

    name = "marlin"
    widths = ("4", "8")

    def why_unavailable(self) -> str | None:
        """The library and its two operators."""
        path = os.environ.get("VLLM_LIB", "")
        reason = super().why_unavailable()
        if reason or not path:
            return reason or "VLLM_LIB does not name a library with vLLM's operators"
        try:
            torch.ops.load_library(path)
            _ = torch.ops._C.marlin_gemm, torch.ops._C.gptq_marlin_repack
        except (OSError, RuntimeError, AttributeError) as error:
            return f"{path}: {str(error).strip().splitlines()[0]}"
        return None

    def why_not_layer(self, rows: int, cols: int, width: str) -> str | None:
        """Its tiles."""
        bad = rows % 64 or cols % 128 or self.group not in (32, 64, 128)
        return f"{rows} x {cols}, group {self.group}: wants N % 64, K % 128, group 32, 64, 128" if bad else None

    def hold(self, dense: torch.Tensor, width: str, tokens: Sequence[int]) -> Held:
        """GPTQ words (codes of consecutive k, lowest bits first), repacked by its operator."""
        bits, (rows, cols) = int(width), dense.shape
        codes, scale = symmetric_codes(dense, bits, self.group, self.dtype)
        none = torch.empty(0, dtype=torch.int32, device=dense.device)
        repack = {"b_q_weight": gptq_words(codes, bits), "perm": none, "size_k": cols, "size_n": rows, "num_bits": bits}
        packed = by_name(torch.ops._C.gptq_marlin_repack.default, repack)
        scales = marlin_scales(scale)
        processors = torch.cuda.get_device_properties(dense.device).multi_processor_count
        return Held((packed, scales), symmetric_values(codes, scale, bits, self.group), (bits, rows, cols, processors))

    def call(self, held: Held, tensors: tuple[torch.Tensor, ...]) -> Call:
        """Its operator, accumulating across blocks in fp32."""
        packed, scales = tensors
        bits, rows, cols, processors = held.extra
        words = {"b_q_weight": packed, "b_scales": scales, "size_n": rows, "size_k": cols}
        words["workspace"] = torch.zeros(processors, dtype=torch.int32, device=packed.device)
        words["b_type_id"] = words["b_q_type_id"] = words["b_q_type"] = vllm_unsigned(bits, 1 << (bits - 1))
        words |= {"is_k_full": True, "use_fp32_reduce": True}
        operator = torch.ops._C.marlin_gemm.default
        return lambda x: by_name(operator, words | {"a": x, "size_m": x.shape[0]})


def gptq_words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 [K * bits / 32, N] of codes uint8 [N, K]: consecutive k of one row n in a word, lowest bits first."""
    rows, cols = codes.shape
    fields = 32 // bits
    columns = codes.T.contiguous().view(cols // fields, fields, rows)
    words = torch.zeros(cols // fields, rows, dtype=torch.int32, device=codes.device)
    for index in range(fields):
        words |= columns[:, index].int() << (bits * index)
    return words


def marlin_scales(scale: torch.Tensor) -> torch.Tensor:
    """[K/g, N] of scales [N, K/g] as Marlin's threads read them: 8 x 8 neighbouring rows transposed."""
    rows, groups = scale.shape
    return scale.T.contiguous().view(-1, 8, 8).transpose(1, 2).contiguous().view(groups, rows)


def vllm_unsigned(bits: int, bias: int) -> int:
    """Number of vLLM's type of unsigned codes with a bias: exponent 0, then its fields from bit 8 on."""
    return bits << 8 | bias << 17 | 1 << 50  # mantissa: 8 bits; sign: 1; bias: 32; finite: 1; NaN: IEEE


def by_name(operator: Any, words: dict[str, Any]) -> Any:
    """Call an operator with what its schema asks for; what is not in `words` is None, False, or its default."""
    given: dict[str, Any] = {}
    for argument in operator._schema.arguments:
        kind = str(argument.type)
        if argument.name in words:
            given[argument.name] = words[argument.name]
        elif argument.has_default_value():
            continue
        elif kind.startswith("Optional"):
            given[argument.name] = None
        elif kind == "bool":
            given[argument.name] = False
        else:
            raise TypeError(f"{operator}: nothing is known of its argument {argument.name} ({kind})")
    return operator(**given)


class Elsewhere(Peer):
    """A package whose kernels are measured under another name, or that has none for this."""

    def __init__(self, name: str, width: str, reason: str) -> None:
        super().__init__()
        self.name, self.widths, self._reason = name, (width,), reason  # type: ignore[misc]

    def why_unavailable(self) -> str | None:
        """Never."""
        return self._reason


def all_peers(group: int) -> dict[str, Peer]:
    """Every peer by name."""
    peers: tuple[Peer, ...] = (
        Dense("bf16", torch.bfloat16),
        Dense("fp16", torch.float16),
        Tinygemm(group),
        Humming(group),
        Marlin(group),
        Gemlite(group),
        BitsandbytesNF4(group),
        BitsandbytesInt8(group),
        Elsewhere("torchao", "4", "its weight-only 4-bit layer on CUDA calls tinygemm's operator: see tinygemm"),
        Elsewhere("hqq", "4", "has no kernel of its own; its backends are gemlite, tinygemm and Marlin: see those"),
    )
    return {peer.name: peer for peer in peers}
