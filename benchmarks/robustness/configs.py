"""`quantization_config` of a packed directory, mutated, against the files that it describes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from random import Random

from mpq_kernels.checkpoint.packed import PackedCheckpoint

from .campaign import Run
from .mutate import Raw, mutate_json, mutate_tree, text, tree
from .world import make_packed, read_json

KNOWN = ("layouts", "modules", "kept", "layout", "bias", "members", "experts", "module", "count", "in_features",
         "out_features", "segments", "scale_dtype", "permuted", "quant_method", "layout_id", "format_version", "int",
         "float", "none", "bfloat16", "float32", "model.layers.0.mlp.up_proj", "q_proj", "lm_head")  # fmt: skip


def prepare(folder: Path) -> Run:
    """Cases: `PackedCheckpoint.open`, sizes added up, every tensor of every module mapped."""
    made = [make_packed(folder), make_packed(folder, "mixtral")]
    configs = [read_json(path / "config.json") for path in made]

    def run(chance: Random) -> str:
        which = chance.randrange(len(made))
        path = Path(f"packed{which}")
        if not path.exists():
            shutil.copytree(made[which], path)
        config = dict(configs[which])
        if chance.random() < 0.9:
            part = tree(config["quantization_config"])
            for _ in range(chance.choice((1, 1, 1, 2, 4))):
                part = mutate_tree(chance, part, KNOWN)
            config["quantization_config"] = Raw(text(part))
            data = text(tree(config)).encode("utf-8", "surrogatepass")
        else:
            data = mutate_json(chance, config, KNOWN)
        (path / "config.json").write_bytes(data)
        packed = PackedCheckpoint.open(path)
        packed.size()
        for name in packed.modules:
            packed.weight(name)
            packed.bias(name)
        again = json.loads(json.dumps(packed.packing.to_dict()))
        assert type(packed.packing).from_dict(again) == packed.packing
        return "opened"

    return run
