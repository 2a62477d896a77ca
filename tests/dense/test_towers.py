"""Which linears are towers and projectors: by family, and what plans make of them."""

import pytest
import torch
import transformers

from mpq_kernels.allocate.units import allocated
from mpq_kernels.dense.linears import LinearSpec
from mpq_kernels.dense.names import list_linears
from mpq_kernels.dense.towers import towers
from mpq_kernels.errors import PlanError
from mpq_kernels.plan.plan import Plan, WeightPlan
from tests.made.multimodal import FAMILIES

SIGHT = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1}
BERT = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 50}
T5 = {"d_model": 16, "d_ff": 24, "num_heads": 2, "d_kv": 8, "num_layers": 1, "vocab_size": 50}
PARTS = ("model.vision_", "model.visual", "model.connector", "model.encoder", "model.multi_modal_projector")
PARTS += ("model.audio_tower", "vision_model", "multi_modal_projector")
# name -> (class, config, prefixes of its towers and projectors)
MODELS = {
    **{
        family: (model, config(**values), PARTS)
        for family, (config, model, values) in FAMILIES.items()
    },
    "a decoder, and an encoder of text": (
        transformers.T5ForConditionalGeneration, transformers.T5Config(**T5), ()
    ),
    "an encoder": (transformers.BertForMaskedLM, transformers.BertConfig(**BERT), ()),
    "a classifier of images": (
        transformers.ViTForImageClassification, transformers.ViTConfig(**SIGHT), ()
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MODELS)
def test_towers_by_family(case):
    model_class, config, beside = MODELS[case]
    with torch.device("meta"):
        model = model_class(config)
    specs = list_linears(model)
    found = towers(model)
    assert found == {spec.name for spec in specs if spec.tower}
    assert found == {spec.name for spec in specs if beside and spec.name.startswith(beside)}
    assert bool(found) == bool(beside)
    heads = [spec.name for spec in specs if spec.is_head]
    assert len(heads) == 1 and heads[0] not in found


SPECS = [
    LinearSpec("model.language_model.q_proj", 64, 128, "a"),
    LinearSpec("model.vision_tower.fc1", 64, 128, "b", tower=True),
    LinearSpec("model.vision_tower.fc2", 64, 4304, "c", tower=True),
    LinearSpec("model.vision_tower.odd", 64, 38, "d", tower=True),
    LinearSpec("lm_head", 64, 128, "e", is_head=True),
]


def test_uniform_keeps_towers_unless_told():
    rules = Plan.uniform(SPECS, bits=3).modules
    assert {name: rule.bits for name, rule in rules.items()} == {spec.name: 16 for spec in SPECS[1:]}
    rules = Plan.uniform(SPECS, bits=3, group_size=64, symmetric=True, towers=6).modules
    assert rules["lm_head"].bits == 16
    assert rules["model.vision_tower.fc1"] == WeightPlan(bits=6, group_size=64, symmetric=True)
    assert rules["model.vision_tower.fc2"].group_size == 16  # the largest divisor of 4304 that is at most 64
    assert rules["model.vision_tower.odd"].group_size == 38
    rules = Plan.uniform([LinearSpec("v", 64, 34, "v", tower=True)], bits=3, group_size=32, towers=6).modules
    assert rules["v"].group_size == 17
    rules = Plan.uniform([LinearSpec("v", 64, 26, "v", tower=True)], bits=3, group_size=20, towers=6).modules
    assert rules["v"].group_size == -1
    with pytest.raises(PlanError, match="bits=12"):
        Plan.uniform(SPECS, bits=3, towers=12)


def test_towers_are_not_allocated():
    assert [spec.name for spec in allocated(SPECS)] == ["model.language_model.q_proj"]
