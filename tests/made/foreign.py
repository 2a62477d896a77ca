"""Target models and made files of other programs, for the tests of imported plans."""

import json
import re
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from mpq_kernels.dense.checkpoint import DenseCheckpoint, LinearSpec
from mpq_kernels.plan.resolve import resolve
from tests.made.checkpoints import tiny_model

# name -> (family, sizes). K=320 is two and a half groups of 128 columns; K=96 of mixtral's w2 is less than one.
MODELS = {
    "llama": ("llama", {"hidden_size": 256, "intermediate_size": 320}),
    "mixtral": ("mixtral", {"hidden_size": 128}),
    "shared": ("qwen2_moe", {}),
    "deepseek": ("deepseek_v2", {"q_lora_rank": None, "num_hidden_layers": 3}),
}
SAVED = torch.save


@cache
def linears(model: str) -> tuple[LinearSpec, ...]:
    """The linears of a target model, from real files."""
    family, sizes = MODELS[model]
    with TemporaryDirectory() as folder:
        tiny_model(family, Path(folder) / "model", sizes=sizes)
        return tuple(DenseCheckpoint.open(Path(folder) / "model").linears())


def write(folder: Path, name: str, content) -> Path:
    """A file by its name: .pt by torch.save, .json as JSON unless it is text already, anything else as text."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".pt" and not isinstance(content, bytes):
        SAVED(content, path)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def described(plan, model: str) -> dict[str, str]:
    """Linear -> what the plan makes of it once resolved: "4/128" bits and group, "s" symmetric; "16" kept."""
    resolved = resolve(plan, linears(model))
    out = dict.fromkeys(resolved.kept, "16")
    for weight in resolved.weights:
        for member in weight.members:
            parts = []
            for s in member.layout.segments:
                cut = "" if len(member.layout.segments) == 1 else f"@{s.k0}:{s.k1}"
                parts.append(f"{s.bits}/{s.group_size}{'s' if s.zero == 'none' else ''}{cut}")
            out[member.spec.name] = " ".join(parts)
    return out


def expected(model: str, rules: dict[str, str]) -> dict[str, str]:
    """Linear -> the value of the last rule whose expression is found in its name; each rule must be about one."""
    out: dict[str, str] = {}
    for pattern, value in rules.items():
        found = [spec.name for spec in linears(model) if re.search(pattern, spec.name)]
        assert found, pattern
        out.update(dict.fromkeys(found, value))
    return out
