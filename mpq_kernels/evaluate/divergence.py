"""How far a model's predictions are from those of the original: Kullback-Leibler divergence, token by token.

    original --predict--> top-k log-probabilities of every token --divergence--> KL(original || other), top-1

Predictions keep the k largest log-probabilities of each prediction in fp32, computed with the exact log-sum-exp over
the whole vocabulary; what lies outside of them is one more outcome. The divergence over k + 1 outcomes is never more
than the full one, and the same for k = vocabulary. 16-bit logits would blur exactly the small differences that matter.
"""

from __future__ import annotations

import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError, MPQError
from ..files.strict import fsync_directory, write_new_file
from ..progress import Progress
from .perplexity import LOGITS_IN_FLIGHT, standard_error

PERCENTILES = (50.0, 90.0, 95.0, 99.0, 99.9, 100.0)
TENSORS = {"rows": torch.int64, "ids": torch.int32, "logp": torch.float32, "nll": torch.float32}
LEAST = 1e-10  # a smaller probability of the tail is taken as this one: fp32 sums of the head are no more exact


@dataclass(frozen=True, eq=False)
class Predictions:
    """What a model predicts on some tokens.

    rows: int64 [windows, window]. ids int32, logp fp32 [windows, window - 1, k]: most likely tokens and their
    log-probabilities. nll fp32 [windows, window - 1]: -log-probability of the token that follows.
    """

    rows: torch.Tensor
    ids: torch.Tensor
    logp: torch.Tensor
    nll: torch.Tensor

    def to_file(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file; one that is there stays as it is until the new one is complete."""
        from safetensors.torch import save

        to = Path(path)
        part = to.with_name(f".{to.name}.partial-{os.getpid()}")
        try:
            write_new_file(part, save({name: getattr(self, name).cpu().contiguous() for name in TENSORS}))
            os.replace(part, to)
        finally:
            part.unlink(missing_ok=True)
        fsync_directory(to.parent)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Predictions:
        """Read what `to_file` wrote. Raises CheckpointError naming the file and the tensor."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            tensors = load_file(path)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: cannot be read as safetensors ({error})") from error
        if {name: tensor.dtype for name, tensor in tensors.items()} != TENSORS:
            raise CheckpointError(f"{path}: holds {sorted(tensors)}, not predictions ({', '.join(TENSORS)})")
        rows, ids = tensors["rows"], tensors["ids"]
        shape = (len(rows), rows.shape[-1] - 1)
        if rows.dim() != 2 or ids.dim() != 3 or ids.shape[:2] != shape or tensors["logp"].shape != ids.shape:
            raise CheckpointError(f"{path}: ids {list(ids.shape)} do not fit the tokens {list(rows.shape)}")
        if tensors["nll"].shape != shape or int(ids.min()) < 0 or int(rows.min()) < 0:
            raise CheckpointError(f"{path}: nll or token ids are not those of {list(rows.shape)} tokens")
        return cls(**tensors)


@dataclass(frozen=True)
class Divergence:
    """kl: mean KL(original || model) in nats a token; stderr: its standard error over windows.

    percentiles: of the tokens' KL, 100 is the largest. top1: part of the tokens where both find the same token most
    likely. ppl, original_ppl: perplexities on the same tokens. predicted: tokens.
    """

    kl: float
    stderr: float
    percentiles: dict[str, float]
    top1: float
    ppl: float
    original_ppl: float
    predicted: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self)


@torch.no_grad()
def predict(model: Any, rows: torch.Tensor, top_k: int = 512, batch_size: int = 8) -> Predictions:
    """Predictions of the original on rows int64 [windows, window]. Raises MPQError for a top_k below 1."""
    if top_k < 1:
        raise MPQError(f"top_k={top_k} keeps no prediction")
    parts: list[tuple[torch.Tensor, ...]] = []
    for x, logits in _batches(model, rows, batch_size, None):
        logp = logits.log_softmax(-1)
        ids = logits.topk(min(top_k, logits.shape[-1]), dim=-1).indices  # log-probabilities have more ties
        nll = -logp.gather(-1, x[:, 1:, None])[..., 0]
        parts.append((ids.int().cpu(), logp.gather(-1, ids).cpu(), nll.cpu()))
    ids, values, nll = (torch.cat(each) for each in zip(*parts, strict=True))
    return Predictions(rows.cpu(), ids, values, nll)


@torch.no_grad()
def divergence(
    model: Any,
    original: Predictions,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> Divergence:
    """Compare a model with the original's predictions, on their tokens. Raises MPQError for another vocabulary."""
    vocab = model.config.get_text_config().vocab_size
    if int(original.ids.max()) >= vocab:
        raise MPQError(f"the original predicts token {int(original.ids.max())}, and the model has {vocab} tokens")
    start = time.perf_counter()
    kls, agree, nlls = [], [], []
    first = 0
    for x, logits in _batches(model, original.rows, batch_size, progress):
        part = slice(first, first + len(x))
        ids, logp = original.ids[part].to(x.device).long(), original.logp[part].to(x.device)
        found = logits.log_softmax(-1)
        other = found.gather(-1, ids)
        kl = (logp.exp() * (logp - other)).double().sum(-1)
        if ids.shape[-1] < vocab:
            tails = [(1 - values.double().exp().sum(-1)).clamp(min=LEAST) for values in (logp, other)]
            kl += tails[0] * (tails[0].log() - tails[1].log())
        kls.append(kl.clamp(min=0).cpu())
        likeliest = logits.gather(-1, ids[..., :1])[..., 0] == logits.amax(-1)  # also where several are
        agree.append(likeliest.double().cpu())
        nlls.append(-found.gather(-1, x[:, 1:, None])[..., 0].double().cpu())
        first += len(x)
    kl, nll = torch.cat(kls), torch.cat(nlls)
    ranks = torch.quantile(kl.flatten()[:16_000_000], torch.tensor(PERCENTILES, dtype=kl.dtype) / 100)
    return Divergence(
        kl=float(kl.mean()),
        stderr=standard_error(kl.mean(1)),
        percentiles={f"{p:g}": float(value) for p, value in zip(PERCENTILES, ranks, strict=True)},
        top1=float(torch.cat(agree).mean()),
        ppl=float(nll.mean().exp()),
        original_ppl=float(original.nll.double().mean().exp()),
        predicted=kl.numel(),
        seconds=time.perf_counter() - start,
    )


def _batches(model: Any, rows: torch.Tensor, batch_size: int, progress: Any) -> Any:
    """(tokens, logits fp32 of all but the last) batch by batch."""
    vocab = model.config.get_text_config().vocab_size
    batch = max(1, min(batch_size, LOGITS_IN_FLIGHT // (rows.shape[1] * vocab)))
    for first in range(0, len(rows), batch):
        x = rows[first : first + batch].to(model.device)
        yield x, model(input_ids=x, use_cache=False).logits[:, :-1].float()
        if progress is not None:
            progress(min(first + batch, len(rows)), len(rows), "windows")
