"""accelerate's offloading: the logits and gradients of the resident model, for plain, fused and expert layers."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import mpq_kernels as mpq
from mpq_kernels.nn.linear import packed_modules
from tests.made.checkpoints import tiny_model

accelerate = pytest.importorskip("accelerate", reason="only a program that offloads needs it")

IDS = torch.arange(3, 27).view(2, 12)
CPU = torch.device("cpu")
SPLIT = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "disk"}
SPLIT |= {"model.layers.0": "cpu", "model.layers.1": "disk"}


@pytest.fixture(scope="module", params=["qwen2", "mixtral", "gpt_oss"])
def packed_dir(request, tmp_path_factory):
    """Biases and fused q/k/v and gate/up, or fused q/k/v and experts, with biases too; a packed head."""
    root = tmp_path_factory.mktemp(request.param)
    tiny_model(request.param, root / "source", tied=False)
    fuse = [{"name": "qkv_proj", "members": ["q_proj", "k_proj", "v_proj"]}]
    if request.param == "qwen2":
        fuse.append({"name": "gate_up_proj", "members": ["gate_proj", "up_proj"]})
    plan = {"version": 1, "default": {"bits": 4, "group_size": 32}, "fuse": fuse}
    mpq.pack(root / "source", root / "packed", mpq.Plan.model_validate(plan), quantizer="rtn", max_shard_bytes=60_000)
    return root / "packed"


def cpu_offload(path, folder, offload_buffers):
    return accelerate.cpu_offload(mpq.load(path), execution_device=CPU, offload_buffers=offload_buffers)


def disk_offload(path, folder, offload_buffers):
    return accelerate.disk_offload(mpq.load(path), folder, execution_device=CPU, offload_buffers=offload_buffers)


def mapped(device_map, **words):
    def load(path, folder, offload_buffers):
        return AutoModelForCausalLM.from_pretrained(
            path, device_map=device_map, offload_folder=folder, offload_buffers=offload_buffers, **words
        )

    return load


WAYS = {
    "cpu_offload": cpu_offload,
    "disk_offload": disk_offload,
    "device_map with disk": mapped(SPLIT),
    "device_map auto": mapped("auto", max_memory={"cpu": 80_000}),
}


def passes(model):
    """Logits without gradients in both ways, and with them, then the gradient of the embedded input."""
    with torch.no_grad():
        plain = model(input_ids=IDS).logits
    with torch.inference_mode():
        inference = model(input_ids=IDS).logits
    x = model.get_input_embeddings()(IDS).detach().requires_grad_()
    y = model(inputs_embeds=x).logits
    y.square().sum().backward()
    return [plain, inference.clone(), y.detach(), x.grad]


@pytest.fixture(scope="module")
def resident(packed_dir):
    """What the model computes that was never offloaded."""
    return passes(mpq.load(packed_dir))


@pytest.mark.parametrize(("way", "offload_buffers"), [*((way, True) for way in WAYS), ("cpu_offload", False)])
def test_offloaded_models_compute_what_resident_ones_do(packed_dir, resident, way, offload_buffers, tmp_path):
    model = WAYS[way](packed_dir, tmp_path, offload_buffers)
    away = [name for name, layer in packed_modules(model) if layer.qweight.is_meta]
    assert bool(away) == offload_buffers, "packed tensors are away if, and only if, buffers are offloaded"
    for got, wanted in zip(passes(model), resident, strict=True):
        assert torch.equal(got, wanted)
    assert away == [name for name, layer in packed_modules(model) if layer.qweight.is_meta]


@pytest.mark.parametrize("name", ["model.layers.1.self_attn.qkv_proj.scales", "lm_head.scales"])
def test_bad_values_on_disk_are_found(packed_dir, name, tmp_path):
    shutil.copytree(packed_dir, tmp_path / "copy")
    index = json.loads((tmp_path / "copy" / "model.safetensors.index.json").read_text())
    file = tmp_path / "copy" / index["weight_map"][name]
    tensors = {key: tensor.clone() for key, tensor in load_file(file).items()}
    tensors[name].fill_(float("nan"))
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(mpq.MPQError, match="scales hold NaN"):
        mapped(SPLIT)(tmp_path / "copy", tmp_path / "folder", True)


def test_an_offloaded_model_can_be_saved(packed_dir, tmp_path):
    model = mapped(SPLIT)(packed_dir, tmp_path / "folder", True)
    model.save_pretrained(tmp_path / "again")
    again, wanted = mpq.load(tmp_path / "again").state_dict(), mpq.load(packed_dir).state_dict()
    assert again.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(again[name], tensor), name
