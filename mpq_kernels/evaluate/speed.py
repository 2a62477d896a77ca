"""Tokens per second of a causal language model, measured as llama-bench does: prompts (pp) and generation (tg) apart.

    pp128   one forward pass over 128 tokens of each sequence, into an empty cache; logits of the last token only
    tg32    32 forward passes over one token of each sequence, from an empty cache on

Tokens are synthetic and always the same, sampling is left out. One run of each test comes first and is not counted.
Works on any transformers model, packed or dense; where its decode step is compiled (hf/compiled.py), tokens go through
that, and prompts into its cache. `time_calls` times single layers, for benchmarks/layers/gemm.py.
"""

from __future__ import annotations

import inspect
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import MPQError
from ..format.layout import SizeBreakdown
from ..hf.compiled import Decoder, cache_name, is_compiled
from ..nn.float8 import float8_modules
from ..nn.linear import packed_modules
from ..progress import Progress
from ..version import VERSION

LEAST_CALLS = 10  # of one layer, however slow


@dataclass(frozen=True)
class Measurement:
    """One test. test: "pp" or "tg". tokens: of each of `batch` sequences. seconds: of each repetition."""

    test: str
    tokens: int
    batch: int
    seconds: tuple[float, ...]

    @property
    def name(self) -> str:
        """As llama-bench writes it: pp128, tg32."""
        return f"{self.test}{self.tokens}"

    @property
    def rates(self) -> list[float]:
        """Tokens per second of each repetition, all sequences together."""
        return [self.tokens * self.batch / seconds for seconds in self.seconds]

    @property
    def mean(self) -> float:
        """Mean of `rates`."""
        return statistics.fmean(self.rates)

    @property
    def deviation(self) -> float | None:
        """Standard deviation of `rates` (n - 1), None for a single repetition."""
        return statistics.stdev(self.rates) if len(self.seconds) > 1 else None


@dataclass(frozen=True)
class ModelFacts:
    """What was measured.

    params: weights of the model, packed or not, each once. packed: stored bits of the packed weights by purpose.
    kept_bytes: all other parameters. backend: of the packed layers, with the instruction set of the CPU's; "torch" for
    a dense model. activations: of the packed layers, "exact" or "int8"; "exact" for a dense model. run: of generated
    tokens, "eager" or "compiled".
    """

    params: int
    packed: SizeBreakdown
    kept_bytes: int
    device: str
    backend: str
    activations: str
    run: str
    threads: int
    dtype: str
    torch: str
    version: str

    @classmethod
    def of(cls, model: Any) -> ModelFacts:
        """Facts of a model, here and now."""
        layers = [layer for _, layer in packed_modules(model)]
        packed = sum((layer.layout.size() for layer in layers), SizeBreakdown())
        packed = sum((layer.shape.size() for _, layer in float8_modules(model)), packed)
        kept = list(model.parameters())
        backends = dict.fromkeys(layer.backend for layer in layers)
        activations = dict.fromkeys(layer.activations for layer in layers)
        return cls(
            params=sum(p.numel() for p in kept) + packed.weights,
            packed=packed,
            kept_bytes=sum(p.nbytes for p in kept),
            device=_device_name(model.device),
            backend=", ".join(_with_isa(name) for name in backends) or "torch",
            activations=", ".join(activations) or "exact",
            run="compiled" if is_compiled(model) else "eager",
            threads=torch.get_num_threads(),
            dtype=str(model.dtype).removeprefix("torch."),
            torch=torch.__version__,
            version=VERSION,
        )

    @property
    def bits_per_weight(self) -> float:
        """Stored bits of each packed weight; of a model without any, those of its dtype."""
        return self.packed.bits_per_weight or 8.0 * getattr(torch, self.dtype).itemsize


