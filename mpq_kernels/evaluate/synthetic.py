"""A model of any shape with random packed weights, for timing: made from config.json alone, packed from the start.

    config.json + plan -> model on the meta device -> empty packed layers -> random words, scales and zeros, in place

The weights that the plan packs never exist in 16 bits, so that a large shape needs the memory of its packed form.
What such a model says means nothing; its tensors have the sizes, dtypes and magnitudes of real ones.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..backends import select
from ..checkpoint.config import QUANT_METHOD, Float8Module, PackedModule, PackingConfig
from ..dense.checkpoint import COMPUTE_DTYPES, check_dense
from ..dense.linears import LinearSpec
from ..dense.model import build_meta_model
from ..dense.names import list_packable
from ..errors import CheckpointError, UnsupportedError
from ..files.strict import contained_file, read_json_object
from ..format.float8 import to_float8
from ..format.random import random_weight
from ..nn.float8 import float8_modules
from ..nn.install import install_modules
from ..nn.linear import packed_modules
from ..plan.plan import Plan
from ..plan.resolve import float8_shape, resolve
from ..progress import Progress

CONFIG_FILE = "config.json"
LEFT_FREE = 0.95  # part of the free memory that a synthetic model may take


def config_directory(path: str | os.PathLike[str]) -> Path:
    """The directory of a config.json, given by itself or by its directory. Raises CheckpointError."""
    path = Path(path)
    if path.is_file() and path.name != CONFIG_FILE:
        raise CheckpointError(f"{path}: give a model directory, or a file called {CONFIG_FILE}")
    directory = path.parent if path.is_file() else path
    if not directory.is_dir():
        raise CheckpointError(f"{path}: is not a directory or a {CONFIG_FILE}")
    contained_file(directory, CONFIG_FILE)
    return directory


def config_linears(path: str | os.PathLike[str]) -> list[LinearSpec]:
    """Every nn.Linear of the model that a config.json describes, in module order, then every expert's; without weights.

    Experts have the names under which transformers saves them.
    """
    return [spec for spec in config_packable(path) if not spec.embedding]


def config_packable(path: str | os.PathLike[str]) -> list[LinearSpec]:
    """The embeddings that a plan may name, then `config_linears`."""
    directory = config_directory(path)
    check_dense(directory / CONFIG_FILE, read_json_object(directory / CONFIG_FILE))
    return list_packable(build_meta_model(directory))


def synthetic_model(
    path: str | os.PathLike[str],
    plan: Plan | None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    backend: str | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    activations: str = "exact",
) -> Any:
    """The causal language model of a config.json with random weights, packed under `plan`, in evaluation mode.

    path: a directory or its config.json; no other file of it is read. plan: None for the config.json of a packed
    model, which says itself what is packed. dtype: of all that is not packed; None is the config's, bf16 when it names
    none. activations: "exact" or "int8", as MixedLinear. progress(done, total, name) is called after each packed
    weight. The same arguments give the same weights on the same type of device.

    Raises PlanError when the plan does not fit, CheckpointError for a bad config, UnsupportedError when no backend
    serves the device or the model is larger than the free memory; all before weights are allocated.
    """
    directory, device = config_directory(path), torch.device(device)
    config = read_json_object(directory / CONFIG_FILE)
    model: Any = build_meta_model(directory)
    packing = _packing(directory / CONFIG_FILE, config, model, plan)
    if (backend is not None or activations != "exact") and not packing.modules:
        raise UnsupportedError(
            f"{directory}: nothing is packed under this plan, so there is no use for a backend or int8 activations"
        )
    for module in packing.modules.values():
        select(module.layout, device.type, backend, activations)
    dtype = dtype or config_dtype(config)
    install_modules(model, packing, dtype)
    _check_memory(model, dtype, device)
    generator = torch.Generator(device).manual_seed(seed)
    layers = packed_modules(model)
    for done, (name, layer) in enumerate(layers, start=1):
        layer.wanted_backend, layer.activations = backend, activations
        bias = None if layer.bias is None else torch.zeros(layer.out_features, dtype=dtype, device=device)
        layer.assign(random_weight(layer.layout, device, generator), bias)
        if progress is not None:
            progress(done, len(layers), name)
    for _, float8 in float8_modules(model):
        weight = torch.randn(float8.out_features, float8.in_features, generator=generator, device=device)
        float8.qweight, float8.scales = to_float8(weight.div_(float8.in_features**0.5))
    _fill_kept(model, device, dtype, seed)
    return model.eval()


def _packing(where: Path, config: dict[str, Any], model: nn.Module, plan: Plan | None) -> PackingConfig:
    """What is packed and how: from the config of a packed model, else from the plan."""
    own = config.get("quantization_config")
    if isinstance(own, dict) and own.get("quant_method") == QUANT_METHOD:
        if plan is not None:
            raise UnsupportedError(f"{where}: says itself how the model is packed; leave the plan out")
        return PackingConfig.from_dict(own, str(where))
    check_dense(where, config)
    if plan is None:
        raise UnsupportedError(f"{where}: has no weights to load; give a plan or a width (mpq bench: --plan or --bits)")
    resolved = resolve(plan, list_packable(model))
    modules = {}
    for weight in resolved.weights:
        bias = any(member.spec.bias_tensor is not None for member in weight.members)
        members = weight.member_rows() if weight.fused else None
        modules[weight.name] = PackedModule(weight.name, weight.layout, bias, members, weight.experts, weight.embedding)
    floats = {
        name: Float8Module(name, float8_shape(spec), spec.bias_tensor is not None)
        for name, spec in resolved.floats.items()
    }
    return PackingConfig(modules, dict(resolved.kept), floats=floats)


def config_dtype(config: dict[str, Any]) -> torch.dtype:
    """The dtype that a config names for the whole model or its text part; bf16 when it names none."""
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        for key in ("dtype", "torch_dtype"):
            if isinstance(part.get(key), str) and part[key] in COMPUTE_DTYPES:
                return COMPUTE_DTYPES[part[key]]
    return torch.bfloat16


def _check_memory(model: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Refuse a model that is larger than the free memory, instead of being killed half-way."""
    packed = sum(layer.layout.size().total_bytes for _, layer in packed_modules(model))
    packed += sum(layer.shape.size().total_bytes for _, layer in float8_modules(model))
    kept = sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    elif device.type == "cpu" and hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        free = _available_memory()
    else:
        return
    if packed + kept > LEFT_FREE * free:
        raise UnsupportedError(
            f"the model takes {packed:,} bytes packed and {kept:,} bytes kept in {dtype}, and {device.type} has "
            f"{free:,} bytes free: use fewer bits, pack the output head too, or a machine with more memory"
        )


def _available_memory() -> int:
    """Bytes that can be allocated on the host without swapping, as Linux tells it; elsewhere the free pages."""
    meminfo = Path("/proc/meminfo")
    lines: Sequence[str] = meminfo.read_text().splitlines() if meminfo.exists() else ()
    for line in lines:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@torch.no_grad()
def _fill_kept(model: Any, device: torch.device, dtype: torch.dtype, seed: int) -> None:
    """Allocate everything that is still on the meta device and let transformers initialize it, reproducibly."""
    made: dict[int, torch.Tensor] = {}  # parameters that are one (a tied head) stay one
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                if id(parameter) not in made:
                    empty = torch.empty_like(parameter, dtype=dtype, device=device)
                    made[id(parameter)] = nn.Parameter(empty, requires_grad=False)
                module._parameters[name] = made[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = torch.empty_like(buffer, device=device)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        model.initialize_weights()
    model.config.dtype = dtype
