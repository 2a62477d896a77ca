"""LoRA of peft on packed layers by a config alone, for peft's LoraModel, which goes past peft's registry."""

import pytest
import torch

import mpq_kernels as mpq
from tests.made.checkpoints import tiny_model

peft = pytest.importorskip("peft", reason="only a program that trains adapters needs it")
from peft.tuners.lora import LoraModel  # noqa: E402

from mpq_kernels.hf.lora import with_packed_layers  # noqa: E402

IDS = torch.arange(3, 19)[None]


def test_a_config_of_its_own_gives_the_same_adapters(tmp_path):
    tiny_model("llama", tmp_path / "source", tied=False)
    fuse = [{"name": "qkv_proj", "members": ["q_proj", "k_proj", "v_proj"]}]
    plan = {"version": 1, "default": {"bits": 4, "group_size": -1}, "fuse": fuse}
    mpq.pack(tmp_path / "source", tmp_path / "packed", mpq.Plan.model_validate(plan), quantizer="rtn")
    base, other = mpq.load(tmp_path / "packed"), mpq.load(tmp_path / "packed")
    words = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False}
    torch.manual_seed(1)
    direct = LoraModel(base, with_packed_layers(peft.LoraConfig(**words), base), "default")
    torch.manual_seed(1)
    registered = peft.get_peft_model(other, peft.LoraConfig(**words))
    with torch.no_grad():
        assert torch.equal(direct(input_ids=IDS).logits, registered(input_ids=IDS).logits)
    with pytest.raises(mpq.UnsupportedError, match="merge it into the dense model and pack that"):
        direct.merge_and_unload()
