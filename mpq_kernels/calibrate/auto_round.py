"""Learned rounding by the auto-round library (an optional extra): our plan in, its codes, scales and zeros out.

    plan --layer_config--> AutoRound(dense model in fp32, rows of the calibration).quantize()
         --> weight, scale, zp of each linear --take--> QuantizedWeight

auto-round tunes all rounding decisions and ranges of a block together, by signed gradients on the block's output:
https://arxiv.org/abs/2309.05516. Nothing that it finds is changed: it leaves each linear with fl32((code - zp) * scale)
as its weight, from which the codes are read back, and what the packed weight will mean is compared with that weight bit
by bit. It computes in fp32 whatever the model's dtype; in bf16 codes of 8 bits could not be read back.

Memory: the dense model in fp32, and two sets of hidden states for all calibration tokens. The seed is fixed; the same
input gives the same bytes on one machine with one number of threads.
"""

from __future__ import annotations

import contextlib
import io
import logging
import sys
from collections.abc import Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from ..dense.checkpoint import DenseCheckpoint
from ..errors import MPQError, QuantizeError
from ..files.strict import short
from ..format.codes import FORMATS, KEPT_BITS
from ..format.layout import Segment, WeightLayout
from ..format.reference import dequantize
from ..format.weights import TORCH_DTYPES, QuantizedBlock, QuantizedWeight
from ..plan.resolve import ResolvedMember, ResolvedPlan
from ..quantize import suitable
from .calibration import Calibration

QUANTIZER = "auto-round"
STEPS = 200  # the library's default, and the setting of its published figures
SEED = 42
BATCH_ROWS = 8
DIVISOR = 32  # auto-round leaves linears in 16 bits whose N or K is no multiple
SHOWN = 3


def check_plan(resolved: ResolvedPlan, source: DenseCheckpoint) -> None:
    """Raise QuantizeError for a mixture model, and with the linears of a plan that auto-round cannot do, and why."""
    members = [m for weight in resolved.weights for m in weight.members if not m.spec.embedding]
    refused = [f"{m.spec.name} ({reason})" for m in members if (reason := _why_not(m)) is not None]
    if refused:
        more = f" and {len(refused) - SHOWN} more" if len(refused) > SHOWN else ""
        raise QuantizeError(
            f"quantizer={QUANTIZER!r} cannot do {', '.join(refused[:SHOWN])}{more}: change the plan there, keep them "
            f"as they are (bits={KEPT_BITS}), or choose {suitable(lambda row: not row.whole_model)}"
        )
    if source.decodes:
        raise QuantizeError(
            f"quantizer={QUANTIZER!r}: {source.path} is stored quantized, which auto-round would load in another form; "
            f"choose {suitable(lambda row: not row.whole_model)}"
        )
    if any(spec.expert for spec in source.linears()):
        raise QuantizeError(
            f"quantizer={QUANTIZER!r}: {source.path} is a mixture model, whose experts auto-round would rebuild; "
            f"choose {suitable(lambda row: not row.whole_model)}"
        )


def check_installed() -> None:
    """Raise QuantizeError unless the library is there. It is imported, which takes seconds."""
    try:
        import auto_round  # noqa: F401
    except ImportError as error:
        raise QuantizeError(
            f"quantizer={QUANTIZER!r} needs the library auto-round ({error}): pip install 'mpq_kernels[auto-round]'"
        ) from error


class LearnedRounding:
    """The weights that auto-round finds for a plan; all are tuned when the first is asked for."""

    def __init__(self, source: DenseCheckpoint, resolved: ResolvedPlan, calibration: Calibration, quiet: bool) -> None:
        """quiet: hide auto-round's progress. Raises QuantizeError for whatever it cannot do; reads no weight."""
        if calibration.act_order or calibration.token_weights is not None:
            what = "act_order" if calibration.act_order else "token_weights"
            raise QuantizeError(f"quantizer={QUANTIZER!r} has no {what}; leave it out")
        check_plan(resolved, source)
        check_installed()
        self.source, self.calibration, self.quiet = source, calibration, quiet
        self.members = {m.spec.name: m for weight in resolved.weights for m in weight.members if not m.spec.embedding}
        # A head is left alone unless it is named.
        left = {*resolved.kept, *resolved.floats}
        self.kept = tuple(spec.name for spec in source.linears() if spec.name in left and not spec.is_head)
        self.model: nn.Module | None = None

    def weight(self, name: str) -> QuantizedWeight:
        """The linear's codes, scales and zeros. Each can be asked for once: its dense weight is then released."""
        if self.model is None:
            self.model = self._tune()
        layer = self.model.get_submodule(name)
        taken = take(layer, self.members[name].layout, name)
        if not self.members[name].spec.is_head:
            layer.to("meta")
        return taken

    def _tune(self) -> nn.Module:
        from auto_round import AutoRound, SignRoundConfig
        from transformers import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_pretrained(
            self.source.path, dtype=torch.float32, local_files_only=True, trust_remote_code=False, use_safetensors=True
        )
        rows = self.calibration.rows(self.source.path, model.config.get_text_config())
        # Asked for its padding token and no more: the rows have none, whatever the model's own tokenizer would say.
        tokenizer = SimpleNamespace(pad_token_id=None, pad_token=None, model_max_length=rows.shape[1])
        with _quietly(self.quiet), _in_words():
            tuned, _ = AutoRound(
                model,
                tokenizer,
                alg_configs=SignRoundConfig(iters=STEPS),
                layer_config=layer_config(self.members.values(), self.kept),
                dataset=list(rows.split(1)),
                seqlen=rows.shape[1],
                nsamples=len(rows),
                batch_size=min(BATCH_ROWS, len(rows)),
                device_map=self.calibration.device,
                enable_torch_compile=False,
                seed=SEED,
                low_cpu_mem_usage=False,
                amp=False,
            ).quantize()
        kept = [name for name in self.kept if getattr(tuned.get_submodule(name), "scale", None) is not None]
        if kept:
            raise QuantizeError(f"auto-round quantized {kept[0]}, which the plan keeps; {_tested()}")
        return tuned


