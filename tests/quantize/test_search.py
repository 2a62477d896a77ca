"""Every quantizer of the table: bounds and exactness for every width, zero kind, scale dtype and group.

A row that lacks a property says so (`Quantizer.exempt`), and its test is skipped with that reason.
"""

from __future__ import annotations

from itertools import product

import pytest
import torch

from mpq_kernels.errors import FormatError, QuantizeError
from mpq_kernels.format.codes import FORMATS, SCALE_DTYPES
from mpq_kernels.format.kinds import ZERO_KINDS
from mpq_kernels.format.layout import Segment, WeightLayout
from mpq_kernels.format.reference import dequantize, dequantize_block
from mpq_kernels.format.weights import TORCH_DTYPES, QuantizedBlock
from mpq_kernels.quantize import QUANTIZERS, BlockSpec, blocks, quantize_block, quantize_weight
from tests.made.quantizers import BASELINE, METHODS, block_by, exemption, having, weight_by

SPECS = [
    BlockSpec(bits, group, zero, dtype)
    for bits, zero, dtype, group in product(FORMATS, ZERO_KINDS, SCALE_DTYPES, (16, 64, -1))
]


def cases(prop: str, group_sizes: tuple[int, ...] = (16, 64, -1)) -> list:
    """Specs and methods. Searches take longer and share the rounding of the others, so they have some of the specs."""
    return [
        pytest.param(spec, name, id=f"{spec}-{name}", marks=exemption(name, prop))
        for name in METHODS
        for spec in SPECS
        if spec.group_size in group_sizes and _asked(spec, name)
    ]


def _asked(spec: BlockSpec, method: str) -> bool:
    row, plain = QUANTIZERS[method], (spec.scale_dtype == "float16", spec.group_size == 64)
    return not row.takes_calibration or (all(plain) if row.needs_calibration else any(plain))


def weights(seed: int = 0, n: int = 24, k: int = 192) -> torch.Tensor:
    """Rows of different kinds: normal, heavy-tailed, all positive, all negative, offset, one outlier."""
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * 0.05
    w[4:8] = w[4:8] ** 3 * 100
    w[8:10] = w[8:10].abs()
    w[10:12] = -w[10:12].abs()
    w[12:14] += 0.5
    w[14:16, ::50] *= 20
    return w


def in_groups(tensor: torch.Tensor, block: QuantizedBlock) -> torch.Tensor:
    return tensor.double().reshape(tensor.shape[0], block.scales.shape[1], -1)


def errors(w: torch.Tensor, block: QuantizedBlock) -> torch.Tensor:
    """Squared error of each group."""
    return (in_groups(w, block) - in_groups(dequantize_block(block, torch.float64), block)).square().sum(2)


@pytest.mark.parametrize(("spec", "method"), cases("nearest"))
def test_codes_are_the_nearest_ones_of_the_stored_scale_and_zero(spec: BlockSpec, method: str) -> None:
    w = weights()
    block = block_by(method, w, spec)
    assert (block.bits, block.zero) == (spec.bits, spec.zero)
    assert block.group_size == (192 if spec.group_size == -1 else spec.group_size)
    assert block.scales.dtype == TORCH_DTYPES[spec.scale_dtype]
    if spec.zero == "int":
        assert int(block.zeros.max()) <= FORMATS[spec.bits].max_code
    scale = block.scales.double().unsqueeze(2)
    zero = spec.fixed_zero if block.zeros is None else block.zeros.double().unsqueeze(2)
    steps = block.kind.steps(in_groups(w, block), scale, zero)
    codes = in_groups(block.codes, block)
    inside = (steps >= -0.5) & (steps <= spec.max_code + 0.5)
    # Half a step, and what fp32 adds: a division and an addition of values up to |w/s| + |z|, 2**-24 each, margin 2.
    slack = 2 * (steps.abs() + 2 * abs(zero / scale if spec.zero == "min" else zero)) * 2.0**-23
    assert bool(((steps - codes).abs() <= 0.5 + slack)[inside].all())
    assert bool((codes == (steps > 0) * spec.max_code)[~inside].all())


