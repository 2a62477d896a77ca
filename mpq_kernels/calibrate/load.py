"""The dense model of a checkpoint whose parameters are in memory only where they are needed.

    built on the meta device   shapes, and the buffers that are computed (rotary frequencies and the like)
    load(number of blocks)     everything outside of the blocks: embedding, norm, head
    load(i)                    block i

What is loaded is read from the mapped files, renamed, merged and cast by the very code with which `from_pretrained`
loads a model (transformers.core_model_loading), then held in fp32 on the device; the mapped bytes are let go of. So
tensors are those of `from_pretrained(path, dtype=the checkpoint's)`, bit by bit, brought to fp32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..dense.checkpoint import DenseCheckpoint
from ..dense.model import build_meta_model, no_progress_bar
from ..errors import CheckpointError
from .walk import find_blocks, places_of, stage_of


class StoredModel:
    """A transformers model, its blocks by name, and which stored tensors belong to which of them."""

    def __init__(self, source: DenseCheckpoint, device: torch.device) -> None:
        """Reads no tensor. Raises CheckpointError: no model can be built; QuantizeError: it has no blocks."""
        self.source, self.device = source, device
        self.model: Any = build_meta_model(source.path, source.dtype)
        compute_buffers(self.model, device)
        self.blocks = find_blocks(self.model)
        self.names, self.places = list(self.blocks), places_of(self.blocks)
        self._stored = self._by_stage()
        self._loaded: int | None = None
        self._room: torch.Tensor | None = None  # of the loaded block

    def load(self, stage: int) -> None:
        """Read a block, or for the number of blocks all that lies outside of them. Raises CheckpointError.

        A block that was loaded before goes back to the meta device: the new one takes its memory.
        """
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        if stage < len(self.blocks):
            if self._loaded is not None:
                self.blocks[self.names[self._loaded]].to("meta")
            self._loaded = stage
        model, dtype = self.model, self.source.dtype
        names = self._stored.get(stage, [])
        mapping: Any = get_model_conversion_mapping(model)
        config = LoadStateDictConfig(dtype=dtype, dtype_plan=model._get_dtype_plan(dtype), weight_mapping=mapping)
        with no_progress_bar():
            read = {name: self.source.read(name) for name in names}
            info, _ = convert_and_load_state_dict_in_model(model, read, config)
        del read
        wrong = [*info.conversion_errors.items(), *info.mismatched_keys, *info.error_msgs]
        if wrong:
            raise CheckpointError(
                f"{self.source.path}: transformers cannot load {wrong[0]} ({len(wrong)} of this kind)"
            )
        if stage == len(self.blocks):
            model.tie_weights(missing_keys=info.missing_keys, recompute_mapping=False)
        self._hold(stage)
        for name in names:
            self.source.release(name)

    def _hold(self, stage: int) -> None:
        """Put what was loaded into memory of its own, in fp32 on the device; mapped memory is never written to.

        Blocks take turns in one piece of memory: pieces of their own, freed and asked for again, leave holes between
        them that the allocator cannot use for the next block.
        """
        inside = stage < len(self.blocks)
        passed = set() if inside else {part for block in self.blocks.values() for part in block.modules()}
        if inside and self._room is None:
            self._room = torch.empty(max(map(_padded, self.blocks.values())), device=self.device)
        filled = 0
        for name, module in (self.blocks[self.names[stage]] if inside else self.model).named_modules():
            if module in passed:
                continue
            for key, parameter in module.named_parameters(recurse=False):
                if parameter.is_meta:
                    place = f"{self.names[stage]}.{name}" if inside else name
                    raise CheckpointError(f"{self.source.path}: no file holds {place}.{key}, which the model needs")
                if self._room is not None and inside:
                    room = self._room[filled : filled + parameter.numel()].view(parameter.shape)
                    filled += _padded_size(parameter)
                    parameter.data = room.copy_(parameter.data)
                else:
                    parameter.data = parameter.data.to(self.device, torch.float32, copy=True)
            for key, buffer in module.named_buffers(recurse=False):
                # Those outside keep their dtype: in a bf16 model, the factor of Gemma's embedding is rounded to bf16.
                wide = torch.float32 if inside and buffer.is_floating_point() else buffer.dtype
                setattr(module, key, buffer.to(self.device, wide, copy=True))

    def _by_stage(self) -> dict[int, list[str]]:
        """Block, or the number of blocks -> stored tensors that transformers puts there."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        transforms = get_model_conversion_mapping(self.model)
        renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        converters = [t for t in transforms if isinstance(t, WeightConverter)]
        state = self.model.state_dict()
        out: dict[int, list[str]] = {}
        for name in self.source.tensors:
            target, _ = rename_source_key(name, renamings, converters, self.model.base_model_prefix, state)
            if target not in state and name in state:
                target = name
            out.setdefault(stage_of(self.places, target), []).append(name)
        return out


def _padded_size(parameter: torch.Tensor) -> int:
    """Elements of fp32 up to the next multiple of 64 bytes, where the allocator would begin a tensor too."""
    return -(-parameter.numel() // 16) * 16


def _padded(block: nn.Module) -> int:
    return sum(map(_padded_size, block.parameters()))


def compute_buffers(model: Any, device: torch.device) -> None:
    """Give the buffers of a model on the meta device their memory and initial values; parameters stay on meta.

    Values are computed on the CPU, wherever they go then.
    """
    held: list[tuple[nn.Module, str]] = []
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.zeros_like(buffer, device="cpu"))
            held.append((module, name))
    model.initialize_weights()
    for module, name in held:
        setattr(module, name, getattr(module, name).to(device))