@torch.no_grad()
def measure(
    model: Any,
    prompts: Sequence[int] = (512,),
    generated: Sequence[int] = (128,),
    batches: Sequence[int] = (1,),
    repetitions: int = 5,
    progress: Progress | None = None,
) -> list[Measurement]:
    """Time every prompt length and every number of generated tokens at every batch size.

    prompts, generated: tokens of a sequence. progress(done, total, test) is called after each test. Raises MPQError
    for numbers that are not positive, more tokens than the model has positions, and a model whose logits are not
    finite: what computes nonsense is not timed.
    """
    tests = [("pp", n) for n in prompts] + [("tg", n) for n in generated]
    _check(model, tests, batches, repetitions)
    only_last = "logits_to_keep" in inspect.signature(model.forward).parameters
    results = []
    for batch in batches:
        for test, tokens in tests:
            ids = synthetic_tokens(model, batch, tokens)
            pieces = [ids] if test == "pp" else list(ids.split(1, dim=1))
            extra = {"logits_to_keep": 1} if only_last else {}

            def fed(step: int, _: Any, pieces: Sequence[torch.Tensor] = pieces) -> torch.Tensor:
                return pieces[step]

            steps = stepper(model, batch, tokens)
            out, _ = _timed(model, steps, len(pieces), fed, **extra)
            if not bool(out.logits.isfinite().all()):
                raise MPQError(f"{test}{tokens}, batch {batch}: the model's logits hold NaN or Inf, so it is not timed")
            seconds = tuple(_timed(model, steps, len(pieces), fed, **extra)[1] for _ in range(repetitions))
            results.append(Measurement(test, tokens, batch, seconds))
            if progress is not None:
                progress(len(results), len(tests) * len(batches), f"{test}{tokens} x {batch}")
    return results


def synthetic_tokens(model: Any, batch: int, tokens: int) -> torch.Tensor:
    """Token ids [batch, tokens] on the model's device, the same at every call."""
    vocab = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocab, (batch, tokens), generator=generator).to(model.device)


def _check(model: Any, tests: Sequence[tuple[str, int]], batches: Sequence[int], repetitions: int) -> None:
    if not tests or not batches:
        raise MPQError("nothing to measure: give a prompt length or a number of generated tokens, and a batch size")
    for what, values in (("tokens", [n for _, n in tests]), ("batch", batches), ("repetitions", [repetitions])):
        if min(values) < 1:
            raise MPQError(f"{what}={min(values)} is not positive")
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    test, longest = max(tests, key=lambda item: item[1])
    if limit is not None and longest > limit:
        raise MPQError(f"{test}{longest} is more than the model's {limit} positions (max_position_embeddings)")


class EagerSteps:
    """The model itself, with a cache that grows."""

    def __init__(self, model: Any) -> None:
        self.model, self.name = model, cache_name(model)
        self.before: Any = None

    def reset(self) -> None:
        """Begin with an empty cache."""
        self.before = None

    def __call__(self, ids: torch.Tensor, **extra: int) -> Any:
        """The output for ids (batch, tokens) after those before."""
        cache = None if self.before is None else getattr(self.before, self.name)
        self.before = self.model(input_ids=ids, use_cache=True, **{self.name: cache}, **extra)
        return self.before


def stepper(model: Any, batch: int, tokens: int) -> EagerSteps | Decoder:
    """What runs a model as `generate` would, with room for so many tokens of each sequence in its cache."""
    return Decoder(model, batch, tokens) if is_compiled(model) else EagerSteps(model)


def _timed(
    model: Any,
    run: EagerSteps | Decoder,
    steps: int,
    ids: Callable[[int, Any], torch.Tensor],
    out: Any = None,
    **extra: int,
) -> tuple[Any, float]:
    """(last output, seconds) of `steps` forward passes with one cache: that of `out`, or an empty one.

    ids(step, the output before): what the model is fed. The only place where tokens per second are measured.
    """
    if out is None:
        run.reset()
    start = now(model.device)
    for step in range(steps):
        out = run(ids(step, out), **extra)
    return out, now(model.device) - start


