"""Models loaded block by block: the very tensors of from_pretrained, and memory that does not grow with the model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from mpq_kernels.calibrate.load import StoredModel
from mpq_kernels.calibrate.walk import stage_of
from mpq_kernels.dense.checkpoint import DenseCheckpoint
from mpq_kernels.errors import CheckpointError
from tests.made.checkpoints import FAMILIES, MIXTURES, tiny_model

CPU = torch.device("cpu")


def stored(path) -> StoredModel:
    return StoredModel(DenseCheckpoint.open(path), CPU)


def check_same(dense, wanted):
    """All parameters and buffers are equal bit by bit, but for their dtype. One block is in memory at a time."""
    last = len(dense.blocks)
    tensors = {**dict(wanted.named_parameters(remove_duplicate=False)), **dict(wanted.named_buffers())}
    seen = set()
    for stage in (last, *range(last)):
        dense.load(stage)
        assert [all(p.is_meta for p in block.parameters()) for block in dense.blocks.values()] == [
            i != stage for i in range(last)
        ]
        for name, tensor in tensors.items():
            if stage_of(dense.places, name) == stage:
                found = dense.model.get_parameter_or_buffer(name)
                assert torch.equal(found.double(), tensor.double()), name
                assert found.dtype == torch.float32 or name not in dict(wanted.named_parameters())
                seen.add(name)
    assert seen == set(tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", [*FAMILIES, *MIXTURES])
def test_tensors_are_those_of_from_pretrained(family, dtype, tmp_path):
    """Renamed, merged and tied tensors, several files, computed buffers."""
    tiny_model(family, tmp_path / "m", dtype=dtype, max_shard_size="60KB")
    dense = stored(tmp_path / "m")
    assert all(p.is_meta for p in dense.model.parameters())
    check_same(dense, AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=dtype))


@pytest.mark.parametrize("kind", ["head only", "both", "base model", "other dtype"])
def test_ways_to_store_a_model(kind, tmp_path):
    tiny_model("llama", tmp_path / "m", tied=kind != "base model", dtype=torch.bfloat16)
    file, embedding, head = tmp_path / "m" / "model.safetensors", "model.embed_tokens.weight", "lm_head.weight"
    tensors, dtype = load_file(file), torch.bfloat16
    if kind in ("head only", "both"):
        tensors[head] = tensors[embedding].clone()
    if kind == "head only":
        del tensors[embedding]
    if kind == "base model":
        tensors = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    if kind == "other dtype":
        config, dtype = json.loads((tmp_path / "m" / "config.json").read_text()), torch.float16
        (tmp_path / "m" / "config.json").write_text(json.dumps(config | {"dtype": "float16"}))
    save_file(tensors, file, metadata={"format": "pt"})
    dense = stored(tmp_path / "m")
    check_same(dense, AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=dtype))
    tied = dense.model.lm_head.weight is dense.model.model.embed_tokens.weight
    assert tied == (kind != "base model")


def test_loaded_weights_can_be_written_without_reaching_the_file(tmp_path):
    tiny_model("llama", tmp_path / "m")
    dense, before = stored(tmp_path / "m"), (tmp_path / "m" / "model.safetensors").read_bytes()
    dense.load(0)
    name = "model.layers.0.mlp.up_proj.weight"
    with torch.no_grad():
        dense.model.get_parameter(name).zero_()
    assert dense.source.read(name).any() and dense.model.get_parameter(name).eq(0).all()
    assert (tmp_path / "m" / "model.safetensors").read_bytes() == before


def test_a_parameter_that_no_file_holds_is_named(tmp_path):
    """Only what may come from renamed tensors gets this far: some stored tensor has no parameter of its own."""
    tiny_model("llama", tmp_path / "m")
    file, missing = tmp_path / "m" / "model.safetensors", "model.layers.1.input_layernorm.weight"
    tensors = load_file(file)
    tensors["model.layers.1.other.weight"] = tensors.pop(missing)
    save_file(tensors, file, metadata={"format": "pt"})
    dense = stored(tmp_path / "m")
    dense.load(0)
    with pytest.raises(CheckpointError, match=f"no file holds {missing}, which the model needs"):
        dense.load(1)


WALK = """
import sys
from pathlib import Path
import torch
from mpq_kernels.calibrate import Calibration
from mpq_kernels.calibrate.hessians import Calibrator
from mpq_kernels.dense.checkpoint import DenseCheckpoint
from transformers import AutoModelForCausalLM

torch.set_num_threads(1)
def resident(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))

def walk(path, last):
    tokens = torch.arange(256).reshape(4, 64) % 160
    Calibrator(DenseCheckpoint.open(path), Calibration(tokens=tokens)).hessian(f"model.layers.{last}.mlp.down_proj")

dense, small = sys.argv[1:]
walk(small, 1)  # what only the first call takes
before = resident("VmRSS")
walk(dense, 31)
held = resident("VmHWM") - before
AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float16)  # which copies
print(held, resident("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is Linux's count")
def test_memory_does_not_grow_with_the_model(tmp_path):
    """A walk through 32 blocks of 2.1M parameters: 134 MB in bf16, 8.4 MB a block in fp32.

    It may take three blocks in fp32 (the block, its stored bytes, the next one's pages), a Hessian of 960 x 960 four
    times (29 MB; the factor and its temporaries), and 10 MB for hidden states and temporaries; measured: 34 MB. A
    process of its own, in which freed tensors go back to the system: what the allocator keeps is not counted.
    """
    sizes = {"hidden_size": 448, "intermediate_size": 960, "num_hidden_layers": 32}
    tiny_model("llama", tmp_path / "dense", dtype=torch.bfloat16, max_shard_size="20MB", sizes=sizes)
    tiny_model("llama", tmp_path / "small")
    size = sum(file.stat().st_size for file in (tmp_path / "dense").glob("*.safetensors"))
    assert size > 120e6
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072"}
    command = [sys.executable, "-c", WALK, str(tmp_path / "dense"), str(tmp_path / "small")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    held, whole = map(int, done.stdout.split())
    block = size // 32 * 2
    assert held < 3 * block + 4 * 8 * 960**2 + 10e6, held
    assert whole > 110e6, "the count of memory does not count"
