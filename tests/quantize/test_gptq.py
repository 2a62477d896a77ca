"""On a Hessian: gptq is equal to its definition, and every method that takes one is better under it, in any layout."""

import pytest
import torch

from mpq_kernels.errors import QuantizeError
from mpq_kernels.format.kinds import ZERO_KINDS
from mpq_kernels.format.layout import WeightLayout
from mpq_kernels.format.reference import dequantize
from mpq_kernels.format.words import pack_weight, unpack_weight
from mpq_kernels.quantize import QUANTIZERS, BlockSpec, Steps, quantize_block, quantize_weight
from mpq_kernels.quantize.blocks import nearest, quantize_groups
from mpq_kernels.quantize.gptq import inverse_factor
from mpq_kernels.quantize.hqq import MAX_FACTOR, search_scale_and_zero
from mpq_kernels.quantize.rtn import range_search
from tests.made.quantizers import BASELINE, CALIBRATED, having
from tests.made.weights import MIXED_SEGMENTS, generator, random_perm

N, K = 200, 320
# Groups below, at, above and across the blocks of 128 columns.
GROUPS = (8, 64, 80, 160, 320)


def weights(n=N, k=K, seed=0) -> torch.Tensor:
    return torch.randn(n, k, generator=generator(seed)) * 0.05


def correlated(k=K, seed=1) -> torch.Tensor:
    """Hessian of inputs that share a few directions, as those of a model do."""
    x = torch.randn(4 * k, 24, generator=generator(seed)) @ torch.randn(24, k, generator=generator(seed + 1))
    x += torch.randn(4 * k, k, generator=generator(seed + 2))
    return (x.T @ x / len(x)).double()


def layout_of(bits, group_size, zero="int", scale_dtype="float16", n=N, k=K, permuted=False) -> WeightLayout:
    return WeightLayout.uniform(n, k, bits, group_size, zero, scale_dtype, permuted)


def mixed_layout(permuted=False) -> WeightLayout:
    return WeightLayout(N, K, MIXED_SEGMENTS, "float16", permuted)


def loss(weight, quantized, hessian) -> float:
    """tr((W - Q) H (W - Q)^T)."""
    off = weight.double() - dequantize(quantized, torch.float64)
    return float(((off @ hessian) * off).sum())


def same(one, other) -> bool:
    pairs = zip(one.blocks, other.blocks, strict=True)
    return one.layout == other.layout and all(
        torch.equal(a.codes, b.codes)
        and torch.equal(a.scales, b.scales)
        and (a.zeros is None or torch.equal(a.zeros, b.zeros))
        for (_, _, a), (_, _, b) in pairs
    )


@pytest.mark.parametrize("kind", [*GROUPS, "mixed", "permuted"])
def test_uncorrelated_inputs_give_plain_rounding(kind):
    """With H = I no column can make up for another, so every group is what the search alone gives under it."""
    layout = layout_of(3, kind) if kind in GROUPS else mixed_layout(kind == "permuted")
    perm = random_perm(K) if layout.permuted else None
    found = quantize_weight(weights(), layout, perm, "gptq", hessian=torch.eye(K))
    assert same(found, quantize_weight(weights(), layout, perm, "hqq", hessian=torch.eye(K)))


def naive(weight, spec, hessian):
    """Codes by definition: before each column, the columns still to come minimise the error given the fixed ones."""
    work, fixed = weight.double().clone(), torch.zeros_like(weight, dtype=torch.float64)
    k = weight.shape[1]
    codes = torch.zeros_like(weight)
    for j in range(k):
        if j:  # errors of later columns of least loss: e_R = -H_RR^-1 H_RF e_F
            rest = -torch.linalg.solve(hessian[j:, j:], hessian[j:, :j] @ fixed[:, :j].T).T
            work[:, j:] = weight.double()[:, j:] - rest
        if j % spec.group_size == 0:
            # What an error in the group costs when the rest is free: the inverse of its part of H_RR^-1.
            size = spec.group_size
            cost = torch.linalg.inv(torch.linalg.inv(hessian[j:, j:])[:size, :size])
            factor = torch.linalg.cholesky(cost).float()
            scale, zero = search_scale_and_zero(work[:, j : j + size].float(), spec, factor)
        code = nearest(work[:, j : j + 1].float(), scale, zero, spec)
        codes[:, j : j + 1] = code
        fixed[:, j : j + 1] = weight[:, j : j + 1].double() - ((code - zero) * scale).double()
    return codes.to(torch.uint8)