def now(device: torch.device) -> float:
    """Seconds, after all work submitted to the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def time_calls(calls: Sequence[Callable[[], Any]], device: torch.device, seconds: float) -> list[float]:
    """Microseconds of each call, going round the calls for `seconds`, after one round (at most 1 s) that is not kept.

    On CUDA the events are recorded on the current stream and read once everything is done.
    """
    end = time.perf_counter() + 1
    for call in calls:
        call()
        if time.perf_counter() > end:
            break
    rounds = _time_on_cuda if device.type == "cuda" else _time_on_cpu
    return rounds(calls, seconds)


def _time_on_cpu(calls: Sequence[Callable[[], Any]], seconds: float) -> list[float]:
    """Wall time of each call."""
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < LEAST_CALLS or time.perf_counter() < end:
        call = calls[len(times) % len(calls)]
        start = time.perf_counter_ns()
        call()
        times.append((time.perf_counter_ns() - start) / 1e3)
    return times


def _time_on_cuda(calls: Sequence[Callable[[], Any]], seconds: float) -> list[float]:
    """Time between two events around each call; launch gaps are inside."""
    torch.cuda.synchronize()
    pairs: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
    end = time.perf_counter() + seconds
    while len(pairs) < LEAST_CALLS or time.perf_counter() < end:
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        calls[len(pairs) % len(calls)]()
        stop.record()
        pairs.append((start, stop))
        if len(pairs) % 64 == 0:
            torch.cuda.synchronize()
    torch.cuda.synchronize()
    return [1e3 * start.elapsed_time(stop) for start, stop in pairs]


def read_bandwidth(device: torch.device, nbytes: int = 2**29) -> float:
    """GB/s of summing a large fp32 array with torch on all threads: the best of several, as the ceiling for reads."""
    array = torch.ones(nbytes // 4, device=device)
    return nbytes / min(time_calls([array.sum], device, 1.0)) / 1e3


def _with_isa(backend: str) -> str:
    return f"{backend} ({torch.ops.mpq.cpu_isa()})" if backend == "cpu" else backend


def _device_name(device: torch.device) -> str:
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


@dataclass(frozen=True)
class Speed:
    """Medians over `repeats` runs of one sequence at a time (batch 1)."""

    prompt_tokens: int
    generated_tokens: int
    prompt_tokens_per_s: float
    generated_tokens_per_s: float
    repeats: int


@torch.no_grad()
def generation_speed(model: Any, tokenizer: Any, prompt: str, new_tokens: int = 64, repeats: int = 3) -> Speed:
    """Time greedy decoding of exactly `new_tokens` tokens after `prompt`, batch 1, with a key-value cache.

    The prompt's forward pass and the decoding steps are timed apart; an end token does not stop it. One short run
    comes first and is not counted. Raises MPQError for an empty prompt.
    """
    ids = torch.tensor([tokenizer(prompt, add_special_tokens=False)["input_ids"]], dtype=torch.long)
    if not ids.numel():
        raise MPQError("the prompt has no tokens; give at least one word")
    if new_tokens < 1 or repeats < 1:
        raise MPQError(f"new_tokens={new_tokens} and repeats={repeats} must be positive")
    ids = ids.to(model.device)
    run = stepper(model, 1, ids.shape[1] + new_tokens)
    _timed_decode(model, run, ids, min(4, new_tokens))
    runs = [_timed_decode(model, run, ids, new_tokens) for _ in range(repeats)]
    return Speed(
        prompt_tokens=ids.shape[1],
        generated_tokens=new_tokens,
        prompt_tokens_per_s=ids.shape[1] / statistics.median(prefill for prefill, _ in runs),
        generated_tokens_per_s=new_tokens / statistics.median(decode for _, decode in runs),
        repeats=repeats,
    )


def _timed_decode(model: Any, run: EagerSteps | Decoder, ids: torch.Tensor, new_tokens: int) -> tuple[float, float]:
    """(seconds of the prompt's pass, seconds of `new_tokens` steps of one token each)."""
    out, prompt = _timed(model, run, 1, lambda step, before: ids)
    _, decode = _timed(model, run, new_tokens, lambda step, before: before.logits[:, -1:].argmax(-1), out)
    return prompt, decode
