"""What calibration reads: a text, tokens, or inputs with images and sound; and how tokens are weighed."""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import QuantizeError

BATCH_TOKENS = 4096  # read at once
TOKEN_NAMES = ("input_ids", "decoder_input_ids")  # of what a model is called with
TokenWeights = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]


@dataclass(frozen=True, eq=False)
class Calibration:
    """What a quantizer with calibration reads: `text`, `tokens` or `samples`, exactly one of them.

    text: tokenized as one stream without special tokens and cut into windows of `window` tokens (of as many as the
        model has positions, if that is fewer); a last, incomplete window is left out. tokens: int64 [n,
        sequence], rows that are read on their own. samples: inputs of the model as its processor makes them, with the
        same names in each; a tower is calibrated on the images or sounds in them.
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
    samples: Sequence[Mapping[str, torch.Tensor]] | None = None

    def __post_init__(self) -> None:
        if [self.text, self.tokens, self.samples].count(None) != 2:
            raise QuantizeError("calibration takes either text, tokens or samples, exactly one of them")
        if self.samples is not None:
            self._check_samples(self.samples)
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

    def _check_samples(self, samples: Sequence[Mapping[str, torch.Tensor]]) -> None:
        if self.token_weights is not None:
            raise QuantizeError(
                "token_weights are for a text or tokens: what samples put into a block may be no tokens"
            )
        names = [frozenset(sample) for sample in samples]
        if not names or len(set(names)) > 1 or not names[0] & set(TOKEN_NAMES):
            raise QuantizeError(
                f"calibration samples must be mappings with {' or '.join(TOKEN_NAMES)}, at least one and all of the "
                f"same names, not {[sorted(each) for each in sorted(set(names), key=sorted)]}"
            )
        for sample in samples:
            odd = [name for name, value in sample.items() if not isinstance(value, torch.Tensor)]
            if odd:
                raise QuantizeError(f"calibration samples hold tensors, and {odd[0]} is none: return_tensors='pt'")

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

    def inputs(self, model_dir: Path, config: Any) -> list[dict[str, torch.Tensor]]:
        """What the model of a transformers config is called with, a batch at a time: keywords of its forward.

        Raises QuantizeError for tokens that do not fit the model.
        """
        if self.samples is None:
            return token_batches(self.rows(model_dir, config.get_text_config()), config.is_encoder_decoder)
        out: list[dict[str, torch.Tensor]] = []
        left = self.max_tokens
        for sample in self.samples:
            count = sum(sample[name].numel() for name in TOKEN_NAMES if name in sample)
            if left is not None and out and count > left:
                break
            left = None if left is None else left - count
            out.append(dict(sample))
        return out

    def rows(self, model_dir: Path, config: Any) -> torch.Tensor:
        """Token ids int64 [n, sequence] for a model and its transformers config. Raises QuantizeError."""
        if self.samples is not None:
            raise QuantizeError("this quantizer reads a text or tokens, and no samples with images or sound")
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
        digest = hashlib.sha256()
        for part in self._data():
            digest.update(part)
        out |= {"sha256": digest.hexdigest(), "device": self.device, "threads": torch.get_num_threads()}
        if self.token_weights is not None:  # two functions cannot be compared
            out["token_weights"] = f"a function, in run {uuid.uuid4()}"
        return out

    def _data(self) -> Iterator[bytes]:
        """All that is read, as bytes."""
        if self.text is not None:
            yield self.text.encode()
        if self.tokens is not None:
            yield self.tokens.long().contiguous().numpy().tobytes()
        for sample in self.samples or ():
            for name, tensor in sorted(sample.items()):
                yield f"{name} {tensor.dtype} {list(tensor.shape)}".encode()
                yield tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()

    def _text_rows(self, model_dir: Path, window: int) -> torch.Tensor:
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(model_dir, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # a missing or damaged tokenizer surfaces as any type from inside transformers
            raise QuantizeError(
                f"{model_dir}: calibration text needs the model's tokenizer, which does not load "
                f"({type(error).__name__}); give token ids instead"
            ) from error
        try:
            read = tokenizer(self.text, add_special_tokens=False, return_attention_mask=False, verbose=False)
        except BaseException as error:
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # of Rust, no Exception
                raise
            raise QuantizeError(
                f"{model_dir}: its tokenizer cannot read the calibration text ({type(error).__name__}: {error})"
            ) from error
        ids = read["input_ids"][: self.max_tokens]
        count = len(ids) // window
        if not count:
            raise QuantizeError(
                f"the calibration text has {len(ids)} tokens, less than one window of {window}: give more text"
            )
        return torch.tensor(ids[: count * window], dtype=torch.long).view(count, window)


def token_batches(rows: torch.Tensor, decoder: bool = False) -> list[dict[str, torch.Tensor]]:
    """Rows of tokens [n, sequence] as inputs of a model, in batches. decoder: whether it also wants them there."""
    batches = rows.split(max(1, BATCH_TOKENS // rows.shape[1]))
    return [{"input_ids": batch} | ({"decoder_input_ids": batch} if decoder else {}) for batch in batches]
