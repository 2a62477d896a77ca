"""Packed models that vLLM serves on this machine, and what is asked of them over HTTP."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

import mpq_kernels as mpq
from tests.made.checkpoints import tiny_model

TOKENIZER = Path(__file__).parents[2] / "examples" / "gutenberg-6m"
SIZES = {
    "vocab_size": 2048, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 256,
}  # fmt: skip
FUSED = [
    {"name": "qkv_proj", "members": ["q_proj", "k_proj", "v_proj"]},
    {"name": "gate_up_proj", "members": ["gate_proj", "up_proj"]},
]
# name -> (family, its sizes, its plan). Fused and flat names, every width, kinds of zeros, segments, a permutation, a
# packed and tied embedding, a packed head, members that are kept or stored in float8 beside packed ones.
MODELS = {
    "llama": ("llama", {"tie_word_embeddings": False}, {
        "version": 1,
        "default": {"bits": 4, "group_size": 64},
        "modules": {
            "re:.*k_proj": {"bits": 3, "group_size": 32},
            "re:.*v_proj": {"bits": 6, "group_size": -1},
            "re:.*up_proj": {"bits": 5, "group_size": 64},
            "re:.*down_proj": {
                "bits": 2,
                "segments": [{"cols": [0, 64], "bits": 8}, {"cols": [64, None], "bits": 4, "group_size": 32}],
            },
            "lm_head": {"bits": 7, "group_size": 32, "symmetric": True},
        },
        "fuse": FUSED,
    }),
    "qwen3": ("qwen3", {"tie_word_embeddings": True}, {
        "version": 1,
        "default": {"bits": 4, "group_size": 32},
        "modules": {
            "re:.*layers\\.1.*k_proj": {"bits": 16},
            "re:.*layers\\.0.*q_proj": {"bits": 1, "group_size": 32},
            "re:.*layers\\.0.*up_proj": {"bits": 8, "dtype": "float8_e4m3fn"},
            "re:.*layers\\.1.*o_proj": {"bits": 8, "group_size": 64, "perm": torch.randperm(128).tolist()},
            "model.embed_tokens": {"bits": 8, "group_size": 32},
        },
    }),
    "mixture": ("qwen3_moe", {"num_experts": 4, "moe_intermediate_size": 96, "tie_word_embeddings": False}, {
        "version": 1,
        "default": {"bits": 4, "group_size": 32},
        "modules": {
            "re:.*experts\\.1\\..*": {"bits": 6, "group_size": 32},
            "re:.*gate_proj": {"bits": 5, "group_size": 16},
        },
    }),
    # Its experts have another name in the files and in vLLM than in transformers.
    "mixtral": ("mixtral", {"num_local_experts": 4, "intermediate_size": 96, "tie_word_embeddings": False}, {
        "version": 1,
        "default": {"bits": 4, "group_size": 32},
        "modules": {"re:.*experts\\.2\\..*": {"bits": 3, "group_size": 16}},
    }),
}  # fmt: skip
PROMPTS = [list(range(3, 15)), list(range(40, 58)), [7, 9, 200, 3], [1999, 5, 1000, 77, 300, 4, 4]]


def packed_model(name: str, root: Path) -> Path:
    """A folder that `mpq pack` wrote, with a tokenizer."""
    family, sizes, plan = MODELS[name]
    # transformers leaves the router of a Mixtral in the dtype of the files, whatever dtype is asked for.
    dtype = torch.float32 if family == "mixtral" else torch.bfloat16
    tiny_model(family, root / f"{name}-dense", dtype=dtype, sizes=SIZES | sizes)
    mpq.pack(root / f"{name}-dense", root / name, mpq.Plan.from_dict(plan), quantizer="rtn")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / file, root / name)
    return root / name


def greedy(model: torch.nn.Module, prompt: list[int], tokens: int) -> list[int]:
    """What transformers' loop generates."""
    ids = torch.tensor([prompt])
    words = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
    return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **words)[0, len(prompt) :].tolist()


@torch.no_grad()
def settled(model: torch.nn.Module, prompt: list[int], tokens: list[int]) -> list[int]:
    """The first of these tokens, up to where transformers itself, given all at once, would go on differently.

    Of a mixture two experts may be chosen by the last bit of a sum, whose order depends on how many tokens there are.
    """
    logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
    same = logits.argmax(-1) == torch.tensor(tokens)
    return tokens if bool(same.all()) else tokens[: int(same.int().argmin())]


class Client:
    """One connection to a server of this machine."""

    def __init__(self, port: int) -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)

    def complete(self, prompt: list[int], tokens: int, model: str = "packed") -> list[int]:
        """Greedy tokens. Raises RuntimeError for an answer that is none."""
        body = {
            "model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True,
            "return_token_ids": True,
        }  # fmt: skip
        self.connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        answer = self.connection.getresponse()
        text = answer.read()
        if answer.status != 200:
            raise RuntimeError(f"{answer.status}: {text[:500]!r}")
        return json.loads(text)["choices"][0]["token_ids"]

    def ready(self) -> bool:
        try:
            self.connection.request("GET", "/health")
            answer = self.connection.getresponse()
            answer.read()
            return answer.status == 200
        except OSError:
            self.connection.close()
            return False


@contextmanager
def server(path: Path, log: Path, *flags: str, dtype: str = "float32") -> Iterator[int]:
    """The port of vLLM's OpenAI server over a packed folder. Its output goes to `log`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(path), "--served-model-name",
        "packed", "--host", "127.0.0.1", "--port", str(port), "--max-model-len", "128", "--dtype", dtype, *flags,
    ]  # fmt: skip
    quiet = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "OMP_NUM_THREADS": "1"}
    quiet["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # two ranks on one node of memory
    with log.open("w") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env={**os.environ, **quiet}, start_new_session=True
        )
    try:
        client, end = Client(port), time.monotonic() + 600
        while not client.ready():
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"vLLM did not start: {log.read_text()[-6000:]}")
            time.sleep(0.5)
        yield port
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
