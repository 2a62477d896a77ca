"""Golden files of quantized weights, each made once by the library of its format: `python -m tests.made.golden NAME`.

The libraries are those of the group `oracles`; the suite reads the files and needs none of them. A file holds small
weights as the library stores them, under names that begin with "<case>|", and for each case what config.json says, the
dtype that the library dequantizes in, and the SHA-256 of the dequantized weight [N, K] in it:

    {"gptq/4 bits|m.qweight": ..., "__metadata__": {"cases": {"4 bits": {"config": ..., "dtype": ..., "sha256": ...}}}}
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

FOLDER = Path(__file__).parents[2] / "imports" / "golden"
SPLIT = "|"


def digest(weight: torch.Tensor) -> str:
    """SHA-256 of a dequantized weight [N, K], zeros without a sign."""
    return hashlib.sha256((weight + 0.0).contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


@dataclass
class Golden:
    """A golden file in the making, or as read. cases: by name. tensors: of each case by name."""

    cases: dict[str, dict[str, Any]] = field(default_factory=dict)
    tensors: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)

    def add(
        self,
        case: str,
        tensors: dict[str, torch.Tensor],
        config: dict[str, Any],
        weight: torch.Tensor,
        metadata: dict[str, str] | None = None,
    ) -> None:
        """One weight. config: quantization_config. weight: what the library dequantizes it to, [N, K].

        metadata: of the file that holds it.
        """
        dtype = str(weight.dtype).removeprefix("torch.")
        self.cases[case] = {"config": config, "dtype": dtype, "sha256": digest(weight), "metadata": metadata}
        self.tensors[case] = tensors

    def save(self, name: str) -> None:
        """Write the file of a format."""
        named = {
            f"{case}{SPLIT}{name}": tensor.contiguous().clone()
            for case, held in self.tensors.items()
            for name, tensor in held.items()
        }
        FOLDER.mkdir(exist_ok=True)
        save_file(named, FOLDER / f"{name}.safetensors", {"cases": json.dumps(self.cases)})

    @classmethod
    def read(cls, name: str) -> Golden:
        """The file of a format."""
        with safe_open(FOLDER / f"{name}.safetensors", "pt") as file:
            out = cls(json.loads(file.metadata()["cases"]))
            for key in file.keys():  # noqa: SIM118  (it is no dict)
                case, _, tensor = key.partition(SPLIT)
                out.tensors.setdefault(case, {})[tensor] = file.get_tensor(key)
        return out