@pytest.mark.parametrize("group_size", [16, 80, 160])
def test_codes_are_those_of_the_definition(group_size):
    """An fp64 solve per column in place of the factor. Both round, so one code in a hundred may fall the other way."""
    w, hessian = weights(6, 160), correlated(160)
    found = quantize_weight(w, layout_of(4, group_size, n=6, k=160), None, "gptq", hessian=hessian)
    wanted = naive(w, BlockSpec(4, group_size), hessian)
    assert float((found.blocks[0][2].codes != wanted).float().mean()) <= 0.01


def test_factor():
    """U^T U = H^-1, to the rounding of fp32 (2^-24 of each factor, K terms)."""
    hessian = correlated()
    u = inverse_factor(hessian, K, None, "m").double()
    assert torch.equal(u, u.triu())
    assert float((u.T @ u @ hessian - torch.eye(K)).abs().max()) < 1e-3


@pytest.mark.parametrize("zero", ZERO_KINDS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_weighted_error_is_lower_than_without_calibration(bits, zero):
    w, hessian, layout = weights(), correlated(), layout_of(bits, 64, zero)
    found, rtn, hqq = (
        loss(w, quantize_weight(w, layout, None, m, hessian=hessian if m == "gptq" else None), hessian)
        for m in ("gptq", "rtn", "hqq")
    )
    assert found < 0.75 * min(rtn, hqq)


@pytest.mark.parametrize("method", CALIBRATED)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("permuted", [False, True])
def test_mixed_layout_is_exact_and_packs(permuted, dtype, method):
    layout = WeightLayout(N, K, MIXED_SEGMENTS, dtype, permuted)
    w, hessian, perm = weights(), correlated(), random_perm(K) if permuted else None
    found = quantize_weight(w, layout, perm, method, hessian=hessian)
    assert found.layout == layout and same(unpack_weight(pack_weight(found)), found)
    if "better on a text" not in QUANTIZERS[method].exempt:
        assert loss(w, found, hessian) < loss(w, quantize_weight(w, layout, perm, BASELINE), hessian)


@pytest.mark.parametrize("method", CALIBRATED)
def test_permutation_is_that_of_weight_and_hessian(method):
    w, hessian, perm = weights(), correlated(), random_perm(K)
    found = quantize_weight(w, mixed_layout(True), perm, method, hessian=hessian)
    order = perm.long()
    plain = quantize_weight(w[:, order], mixed_layout(), None, method, hessian=hessian[order][:, order])
    assert torch.equal(dequantize(found)[:, order], dequantize(plain))


@pytest.mark.parametrize("method", CALIBRATED)
def test_the_weight_is_left_as_it_was(method):
    for w in (weights(), weights().bfloat16()):
        before = w.clone()
        quantize_weight(w, layout_of(4, 64), None, method, hessian=correlated())
        assert torch.equal(w, before)


@pytest.mark.parametrize("zero", ZERO_KINDS)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_calibrated_search_is_between_plain_search_and_gptq(bits, zero):
    w, hessian, layout = weights(), correlated(), layout_of(bits, 64, zero)
    plain = loss(w, quantize_weight(w, layout, None, "hqq"), hessian)
    found = loss(w, quantize_weight(w, layout, None, "hqq", hessian=hessian), hessian)
    assert found < 0.97 * plain
    assert loss(w, quantize_weight(w, layout, None, "gptq", hessian=hessian), hessian) < 0.9 * found


@pytest.mark.parametrize("zero", ZERO_KINDS)
def test_no_group_of_the_calibrated_search_is_worse_than_rtn(zero):
    """In its own columns of the Hessian, by which it is judged; 1e-4 for fp32 sums and its rounded factor."""
    w, hessian, layout = weights(), correlated(), layout_of(3, 64, zero)
    found, rtn = (
        quantize_weight(w, layout, None, "hqq", hessian=hessian),
        quantize_weight(w, layout, None, "rtn"),
    )
    for start in range(0, K, 64):
        own = slice(start, start + 64)
        errors = []
        for quantized in (found, rtn):
            off = (w.double() - dequantize(quantized, torch.float64))[:, own]
            errors.append(((off @ hessian[own, own]) * off).sum(1))
        assert bool((errors[0] <= errors[1] * (1 + 1e-4)).all())


@pytest.mark.parametrize("method", having("better on a text", CALIBRATED))
def test_long_groups_are_judged_by_the_diagonal(method):
    """Groups beyond MAX_FACTOR columns: no product with a factor, and the importance of columns still counts."""
    k = 2 * MAX_FACTOR
    w = weights(16, k)
    hessian = torch.eye(k, dtype=torch.float64)
    hessian.diagonal()[::2] = 100.0
    layout = layout_of(3, -1, n=16, k=k)
    calibrated, plain = (
        loss(w, quantize_weight(w, layout, None, m, hessian=h), hessian)
        for m, h in ((method, hessian), (BASELINE, None))
    )
    assert calibrated < 0.99 * plain


def test_unused_columns_stay_plain():
    """An input that is always 0, given a diagonal by damping, neither gives nor takes corrections."""
    hessian = correlated()
    hessian[64:128] = hessian[:, 64:128] = 0
    hessian.diagonal()[64:128] = 0.25
    found = quantize_weight(weights(), layout_of(3, 64), None, "gptq", hessian=hessian)
    plain = quantize_weight(weights(), layout_of(3, 64), None, "hqq", hessian=torch.eye(K))
    assert torch.equal(dequantize(found)[:, 64:128], dequantize(plain)[:, 64:128])


def floor(groups, scale, zero, spec):
    """A rounding of another method: down."""
    return (groups / scale + zero).floor().clamp(0, spec.max_code).nan_to_num(0.0)


@pytest.mark.parametrize("method", CALIBRATED)
def test_another_search_and_another_rounding_run_in_the_same_loops(method):
    w, layout, hessian = weights(), layout_of(4, 64), torch.eye(K, dtype=torch.float64)
    found = QUANTIZERS[method].on_text(w, layout, None, hessian, "m", Steps(range_search, floor)).blocks[0][2]
    alone = quantize_groups(w, BlockSpec(4, 64), Steps(range_search, floor))
    assert torch.equal(found.codes, alone.codes) and torch.equal(found.scales, alone.scales)
    assert not torch.equal(found.codes, quantize_block(w, BlockSpec(4, 64), "rtn").codes)


def singular():
    x = torch.randn(10, K, generator=generator(3)).double()
    return x.T @ x


REFUSED = {
    "shape": (lambda: {"hessian": torch.eye(3)}, "m: the Hessian is .3, 3., and the weight has K=320"),
    "NaN": (lambda: {"hessian": torch.full((K, K), torch.nan)}, "m: the Hessian holds NaN"),
    "singular": (lambda: {"hessian": singular()}, "m: .*not positive definite.*damping"),
    "missing": (dict, "'gptq' needs calibration"),
    "not wanted": (lambda: {"hessian": torch.eye(K), "method": "rtn"}, "m: quantizer='rtn' uses no Hessian"),
    "scale": (
        lambda: {"hessian": torch.eye(K), "weight": weights() * 1e8},
        "m: a scale .* overflows float16",
    ),
}


@pytest.mark.parametrize("method", CALIBRATED)
@pytest.mark.parametrize("case", [case for case in REFUSED if case not in ("missing", "not wanted")])
def test_what_every_method_refuses(case, method):
    make, words = REFUSED[case]
    with pytest.raises(QuantizeError, match=words):
        quantize_weight(
            **{"weight": weights(), "layout": layout_of(4, 64), "perm": None} | make(), method=method, name="m"
        )


def test_a_scale_out_of_range_is_named_with_its_segment():
    with pytest.raises(QuantizeError, match=r"m, rows \d+\.\.\d+, columns \d+\.\.\d+: a scale .* overflows float16"):
        quantize_weight(weights() * 1e8, mixed_layout(), None, "gptq", "m", torch.eye(K))


@pytest.mark.parametrize("case", ["missing", "not wanted"])
def test_refusals(case):
    make, words = REFUSED[case]
    arguments = {"weight": weights(), "layout": layout_of(4, 64), "perm": None, "method": "gptq", "name": "m"} | make()
    with pytest.raises(QuantizeError, match=words):
        quantize_weight(**arguments)


def test_block_without_hessian_is_refused():
    with pytest.raises(QuantizeError, match="'gptq' needs calibration"):
        quantize_block(weights(), BlockSpec(4), "gptq")