@pytest.mark.parametrize("spec", [s for s in SPECS if s.bits > 1 and s.zero != "none"], ids=str)
def test_rtn_is_off_by_at_most_half_a_step_everywhere(spec: BlockSpec) -> None:
    w = weights()[:12]  # their ranges start at, or include, a value near 0
    block = quantize_block(w, spec, "rtn")
    scale = in_groups(torch.repeat_interleave(block.scales.double(), block.group_size, 1), block)
    off = (in_groups(w, block) - in_groups(dequantize_block(block, torch.float64), block)).abs() / scale
    # The scale, rounded, may shorten the range of max_code steps; a float zero, rounded, moves it. Each by half a unit
    # in the last place of the stored dtype: eps / 2 = 2**-9 at worst.
    eps = torch.finfo(block.scales.dtype).eps / 2
    zero = torch.zeros(1) if block.zeros is None else block.zeros.double().abs()
    zero = (zero / block.scales.double() if spec.zero == "min" else zero).max()
    assert float(off.max()) <= 0.5 + eps * (spec.max_code + float(zero) + 1) + 2.0**-14


@pytest.mark.parametrize("method", having("not worse than rtn", [m for m in METHODS if m != BASELINE]))
@pytest.mark.parametrize("spec", [s for s in SPECS if s.scale_dtype == "float16"], ids=str)
def test_no_group_is_worse_than_with_rtn(spec: BlockSpec, method: str) -> None:
    w = weights(seed=1)
    plain, found = (errors(w, block_by(m, w, spec)) for m in (BASELINE, method))
    # Both are judged in fp32: sums of up to 192 squares of residuals whose steps carry 2**-24 each.
    assert bool((found <= plain * (1 + 1e-4) + 1e-12).all())


@pytest.mark.parametrize(("bits", "gain"), [(2, 0.7), (3, 0.9), (4, 0.98)])
def test_hqq_is_clearly_better_where_bits_are_few(bits: int, gain: float) -> None:
    # Measured on normal weights, groups of 64: 0.59, 0.81, 0.92 of the squared error of rtn.
    w = torch.randn(64, 512, generator=torch.Generator().manual_seed(3))
    spec = BlockSpec(bits, 64, "int")
    rtn, hqq = (float(errors(w, quantize_block(w, spec, m)).sum()) for m in ("rtn", "hqq"))
    assert hqq < gain * rtn


@pytest.mark.parametrize(("spec", "method"), cases("exact on a grid", (64,)))
def test_weights_on_a_grid_come_back_exactly(spec: BlockSpec, method: str) -> None:
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(0, spec.max_code + 1, (16, 128), generator=generator, dtype=torch.uint8)
    codes[:, 0::64], codes[:, 1::64] = 0, spec.max_code  # every group spans its range
    # Scales and zeros with few significant bits, so that (code - zero) * scale is exact, and so is the range.
    dtype = TORCH_DTYPES[spec.scale_dtype]
    scales = (torch.randint(4, 8, (16, 2), generator=generator) / 64).to(dtype)
    zeros = None
    if spec.zero == "min":
        zeros = (torch.randint(-32, 32, (16, 2), generator=generator) / 16).to(dtype)
    elif spec.fixed_zero is None:
        zeros = torch.randint(0, spec.max_code + 1, (16, 2), generator=generator)
        zeros = zeros.to(torch.uint8 if spec.zero == "int" else dtype)
    w = dequantize_block(QuantizedBlock(spec.bits, codes, scales, zeros, spec.zero))
    restored = dequantize_block(block_by(method, w, spec))
    assert torch.equal(restored, w)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("spec", [s for s in SPECS if s.scale_dtype == "float16" and s.group_size != 16], ids=str)
def test_groups_of_zeros_stay_exactly_zero(spec: BlockSpec, method: str) -> None:
    w = weights(n=4, k=128)
    w[1] = 0
    w[2, :64] = 0
    block = block_by(method, w, spec)
    restored = dequantize_block(block)
    assert torch.equal(restored[1], torch.zeros(128))
    assert bool((block.scales[1] == 0).all())
    if spec.group_size == 64:
        assert torch.equal(restored[2, :64], torch.zeros(64))


