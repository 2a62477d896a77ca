"""vLLM serves packed folders: the entry point `vllm.general_plugins` of this package calls `register`.

    config.py    MPQConfig: which method serves which layer of vLLM, by the modules that config.json names
    sources.py   what the files hold for a layer, and which rows and columns of it this rank keeps
    launches.py  those parts put together into as few products as can be
    linear.py    linears, merged ones too; vocab.py embeddings and heads; experts.py mixtures

Nothing here is imported, and vLLM is not, until vLLM calls `register`.

May import: format, dense, checkpoint, backends. Gives: register. Source: docs/vllm.md.
"""

from __future__ import annotations


def register() -> None:
    """Make the quantization method "mpq" known to vLLM; harmless when repeated."""
    import torch
    from vllm.model_executor.layers.quantization import register_quantization_config
    from vllm.platforms import current_platform

    from ..checkpoint.config import QUANT_METHOD
    from .config import MPQConfig

    register_quantization_config(QUANT_METHOD)(MPQConfig)
    if current_platform.is_cpu():
        # Linux gives a process the tile registers when it asks, and vLLM's attention uses them without asking.
        torch.cpu._init_amx()


__all__ = ["register"]
