"""The dense model that computes what a packed one should: the same directory with the dequantized weights."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM

from mpq_kernels.dense.experts import experts_modules
from mpq_kernels.nn.experts import GroupedLinear, PackedExperts
from mpq_kernels.nn.fused import FusedLinear, FusedMember
from mpq_kernels.nn.linear import MixedLinear

from .mixtures import fill_experts


def dequantized_twin(model, source, auto=AutoModelForCausalLM):
    """The model of `source` whose linears and experts hold what the packed `model` dequantizes to; experts run eagerly.

    auto: the class whose from_pretrained reads it.
    """
    dense = auto.from_pretrained(source, experts_implementation="eager").eval()
    experts_modules(dense)  # says of classes that do not say it themselves how they hold their experts
    head = dense.get_output_embeddings()
    if head is not None and isinstance(model.get_output_embeddings(), MixedLinear):
        head.weight = torch.nn.Parameter(head.weight.detach().clone())  # a packed head is not the embedding
    for name, module in model.named_modules():
        if isinstance(module, PackedExperts):
            fill_experts(dense.get_submodule(name), module)
        elif isinstance(module, (MixedLinear, FusedMember)) and not isinstance(module, (FusedLinear, GroupedLinear)):
            dense.get_submodule(name).weight.data = module.dequantize()
    return dense