@pytest.mark.parametrize("method", having("one bit"))
def test_one_symmetric_bit_is_sign_and_least_squares_scale(method: str) -> None:
    w = weights(n=8, k=64)
    block = block_by(method, w, BlockSpec(1, 64, "none", "float32"))
    assert torch.equal(block.codes.bool(), w > 0)
    torch.testing.assert_close(block.scales[:, 0], 2 * w.abs().mean(1), rtol=2.0**-20, atol=0)


def test_symmetric_scale_turns_to_the_longer_side() -> None:
    w = torch.zeros(2, 16)
    w[0, 0], w[0, 1] = -8.0, 7.0
    w[1, 0], w[1, 1] = 8.0, -7.0
    block = quantize_block(w, BlockSpec(4, 16, "none"), "rtn")
    assert block.scales.flatten().tolist() == [1.0, -1.0]
    assert torch.equal(dequantize_block(block), w)


def test_rtn_is_plain_min_max_rounding() -> None:
    w = torch.tensor([[-1.0, 0.25, 0.5, 2.0], [1.0, 1.5, 2.0, 3.0]])
    block = quantize_block(w, BlockSpec(2, 4, "int", "float32"), "rtn")
    assert block.scales.tolist() == [[1.0], [1.0]]  # (2 - -1) / 3, and (3 - 0) / 3: the range includes 0
    assert block.zeros.tolist() == [[1], [0]]
    assert block.codes.tolist() == [[0, 1, 2, 3], [1, 2, 2, 3]]  # 1.5 is halfway: to even


@pytest.mark.parametrize("method", METHODS)
def test_a_group_of_one_value_is_its_minimum(method: str) -> None:
    w = weights(n=4, k=128)
    w[1] = 0.375
    w[2, 64:] = -1.5
    block = block_by(method, w, BlockSpec(4, 64, "min"))
    restored = dequantize_block(block)
    assert torch.equal(restored[1], w[1]) and torch.equal(restored[2, 64:], w[2, 64:])
    assert (block.scales == 0).tolist() == [[False] * 2, [True] * 2, [False, True], [False] * 2]


def test_a_minimum_that_overflows_is_refused() -> None:
    w = torch.linspace(-70000.0, -69000.0, 16).view(1, 16)
    with pytest.raises(QuantizeError, match=r"a minimum of -7e\+04 overflows float16"):
        quantize_block(w, BlockSpec(4, 16, "min"), "rtn")


@pytest.mark.parametrize("method", having("far from zero"))
def test_float_zeros_reach_a_range_away_from_zero(method: str) -> None:
    w = torch.linspace(10.0, 10.3, 16).view(1, 16)
    block = block_by(method, w, BlockSpec(4, 16, "float", "float32"))
    # Sixteen levels for sixteen values: what is left is fp32 rounding of values near 10 and of a zero near -500.
    assert float((dequantize_block(block) - w).abs().max()) < 1e-4
    tight = torch.linspace(1000.0, 1000.01, 16).view(1, 16)  # its zero would be about -1.5e6: no float16 holds that
    restored = dequantize_block(block_by(method, tight, BlockSpec(4, 16, "float", "float16")))
    assert float((restored - tight).abs().max()) <= 0.5 * 1000 / 15


@pytest.mark.parametrize("method", having("any threads"))
@pytest.mark.parametrize("spec", [BlockSpec(3, 64, z, "float16") for z in ZERO_KINDS] + [BlockSpec(2, -1)], ids=str)
def test_same_result_for_any_number_of_threads_and_chunks(spec: BlockSpec, method: str, monkeypatch) -> None:
    w = torch.randn(64, 2048, generator=torch.Generator().manual_seed(5))  # torch splits work above 32768 values
    before = torch.get_num_threads()
    results = []
    try:
        for threads, chunk in ((1, 2**18), (2, 2**18), (2, 2**15)):
            torch.set_num_threads(threads)
            monkeypatch.setattr(blocks, "CHUNK_WEIGHTS", chunk)
            results.append(block_by(method, w, spec))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert torch.equal(results[0].codes, other.codes)
        assert torch.equal(results[0].scales, other.scales)
        assert spec.fixed_zero is not None or torch.equal(results[0].zeros, other.zeros)


