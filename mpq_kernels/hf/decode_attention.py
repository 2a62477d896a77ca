"""Attention of one new token over a static cache, for decode steps that Inductor compiles for the CPU.

torch's own attention for the CPU is made for many queries: in bf16 it takes 1.4 ms for 32 heads over 512 positions.
Said as sums, Inductor makes loops over the cache of it, each shared key and value read where it lies: 0.14 ms. (One
thread of a 2-core AMD EPYC, 8 key and value heads of 64.)

    scores[h, l] = q[h] . k[h / group, l] * scaling     p = softmax(scores)     y[h] = sum_l p[h, l] v[h / group, l]

All in fp32, rounded once. It takes the place of "sdpa" in transformers' table of attention functions, under a name of
its own; for everything but a compiled decode step it is "sdpa".
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "mpq_sdpa"
REPLACED = "sdpa"
# Extras of some families, which are left to the function that knows them.
OTHERS = ("softcap", "position_bias", "s_aux")


def decode_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As transformers' "sdpa". query: (batch, heads, M, D). key, value: (batch, kv_heads, L, D).

    attention_mask: (batch or 1, heads or 1, M, L), bool or added to the scores. Returns ((batch, M, heads, D), None).
    """
    one = query.shape[2] == 1 and not dropout and torch.compiler.is_compiling() and query.device.type == "cpu"
    if not one or any(options.get(name) is not None for name in OTHERS):
        found: tuple[torch.Tensor, torch.Tensor | None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
        return found
    batch, heads, _, width = query.shape
    kv_heads = key.shape[1]
    grouped = (batch, kv_heads, heads // kv_heads)
    q = query.reshape(*grouped, 1, width).float()
    scores = (q * key.unsqueeze(2).float()).sum(-1) * (width**-0.5 if scaling is None else scaling)
    if attention_mask is not None:
        mask = attention_mask.expand(-1, heads, -1, -1).reshape(attention_mask.shape[0], *grouped[1:], -1)
        if mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask, torch.finfo(torch.float32).min)
        else:
            scores = scores + mask.float()
    shares = scores.softmax(-1).unsqueeze(-1)
    y = (shares * value.unsqueeze(2).float()).sum(-2)
    return y.to(query.dtype).reshape(batch, 1, heads, value.shape[-1]), None


AttentionInterface.register(NAME, decode_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
