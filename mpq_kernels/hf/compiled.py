"""Generation with a compiled decode step: transformers' own machinery, set up for packed models.

    prompt --eager--> first token, cache of a fixed length --compiled, once--> token --compiled--> token ...

`generate` compiles its decode step where the cache is static and its configuration asks for it. `compile_decoding`
asks: the cache has one length for all prompts, so that no later one compiles again; on a CUDA device the step becomes a
CUDA graph, on the CPU C++ by Inductor, without Python between the operators.
"""

from __future__ import annotations

import copy
import sysconfig
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import CompileConfig, GenerationConfig, StaticCache

from ..errors import UnsupportedError
from . import decode_attention

CACHE_TOKENS = 1024  # prompt and answer; a longer one makes a longer cache, and compiles once more
CACHE_STEP = 256  # lengths of caches that are made to measure are multiples of it
# No Python between operators, and no checks of what was checked when the step was traced.
CPU_OPTIONS = {"cpp_wrapper": True, "size_asserts": False, "nan_asserts": False}
CUDA_MODE = "reduce-overhead"  # CUDA graphs


class CompiledGeneration(GenerationConfig):
    """The generation config of a model whose decode step is compiled; written to disk as one that is not."""

    @classmethod
    def of(cls, config: GenerationConfig) -> CompiledGeneration:
        """The same settings."""
        made = cls()
        made.__dict__.update(copy.deepcopy(config.__dict__))
        return made

    def save_pretrained(self, *args: Any, **options: Any) -> Any:
        """As transformers'. How this process runs the model is no property of the model."""
        plain = GenerationConfig()
        plain.__dict__.update(copy.deepcopy(self.__dict__))
        for name in ("cache_implementation", "max_cache_len", "compile_config"):
            if hasattr(plain, name):
                setattr(plain, name, None)
        return plain.save_pretrained(*args, **options)


def compile_decoding(model: Any, cache_tokens: int | None = None) -> None:
    """Let `model.generate` compile its decode step, and run it compiled from then on.

    cache_tokens: length of the cache, prompt and answer together; CACHE_TOKENS unless given, at most the model's
    positions. Raises UnsupportedError for a model without a static cache, one on several devices, and where there is no
    compiler.
    """
    reason = why_not(model)
    if reason is not None:
        raise UnsupportedError(f"a {type(model).__name__} is not compiled here: {reason}")
    config = CompiledGeneration.of(model.generation_config)
    config.cache_implementation = "static"
    text = model.config.get_text_config(decoder=True)
    positions = getattr(text, "max_position_embeddings", None) or CACHE_TOKENS
    config.max_cache_len = cache_tokens or min(CACHE_TOKENS, positions)
    cuda = model.device.type == "cuda"
    # Torch takes a mode or options, not both; the annotation of transformers does not know a mode of None.
    how: dict[str, Any] = {"mode": CUDA_MODE} if cuda else {"mode": None, "options": dict(CPU_OPTIONS)}
    config.compile_config = CompileConfig(fullgraph=True, **how)
    config.compile_config._compile_all_devices = True
    if not cuda:
        _use_decode_attention(model)
    model.generation_config = config


def is_compiled(model: Any) -> bool:
    """Whether `compile_decoding` was called for a model."""
    return isinstance(getattr(model, "generation_config", None), CompiledGeneration)


def why_not(model: Any) -> str | None:
    """None when the decode step of a model can be compiled here, else the reason why it cannot."""
    if not getattr(model, "can_generate", lambda: False)():
        return "it generates no text"
    if not model._supports_default_dynamic_cache():
        return "transformers has no static cache for it"
    if len(set(getattr(model, "hf_device_map", {}).values())) > 1:
        return "its layers are on several devices, or offloaded"
    return why_no_compiler(model.device.type)


def why_no_compiler(device: str) -> str | None:
    """None when torch.compile works for a type of device on this machine, else what is missing."""
    if device == "cuda":
        return None if find_spec("triton") else "triton is not installed (pip install triton)"
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return "there is no C++ compiler (on Debian and Ubuntu: apt install g++; or set CXX)"
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        return "Python's headers are missing (on Debian and Ubuntu: apt install python3-dev)"
    return None


class Decoder:
    """The steps that `generate` takes, one call each, for whoever times them: a prompt in one pass, then tokens.

    tokens: that the cache must hold, for each of `batch` sequences.
    """

    def __init__(self, model: Any, batch: int, tokens: int) -> None:
        self.model = model
        length = -(-tokens // CACHE_STEP) * CACHE_STEP
        self.cache = StaticCache(config=model.config.get_text_config(decoder=True), max_cache_len=length)
        self._eager(torch.zeros(batch, 1, dtype=torch.long, device=model.device))  # allocates it
        self.reset()

    def reset(self) -> None:
        """An empty cache, in the same memory."""
        self.cache.reset()

    def __call__(self, ids: torch.Tensor, **options: Any) -> Any:
        """The model's output for ids (batch, tokens) after those before: one token compiled, more of them eager."""
        if ids.shape[1] > 1:
            return self._eager(ids, **options)
        compiled = self.model.get_compiled_call(self.model.generation_config.compile_config)
        return compiled(**self._inputs(ids, options), return_dict=True)

    def _eager(self, ids: torch.Tensor, **options: Any) -> Any:
        return self.model(**self._inputs(ids, options), return_dict=True)

    def _inputs(self, ids: torch.Tensor, options: dict[str, Any]) -> Any:
        words = {cache_name(self.model): self.cache, "use_cache": True} | options
        return self.model.prepare_inputs_for_generation(ids, **words)


def cache_name(model: Any) -> str:
    """What a model calls the cache that it is given and gives back: "cache" in newer releases of transformers."""
    import inspect

    return "cache" if "cache" in inspect.signature(getattr(model, "forward", model)).parameters else "past_key_values"


def _use_decode_attention(model: Any) -> None:
    """Put decode_attention where the text model's attention is torch's."""
    text = model.config.get_text_config(decoder=True)
    if getattr(text, "_attn_implementation", None) != decode_attention.REPLACED:
        return
    if text is model.config:
        model.set_attn_implementation(decode_attention.NAME)
        return
    for name in model.config.sub_configs:
        if getattr(model.config, name, None) is text:
            model.set_attn_implementation({name: decode_attention.NAME})
