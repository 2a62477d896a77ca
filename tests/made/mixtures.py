"""Plans over the tiny mixtures of models.py, and dense models that hold the dequantized weights of packed ones."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM

import mpq_kernels as mpq
from mpq_kernels.dense.checkpoint import DenseCheckpoint
from mpq_kernels.dense.experts import expert_cuts, parameters_of, parts_of
from mpq_kernels.nn.experts import GroupedLinear, PackedExperts


def expert_plan(path) -> mpq.Plan:
    """Widths 1..8 in turn over the linears of all experts, so that gate and up of one expert differ; the rest mixed."""
    modules = {}
    for index, spec in enumerate(DenseCheckpoint.open(path).linears()):
        zeros = {"symmetric": index % 3 == 0}
        modules[spec.name] = {"bits": 16 if spec.is_head else 8 - index % 8, "group_size": 16, **zeros}
    return mpq.Plan.model_validate({"version": 1, "modules": modules})


def dequantized_twin(model, source):
    """The dense model with the dequantized weights, its experts run by transformers' eager code."""
    dense = AutoModelForCausalLM.from_pretrained(source, experts_implementation="eager").eval()
    for name, module in model.named_modules():
        if isinstance(module, PackedExperts):
            fill_experts(dense.get_submodule(name), module)
        elif isinstance(module, mpq.MixedLinear) and not isinstance(module, GroupedLinear):
            dense.get_submodule(name).weight.data = module.dequantize()
    return dense


@torch.no_grad()
def fill_experts(experts, packed: PackedExperts) -> None:
    """Put dequantized weights into 3-D parameters, in the family's own arrangement."""
    cuts, parts = expert_cuts(experts), parts_of(experts)
    for leaf, key in parameters_of(experts).items():
        for e in range(packed.num_experts):
            matrix = getattr(experts, key)[e]
            matrix = matrix.T if experts.is_transposed else matrix
            rows = getattr(packed, leaf).dequantize_expert(e).chunk(len(parts[leaf]))
            for part, values in zip(parts[leaf], rows, strict=True):
                matrix[slice(*cuts[part])] = values


def generate(model, tokens=12):
    ids = torch.arange(3, 15)[None]
    return model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False,
        output_scores=True, return_dict_in_generate=True,
    )  # fmt: skip


def packed_experts(model) -> list[PackedExperts]:
    return [module for module in model.modules() if isinstance(module, PackedExperts)]
