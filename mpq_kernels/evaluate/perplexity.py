"""How good and how fast a causal language model is: perplexity on a text, tokens per second.

Works on any transformers model, packed or dense.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import MPQError
from ..progress import Progress

LOGITS_IN_FLIGHT = 1 << 26  # elements of one batch of logits: 256 MB in fp32, whatever the vocabulary


@dataclass(frozen=True)
class Perplexity:
    """ppl = exp(nll). nll: mean negative log-likelihood in nats over `predicted` tokens, in `seconds` of model time.

    tokens: those of the text that were used. stderr: standard error of ppl, from the spread of the windows' means: what
    another text of the same kind and length may give; NaN for a single window. Two models on one text differ by less.
    """

    ppl: float
    nll: float
    tokens: int
    predicted: int
    window: int
    seconds: float
    stderr: float = math.nan


@torch.no_grad()
def perplexity(
    model: Any,
    tokenizer: Any,
    text: str,
    *,
    window: int = 256,
    max_tokens: int | None = None,
    batch_size: int = 8,
    stride: int | None = None,
    progress: Progress | None = None,
) -> Perplexity:
    """Perplexity of `text` as one stream of tokens.

    The convention, without which two figures cannot be compared:
      * the whole text is tokenized at once, no special token is added, and the first `max_tokens` tokens are kept;
      * they are cut into windows of `window` tokens that do not overlap; a last, incomplete window is left out;
      * each window is read on its own, so its first token is context only and `window - 1` tokens are predicted;
      * with `stride`, windows start so many tokens apart, and of all but the first only the last `stride` tokens are
        predicted: each token once, after at least `window - stride` tokens of context;
      * log-softmax in fp32, summed in fp64; ppl = exp(sum / predicted).

    `batch_size` windows run at once (fewer for a large vocabulary) and do not change the result beyond rounding.
    progress(done, total, "windows") is called after each batch. Raises MPQError for a text shorter than a
    window and for a window of less than two tokens.
    """
    if batch_size < 1:
        raise MPQError(f"batch_size={batch_size} is not positive")
    rows = token_windows(tokenizer, text, window, max_tokens, stride).to(model.device)
    windows = len(rows)
    step = window if stride is None else stride
    vocab = model.config.get_text_config().vocab_size
    batch = max(1, min(batch_size, LOGITS_IN_FLIGHT // (window * vocab)))
    sums = torch.zeros(windows, dtype=torch.float64, device=model.device)
    start = time.perf_counter()
    for first in range(0, windows, batch):
        x = rows[first : first + batch]
        logits = model(input_ids=x, use_cache=False).logits[:, :-1]
        for place, (row, target) in enumerate(zip(logits, x[:, 1:], strict=True), start=first):
            skip = 0 if place == 0 else max(0, window - 1 - step)
            losses = torch.nn.functional.cross_entropy(row[skip:].float(), target[skip:], reduction="none")
            sums[place] = losses.double().sum()
        if progress is not None:
            progress(min(first + batch, windows), windows, "windows")
    counted = min(step, window - 1)  # in every window but the first
    predicted = window - 1 + (windows - 1) * counted
    nll = sums.sum().item() / predicted
    seconds = time.perf_counter() - start
    ppl = math.exp(nll) if nll < 700 else math.inf  # exp overflows at 709; NaN stays NaN
    ppl = math.nan if math.isnan(nll) else ppl
    counts = torch.full_like(sums, counted)
    counts[0] = window - 1
    stderr = ppl * standard_error(sums / counts)
    return Perplexity(ppl, nll, window + (windows - 1) * step, predicted, window, seconds, stderr)


def token_windows(
    tokenizer: Any, text: str, window: int, max_tokens: int | None = None, stride: int | None = None
) -> torch.Tensor:
    """Token ids int64 [windows, window] of a text by the convention of `perplexity`. Raises MPQError."""
    if window < 2:
        raise MPQError(f"window={window} predicts nothing: the first token of a window is only context; use >= 2")
    step = window if stride is None else stride
    if not 1 <= step <= window:
        raise MPQError(f"stride={stride} is not in 1..{window}, the window: tokens would be left out")
    ids = tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    ids = torch.tensor(ids[:max_tokens], dtype=torch.long)
    if len(ids) < window:
        raise MPQError(
            f"{len(ids)} tokens are less than one window of {window}: give more text or tokens, or a smaller window"
        )
    return ids.unfold(0, window, step)


def standard_error(means: torch.Tensor) -> float:
    """Of the mean of independent values [n]: their standard deviation / sqrt(n); NaN for a single one."""
    return float(means.std() / math.sqrt(len(means))) if len(means) > 1 else math.nan
