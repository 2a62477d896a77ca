"""config.json of a model, its part that transformers reads, mutated: dense directories packed, packed ones loaded."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from random import Random

import torch

import mpq_kernels
from mpq_kernels.checkpoint.packed import PackedCheckpoint
from mpq_kernels.dense.checkpoint import DenseCheckpoint
from mpq_kernels.packer.pack import pack
from mpq_kernels.plan.plan import Plan

from .campaign import Run
from .mutate import Pairs, Raw, mutate_json, mutate_tree, text, tree
from .world import FAMILIES, make_model, make_packed, read_json

UNIFORM = Plan.from_dict({"version": 1, "default": {"bits": 4, "group_size": -1}})
# Keys that some model's config has, whatever this one is.
KNOWN = ("num_labels", "id2label", "label2id", "architectures", "model_type", "auto_map", "quantization_config",
         "text_config", "vision_config", "sub_configs", "rope_scaling", "rope_parameters", "rope_theta", "layer_types",
         "dtype", "torch_dtype", "tie_word_embeddings", "head_dim", "hidden_act", "num_hidden_layers", "vocab_size",
         "max_position_embeddings", "initializer_range", "transformers_weights", "attn_implementation",
         "_attn_implementation", "is_encoder_decoder", "pruned_heads", "torchscript", "use_cache", "problem_type",
         "per_layer_config", "transformers_version", "_name_or_path", "name_or_path", "return_dict",
         "LlamaForCausalLM", "LlamaModel", "PreTrainedModel", "LlamaForSequenceClassification", "Trainer", "yarn",
         "dynamic", "linear", "llama3", "full_attention", "sliding_attention", "float16", "float64", "int8", "auto",
         "llama", "bert", "t5", "mixtral", "gelu", "silu", "eager", "flash_attention_2")  # fmt: skip
HUGE = ("100000", "10000000", "1000000000", "1000000000000", "9007199254740993")


def _config(chance: Random, config: dict) -> bytes:
    part = tree(config)
    how = chance.random()
    if how < 0.15 and config:  # one number made huge
        numbers = [index for index, (_, value) in enumerate(part) if type(value) is int]
        index = chance.choice(numbers)
        part[index] = (part[index][0], Raw(chance.choice(HUGE)))
    elif how < 0.3:
        part.append(
            (chance.choice(KNOWN), chance.choice((Raw(chance.choice(HUGE)), True, "x", None, Pairs([("a", 1)]), [])))
        )
    else:
        quantized = [pair for pair in part if pair[0] == "quantization_config"]
        part = Pairs(pair for pair in part if pair[0] != "quantization_config")
        for _ in range(chance.choice((1, 1, 1, 2, 4))):
            part = mutate_tree(chance, part, KNOWN)
        if isinstance(part, Pairs):
            part += quantized
        elif chance.random() < 0.1:
            return mutate_json(chance, config, KNOWN)
    return text(part).encode("utf-8", "surrogatepass")


def prepare(folder: Path) -> Run:
    """Cases: `load`, and `pack` into a new directory. What loads must be the model of the files and give numbers."""
    warnings.simplefilter("ignore")
    dense = {family: make_model(folder, family) for family in FAMILIES}
    packed = {family: make_packed(folder, family) for family in FAMILIES}
    ids = torch.arange(8)[None]
    for family in FAMILIES:  # imports what it needs before memory is limited
        mpq_kernels.load(packed[family])(input_ids=ids)

    def run(chance: Random) -> str:
        family = chance.choice(list(FAMILIES))
        loads = chance.random() < 0.6
        source = (packed if loads else dense)[family]
        path = Path(source.name)
        if not path.exists():
            shutil.copytree(source, path)
        (path / "config.json").write_bytes(_config(chance, read_json(source / "config.json")))
        if not loads:
            shutil.rmtree("out", ignore_errors=True)
            if chance.random() < 0.7:
                DenseCheckpoint.open(path).linears()
                return "listed"
            pack(path, "out", UNIFORM, "rtn", allow_dense=True)
            return "packed"
        model = mpq_kernels.load(path)
        checkpoint = PackedCheckpoint.open(path)
        held = dict(model.named_buffers()) | dict(model.named_parameters())
        prefix = model.base_model_prefix
        for name in checkpoint.tensors:
            spellings = (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}")
            found = next((held[each] for each in spellings if each in held), None)
            if found is not None and name.endswith("qweight"):
                assert torch.equal(found, checkpoint.read(name))
        json.dumps(model.config.to_dict(), default=str)
        return "loaded"

    return run