def layer_config(members: Iterable[ResolvedMember], kept: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The plan as auto-round reads it: every linear by name."""
    config: dict[str, dict[str, Any]] = {
        name: {"bits": KEPT_BITS, "act_bits": KEPT_BITS, "data_type": "float", "act_data_type": "float"}
        for name in kept
    }
    for member in members:
        segment = member.layout.segments[0]
        config[member.spec.name] = {
            "bits": segment.bits,
            "group_size": segment.group_size,
            "sym": segment.zero == "none",
            "data_type": "int",
            "act_bits": KEPT_BITS,
            "scale_dtype": TORCH_DTYPES[member.layout.scale_dtype],
        }
    return config


def take(layer: Any, layout: WeightLayout, name: str) -> QuantizedWeight:
    """The codes of a layer that auto-round has tuned: weight [N, K] restored, scale [N, groups], zp [N, groups] or one.

    Raises QuantizeError unless they mean exactly the layer's weight, in the layout of the plan.
    """
    segment = layout.segments[0]
    weight, scale = layer.weight.detach().float().cpu(), getattr(layer, "scale", None)
    if not isinstance(scale, torch.Tensor):
        raise QuantizeError(f"{name}: auto-round left this linear as it was, and the plan packs it; {_tested()}")
    rows, groups = layout.out_features, layout.in_features // segment.group_size
    scales = scale.detach().cpu().to(TORCH_DTYPES[layout.scale_dtype])
    zeros = torch.as_tensor(layer.zp).detach().cpu().float()
    if (
        scales.numel() != rows * groups
        or zeros.numel() not in (1, rows * groups)
        or weight.shape != (rows, layout.in_features)
    ):
        raise QuantizeError(
            f"{name}: auto-round made {scales.numel()} scales where the plan has {rows} x {groups}; {_tested()}"
        )
    scales, zeros = scales.view(rows, groups), zeros.reshape(-1).expand(rows * groups).view(rows, groups)
    parts, none = weight.view(rows, groups, -1), scales.unsqueeze(2) == 0
    parts = parts.masked_fill(none, 0.0)  # whatever it left of a group whose scale is 0 in its dtype
    codes = (parts / scales.float().unsqueeze(2) + zeros.unsqueeze(2)).round_().masked_fill_(none, 0.0)
    weight, codes = parts.view(weight.shape), codes.view(weight.shape)
    taken = _checked(codes, scales, zeros, segment)
    if taken is None or not torch.equal(dequantize(taken), weight):
        raise QuantizeError(f"{name}: auto-round's weight is not (code - zero) * scale bit by bit; {_tested()}")
    return taken


def _checked(
    codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, segment: Segment
) -> QuantizedWeight | None:
    """The weight of these values (fp32, scales as stored); None where one does not fit its dtype."""
    top = FORMATS[segment.bits].max_code
    whole = torch.equal(zeros, zeros.round()) and bool(((zeros >= 0) & (zeros <= 255)).all())
    if not whole or not bool(((codes >= 0) & (codes <= top)).all()):
        return None
    stored = None if segment.zero == "none" else zeros.to(torch.uint8)
    return QuantizedWeight.uniform(QuantizedBlock(segment.bits, codes.to(torch.uint8), scales, stored))


def _why_not(member: ResolvedMember) -> str | None:
    """Why auto-round cannot do a linear, None if it can."""
    layout, spec = member.layout, member.spec
    segment = layout.segments[0]
    if spec.expert is not None:
        return "it belongs to an expert"
    if spec.transposed:
        return "its weight is stored as [K, N]"
    if spec.is_head and spec.tied:
        return "its weight is also the embedding"
    if len(layout.segments) > 1:
        return "its rows or columns have different widths"
    if layout.permuted:
        return "its columns are permuted"
    if segment.zero not in ("none", "int"):
        return f"its zeros are {segment.zero}"
    if segment.bits == 1:
        return "1 bit"
    if segment.bits == 8 and segment.zero != "none":
        return "8 bits need symmetric=true"
    if spec.out_features % DIVISOR or spec.in_features % DIVISOR:
        return f"{spec.out_features} x {spec.in_features}: N and K must be multiples of {DIVISOR}"
    return None


def _tested() -> str:
    import auto_round

    return f"auto-round {auto_round.__version__} is installed, 0.16.1 is known to work"


@contextlib.contextmanager
def _in_words() -> Iterator[None]:
    """Whatever the library raises becomes QuantizeError."""
    try:
        yield
    except (MPQError, MemoryError):
        raise
    except Exception as error:  # any type comes out of it and of transformers
        raise QuantizeError(
            f"auto-round stopped ({type(error).__name__}: {short(str(error), 200)}); {_tested()}. Otherwise choose "
            f"{suitable(lambda row: not row.whole_model)}"
        ) from error


@contextlib.contextmanager
def _quietly(quiet: bool) -> Iterator[None]:
    """stdout is the caller's alone. quiet: only warnings of auto-round on stderr, whose handler is bound to it."""
    logger = logging.getLogger("autoround")
    level = logger.level
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        stack.callback(logger.setLevel, level)
        if quiet:
            logger.setLevel(logging.WARNING)
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        yield