@pytest.mark.parametrize("method", having("any threads"))
def test_one_long_row_does_not_depend_on_threads(method: str) -> None:
    w = torch.randn(1, 65536, generator=torch.Generator().manual_seed(6))
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(block_by(method, w, BlockSpec(3, -1, "none", "float32")))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0].codes, results[1].codes) and torch.equal(results[0].scales, results[1].scales)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_input_dtypes(dtype: torch.dtype) -> None:
    w = weights().to(dtype)
    block, same = quantize_block(w, BlockSpec(4, 64)), quantize_block(w.float(), BlockSpec(4, 64))
    assert torch.equal(block.codes, same.codes)


def mixed_layout(permuted: bool) -> WeightLayout:
    segments = (
        Segment(0, 10, 0, 128, 8, 32, "int"),
        Segment(0, 10, 128, 192, 2, 64, "none"),
        Segment(10, 24, 0, 192, 4, 64, "int"),
    )
    return WeightLayout(24, 192, segments, "bfloat16", permuted)


@pytest.mark.parametrize("method", METHODS)
def test_segments_are_quantized_on_their_own(method: str) -> None:
    w, layout = weights(), mixed_layout(permuted=False)
    quantized = weight_by(method, w, layout)
    assert quantized.layout == layout
    for (n0, k0, block), s in zip(quantized.blocks, layout.segments, strict=True):
        assert (n0, k0) == (s.n0, s.k0)
        alone = block_by(method, w[s.n0 : s.n1, s.k0 : s.k1], BlockSpec.of(s, layout))
        assert torch.equal(block.codes, alone.codes) and torch.equal(block.scales, alone.scales)


@pytest.mark.parametrize("method", METHODS)
def test_permutation_moves_columns_and_comes_undone(method: str) -> None:
    w, layout = weights(), mixed_layout(permuted=True)
    perm = torch.randperm(192, generator=torch.Generator().manual_seed(2)).int()
    quantized = weight_by(method, w, layout, perm)
    assert quantized.layout == layout and torch.equal(quantized.perm, perm)
    plain = weight_by(method, w[:, perm.long()], mixed_layout(permuted=False))
    assert torch.equal(dequantize(quantized)[:, perm.long()], dequantize(plain))


@pytest.mark.parametrize("method", METHODS)
def test_nan_and_inf_are_refused_with_module_place_and_count(method: str) -> None:
    w = weights()
    w[3, 17], w[20, 0] = float("nan"), float("-inf")
    with pytest.raises(QuantizeError, match=r"mlp.up: 2 of 4608 weights are NaN or Inf, the first at row 3, column 17"):
        weight_by(method, w, mixed_layout(False), None, "mlp.up")


