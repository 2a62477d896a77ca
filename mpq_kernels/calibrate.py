"""Calibration: what the inputs of every linear look like on a text, block by block, with bounded memory.

    tokens -> embedding -> [block 0] -> [block 1] -> ...        hidden states [tokens, hidden] between blocks are kept
                             |  hessian("...q_proj")            x^T x of one input at a time
                             |  set_weight("...q_proj", ...)    the quantized weight takes the dense one's place

Inputs come from layers that are already quantized, in earlier blocks and inside the block, because that is what the
layer will read when the packed model runs: its codes then also make up for part of the error before it.

Memory does not grow with the number of blocks: all outside of the blocks in fp32, one block in fp32 (read from the
files when the walk comes to it, released behind it: blockload.py), its inputs for all calibration tokens in fp32, and
one Hessian in fp64 with its factor; where experts are packed, what one module of them reads (routed.py). The same input
gives the same bytes on one machine with one number of threads: matrix products of another number of threads add up in
another order.
"""

from __future__ import annotations

import hashlib
import os
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .blockload import StoredModel
from .blockwalk import BlockWalk, Stop
from .errors import QuantizeError
from .linearspec import DOWN, GATE_UP, PARTS, ExpertPart
from .mixture import model_experts
from .routed import Moment, Routed, route
from .source import SourceCheckpoint

TokenWeights = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]