BAD_CALLS = {
    "method": (
        lambda: quantize_block(weights(), BlockSpec(4), "gptq2"),
        f"no quantizer 'gptq2'; choose one of {', '.join(sorted(QUANTIZERS))}",
    ),
    "integers": (lambda: quantize_block(torch.ones(4, 64, dtype=torch.int8), BlockSpec(4)), "floating weight"),
    "one dimension": (lambda: quantize_block(torch.ones(64), BlockSpec(4)), "not float32 \\[64\\]"),
    "empty": (lambda: quantize_block(torch.ones(0, 64), BlockSpec(4)), "non-empty"),
    "bits": (lambda: BlockSpec(9), "bits=9"),
    "zero": (lambda: BlockSpec(4, zero="maybe"), "zero='maybe'"),
    "scale dtype": (lambda: BlockSpec(4, scale_dtype="fp16"), "scale_dtype='fp16'"),
    "shape": (
        lambda: quantize_weight(weights()[:5], mixed_layout(False), None, name="m"),
        r"m: the weight is \[5, 192\]",
    ),
    "perm missing": (lambda: quantize_weight(weights(), mixed_layout(True), None, name="m"), "m: .*perm is missing"),
    "perm extra": (
        lambda: quantize_weight(weights(), mixed_layout(False), torch.arange(192).int(), name="m"),
        "not permuted, and perm is given",
    ),
    "perm repeats": (
        lambda: quantize_weight(weights(), mixed_layout(True), torch.zeros(192, dtype=torch.int32), name="m"),
        "permutation of 0..191",
    ),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls_are_refused(case: str) -> None:
    call, words = BAD_CALLS[case]
    with pytest.raises(QuantizeError, match=words):
        call()


def test_group_that_does_not_divide_is_refused() -> None:
    with pytest.raises(FormatError, match="192 columns are not a multiple of group_size=80"):
        quantize_block(weights(), BlockSpec(4, 80))


@pytest.mark.parametrize("zero", ZERO_KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_scales_that_overflow_are_refused_with_the_cure(method: str, zero: str) -> None:
    w = weights()[:4] * 20 * 1e7
    with pytest.raises(QuantizeError) as caught:
        block_by(method, w, BlockSpec(4, 64, zero, "float16"), "mlp.up")
    for word in ["mlp.up", "overflows float16", "6.55e+04", "scale_dtype='bfloat16' or 'float32'"]:
        assert word in str(caught.value)
    if "close" not in QUANTIZERS[method].exempt:  # the cure works
        for cured in ("bfloat16", "float32"):
            restored = dequantize_block(block_by(method, w, BlockSpec(4, 64, zero, cured)))
            assert float((restored - w).square().sum() / w.square().sum()) < 0.02


# Largest weight of a group whose scale is 0 in its dtype: below half of the least fp16, and what fp32 calls subnormal.
VANISHING = {"float16": (1e-8, 1e-40), "bfloat16": (1e-39, 1e-44), "float32": (1e-39, 1e-44)}


@pytest.mark.parametrize("zero", ZERO_KINDS)
@pytest.mark.parametrize("dtype", SCALE_DTYPES)
@pytest.mark.parametrize("method", METHODS)
def test_groups_whose_scale_vanishes_are_zeros(method: str, dtype: str, zero: str) -> None:
    """As a group of zeros is: scale 0, code 0, and what is beside them is as without them."""
    for bits, size in product((1, 2, 4, 8), VANISHING[dtype]):
        w = weights(n=6, k=128)
        w[1, 64:], w[2], w[3, :64] = 0, w[2] / w[2].abs().max() * size, w[3, :64].abs().clamp(max=1) * size
        block = block_by(method, w, BlockSpec(bits, 64, zero, dtype))
        none = torch.tensor([[0, 0], [0, 1], [1, 1], [1, 0], [0, 0], [0, 0]]).bool()
        assert torch.equal(block.scales == 0, none)
        assert not in_groups(block.codes, block)[none].any()
        restored = in_groups(dequantize_block(block), block)
        assert torch.equal(restored[none], torch.zeros(4, 64).double())
        cleaned = block_by(method, w * ~none.repeat_interleave(64, 1), BlockSpec(bits, 64, zero, dtype))
        assert torch.equal(block.codes, cleaned.codes) and torch.equal(block.scales, cleaned.scales)
        assert block.zeros is None or torch.equal(block.zeros, cleaned.zeros)


@pytest.mark.parametrize("zero", ZERO_KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_scales_that_lose_digits_are_better_than_zeros(method: str, zero: str) -> None:
    """Scales of one to three units of the least fp16."""
    w = weights(n=6, k=128)
    w = w / in_groups(w, block_by(method, w, BlockSpec(4, 64))).abs().amax(2).repeat_interleave(64, 1).float()
    w *= 1e-6
    block = block_by(method, w, BlockSpec(4, 64, zero, "float16"))
    assert bool((block.scales != 0).all())
    assert bool((errors(w, block) < 0.2 * in_groups(w, block).square().sum(2)).all())