@dataclass(frozen=True, eq=False)
class Calibration:
    """What a quantizer with calibration reads: `text` or `tokens`, exactly one of them.

    text: tokenized as one stream without special tokens and cut into windows of `window` tokens (of as many as the
        model has positions, if that is fewer); a last, incomplete window is left out. tokens: int64 [n,
        sequence], rows that are read on their own.
    max_tokens: only the first so many are used (None: all). damping: this part of the mean of a Hessian's diagonal is
        added to its diagonal, which makes it positive definite for any text. device: where the work is done.
    act_order: round the columns with the largest inputs first. The order is stored as a permutation of K, in every
        weight whose plan gives none and does not tell its columns apart; 4 bytes for each column, and a gather of x.
        Experts keep their order: those of one module are stored with one, and read inputs of their own.
    token_weights: (hidden states [n, sequence, hidden] that enter a block, tokens [n, sequence], index of the block)
        -> weights >= 0 [n, sequence] of the tokens in the Hessians of that block; None weighs them equally. The index
        after the last block stands for the output head.
    """

    text: str | None = None
    tokens: torch.Tensor | None = None
    window: int = 256
    max_tokens: int | None = 65536
    damping: float = 0.05
    act_order: bool = False
    device: str = "cpu"
    token_weights: TokenWeights | None = None

    def __post_init__(self) -> None:
        if (self.text is None) == (self.tokens is None):
            raise QuantizeError("calibration takes either text or tokens, exactly one of them")
        if self.text is not None and not isinstance(self.text, str):
            raise QuantizeError(f"calibration text must be a str, not {type(self.text).__name__}")
        if self.tokens is not None and (
            self.tokens.dim() != 2 or 0 in self.tokens.shape or self.tokens.dtype not in (torch.int64, torch.int32)
        ):
            raise QuantizeError(
                f"calibration tokens must be int64 [n, sequence], not {self.tokens.dtype} {list(self.tokens.shape)}"
            )
        for name in ("window", "max_tokens"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise QuantizeError(f"calibration {name}={value!r} must be a positive number of tokens")
        if not 0 <= self.damping < float("inf"):
            raise QuantizeError(f"calibration damping={self.damping!r} must be a finite number >= 0")

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], **options: Any) -> Calibration:
        """Calibration on a UTF-8 text file; `options` are the other fields. Raises QuantizeError."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise QuantizeError(
                f"{path}: is not UTF-8 text ({error.reason} at byte {error.start}); convert it first"
            ) from error
        except OSError as error:
            raise QuantizeError(f"{path}: the calibration text cannot be read ({error.strerror})") from error
        return cls(text=text, **options)

    def rows(self, model_dir: Path, config: Any) -> torch.Tensor:
        """Token ids int64 [n, sequence] for a model and its transformers config. Raises QuantizeError."""
        limit = getattr(config, "max_position_embeddings", None)
        window = min(self.window, limit) if isinstance(limit, int) else self.window
        rows = self._text_rows(model_dir, window) if self.tokens is None else self.tokens.long()
        count, length = rows.shape
        if self.max_tokens is not None and count * length > self.max_tokens:
            rows = rows[: max(1, self.max_tokens // length), : self.max_tokens]
        if isinstance(limit, int) and rows.shape[1] > limit:
            raise QuantizeError(
                f"calibration rows of {rows.shape[1]} tokens are longer than the {limit} positions of the model"
            )
        if int(rows.min()) < 0 or int(rows.max()) >= config.vocab_size:
            raise QuantizeError(
                f"calibration tokens reach from {int(rows.min())} to {int(rows.max())}, and the model's vocabulary is "
                f"0..{config.vocab_size - 1}: they belong to another tokenizer"
            )
        return rows

    def identity(self) -> dict[str, Any]:
        """What tells one calibration from another, in JSON: its options, and a digest of its text or tokens."""
        out: dict[str, Any] = {key: getattr(self, key) for key in ("window", "max_tokens", "damping", "act_order")}
        data = self.text.encode() if self.tokens is None else self.tokens.long().contiguous().numpy().tobytes()  # type: ignore[union-attr]
        out |= {"sha256": hashlib.sha256(data).hexdigest(), "device": self.device, "threads": torch.get_num_threads()}
        if self.token_weights is not None:  # two functions cannot be compared
            out["token_weights"] = f"a function, in run {uuid.uuid4()}"
        return out

    def _text_rows(self, model_dir: Path, window: int) -> torch.Tensor:
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(model_dir, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # a missing or damaged tokenizer surfaces as any type from inside transformers
            raise QuantizeError(
                f"{model_dir}: calibration text needs the model's tokenizer, which does not load "
                f"({type(error).__name__}); give token ids instead"
            ) from error
        ids = tokenizer(self.text, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        ids = ids[: self.max_tokens]
        count = len(ids) // window
        if not count:
            raise QuantizeError(
                f"the calibration text has {len(ids)} tokens, less than one window of {window}: give more text"
            )
        return torch.tensor(ids[: count * window], dtype=torch.long).view(count, window)


class Calibrator:
    """Hessians of a model's linears, which must be asked for in the model's order, block by block."""

    def __init__(self, source: SourceCheckpoint, calibration: Calibration) -> None:
        """Loads what lies outside of the blocks, and the first of them.

        Raises QuantizeError: tokens that do not fit the model, a model that is not a stack of blocks; CheckpointError.
        """
        self.calibration = calibration
        device = torch.device(calibration.device)
        dense = StoredModel(source, device)
        rows = calibration.rows(source.path, dense.model.config.get_text_config())
        self.walk = BlockWalk(dense.model, rows, device, dense.load)
        self.leaders: dict[str, str] = {}  # linear of this stage -> the first that reads the same tensor
        self.calls: Counter[str] = Counter()
        self.held: tuple[str, torch.Tensor] | None = None
        self.experts = {spec.name: spec.expert for spec in source.linears() if spec.expert is not None}
        self.places = {  # where the model has the weight of an expert's linear: parameter, and the part of it
            (spec.expert.module, spec.expert.index, spec.expert.part): (spec.tensor, spec.expert.cut)
            for spec in model_experts(dense.model)
            if spec.expert is not None and spec.expert.cut is not None
        }
        self.routed: Routed | None = None
        self.unreached: dict[str, None] = {}  # experts that no token was routed to, in the order in which they came
        self._probe()

    @torch.no_grad()
    def hessian(self, name: str) -> torch.Tensor:
        """Damped mean of x^T x over the tokens that the linear reads: fp64 [K, K] on the calibration device.

        Raises QuantizeError: no token reaches it, NaN or Inf in its input, a block that has been passed.
        """
        self.enter(name)
        if name in self.experts:
            return self._expert_hessian(self.experts[name])
        if name not in self.leaders:
            raise QuantizeError(
                f"{name}: no token of the first {self.walk.batches[0].numel()} calibration tokens reaches this linear; "
                "keep it in 16 bits (bits=16)"
            )
        leader = self.leaders[name]
        if self.held is None or self.held[0] != leader:
            self.held = None  # released before the next one is made
            self.held = (leader, damped(self._collect(leader), self.calibration.damping))
        return self.held[1]

    @torch.no_grad()
    def enter(self, name: str) -> None:
        """Go on to the block of a linear; of an expert's, find out who is routed to it. QuantizeError: it is passed."""
        expert = self.experts.get(name)
        stage = self.walk.stage(name if expert is None else expert.module)
        if stage < self.walk.current:
            raise QuantizeError(
                f"{name}: calibration has already passed its block; linears are quantized in the order of the blocks"
            )
        while self.walk.current < stage:
            self.walk.advance()
            self._probe()
        if expert is not None:
            if self.routed is None or self.routed.name != expert.module:
                self.routed = None  # released before the next one is made
                self.routed = route(self.walk, expert.module, self._weights)
            if not self.routed.reached(expert.index):
                self.unreached[f"{expert.block}.{expert.index}"] = None

    @torch.no_grad()
    def set_weight(self, name: str, weight: torch.Tensor) -> None:
        """Give the linear its quantized weight [N, K], so that what follows it is calibrated on its output."""
        expert = self.experts.get(name)
        if expert is None:
            self.walk.set_weight(name, weight)
            return
        parameter, cut = self.places[expert.module, expert.index, expert.part]
        cut.put(self.walk.model.get_parameter(parameter), weight)

    def _expert_hessian(self, expert: ExpertPart) -> torch.Tensor:
        """As `hessian`; gate and up of an expert have one."""
        assert self.routed is not None and self.routed.name == expert.module, "enter() came first"
        leaf = DOWN if expert.part in PARTS[DOWN] else GATE_UP
        key = f"{expert.module}.{expert.index}.{leaf}"
        if self.held is None or self.held[0] != key:
            self.held = None
            self.held = (key, damped(self.routed.hessian(expert.index, leaf), self.calibration.damping))
        return self.held[1]

    @torch.no_grad()
    def _probe(self) -> None:
        """Find out which linears of this stage read the same tensor, and how often each is called."""
        self.held = self.routed = None
        seen: list[tuple[str, torch.Tensor]] = []
        with ExitStack() as hooks:
            for name in self.walk.linears():
                hooks.enter_context(self._hook(name, lambda x, name=name: seen.append((name, x))))  # type: ignore[misc]
            self.walk.forward(0)
        self.calls = Counter(name for name, _ in seen)
        self.leaders = {name: next(other for other, y in seen if y is x) for name, x in reversed(seen)}

    def _collect(self, leader: str) -> torch.Tensor:
        """Mean of x^T x over all inputs of one linear. Raises QuantizeError."""
        size = self.walk.model.get_submodule(leader).in_features
        moment, left = Moment(leader, size, self.walk.device), 0
        weights: torch.Tensor | None = None

        def add(x: torch.Tensor) -> None:
            """Take one input in; the last that a batch can bring ends its forward pass."""
            nonlocal left
            x = x.reshape(-1, size).float()
            if weights is not None and len(x) != len(weights):
                raise QuantizeError(f"{leader}: reads {len(x)} of {len(weights)} tokens, so weights cannot be matched")
            moment.add(x, weights)
            left -= 1
            if not left:
                raise Stop

        with self._hook(leader, add):
            for index in range(len(self.walk.batches)):
                weights, left = self._weights(index), self.calls[leader]
                self.walk.forward(index)
        return moment.mean()

    def _weights(self, index: int) -> torch.Tensor | None:
        """Weights fp32 [tokens] of a batch, or None. Raises QuantizeError."""
        if self.calibration.token_weights is None:
            return None
        tokens = self.walk.batches[index]
        weights = self.calibration.token_weights(self.walk.hidden[index], tokens, self.walk.current)
        if weights.shape != tokens.shape:
            raise QuantizeError(f"token_weights gave {list(weights.shape)} for tokens {list(tokens.shape)}")
        if not bool(torch.isfinite(weights).all()) or bool((weights < 0).any()):
            raise QuantizeError("token_weights gave NaN, Inf or a negative weight")
        return weights.reshape(-1).to(self.walk.device, torch.float32)

    @contextmanager
    def _hook(self, name: str, see: Callable[[torch.Tensor], None]) -> Iterator[None]:
        module = self.walk.model.get_submodule(name)
        handle = module.register_forward_pre_hook(lambda module, args: see(args[0]))
        try:
            yield
        finally:
            handle.remove()


def damped(hessian: torch.Tensor, damping: float) -> torch.Tensor:
    """hessian [K, K] + damping * mean of its diagonal on the diagonal, in place; the identity when all of it is 0.

    A column whose input is always 0 then stands alone, and its weights are simply rounded.
    """
    diagonal = hessian.diagonal()
    mean = diagonal.mean()
    diagonal.add_(damping * mean if mean else 1.0)
    return hessian
