"""The Triton kernels on a device: what cases.py shows under the interpreter holds for compiled code too."""

import pytest
import torch

from mpq_kernels.backends import BACKENDS
from mpq_kernels.format import reference
from mpq_kernels.format.words import pack_weight
from tests.made.weights import ZEROS, check_experts, expert_case, mixed_weight, random_weight

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
X_DTYPES = (torch.float16, torch.bfloat16)


def linear(weight, x, bias=None):
    """The backend's product with everything on the device; y on the CPU."""
    backend, packed = BACKENDS["triton"], pack_weight(weight).to("cuda")
    assert backend.why_unavailable() is None
    layout = packed.layout
    return backend.linear(
        x.cuda(), packed.qweight, packed.scales, packed.zeros, packed.perm, None if bias is None else bias.cuda(),
        layout.segment_ints(), layout.out_features, layout.in_features,
    ).cpu()  # fmt: skip


def check(weight, m, dtype, bias=None, margin=4):
    """y against fp64. Tensor cores truncate where fp32 rounds: each addition may lose `margin` times as much."""
    x = torch.randn(m, weight.layout.in_features, generator=torch.Generator().manual_seed(m)).to(dtype)
    y = linear(weight, x, bias)
    error = (y.double() - reference.linear(x, weight, bias)).abs()
    assert (error <= margin * reference.error_bound(x, weight, bias)).all()
    assert torch.equal(y, linear(weight, x, bias))  # the same bits again


@pytest.mark.parametrize("bits", range(1, 9))
def test_one_hot_tokens_return_the_weights_bit_for_bit(bits):
    zero, dtype = ZEROS[bits % len(ZEROS)] if bits > 1 else "none", X_DTYPES[bits % 2]
    weight = random_weight(200, 256, bits, 64, zero)
    wanted = reference.dequantize(weight).T.to(dtype)
    for m in (1, 16, 64):
        assert torch.equal(linear(weight, torch.eye(256)[:m].to(dtype)), wanted[:m])


@pytest.mark.parametrize("bits", range(1, 9))
def test_against_the_reference(bits):
    dtype = X_DTYPES[bits % 2]
    for m in (1, 5, 17, 200):
        check(random_weight(200, 1024, bits, 128), m, dtype, torch.randn(200).to(dtype))
    check(random_weight(65, 172, bits, 43), 3, dtype)


@pytest.mark.parametrize("permuted", [False, True])
def test_segments_of_all_kinds(permuted):
    for m in (1, 12, 40):
        check(mixed_weight(permuted=permuted), m, torch.float16)


def test_dequantize_is_the_reference_bit_for_bit():
    for weight in (mixed_weight(permuted=True), random_weight(65, 172, 3, 43, "float")):
        packed = pack_weight(weight).to("cuda")
        layout = packed.layout
        dense = BACKENDS["triton"].dequantize(
            packed.qweight, packed.scales, packed.zeros, packed.perm, layout.segment_ints(), layout.out_features,
            layout.in_features, torch.float32,
        )  # fmt: skip
        assert torch.equal(dense.cpu(), reference.dequantize(weight))


def test_embedding_gives_rows_of_the_dense_weight():
    for weight in (mixed_weight(permuted=True), random_weight(65, 172, 3, 43, "float")):
        packed = pack_weight(weight).to("cuda")
        layout, ids = packed.layout, torch.tensor([[0, 3], [64, 3]], device="cuda")
        rows = BACKENDS["triton"].embedding(
            ids, packed.qweight, packed.scales, packed.zeros, packed.perm, layout.segment_ints(), layout.out_features,
            layout.in_features, torch.float16,
        )  # fmt: skip
        assert torch.equal(rows.cpu(), reference.dequantize(weight, torch.float16)[ids.cpu()])


@pytest.mark.parametrize("tokens", [1, 17, 64, 129, 256])
def test_programs_shared_out_among_blocks_of_tokens(tokens):
    """K is cut into as many parts as the number of tokens leaves programs for: none, two launches, several tables."""
    check(random_weight(1024, 4096, 4, 128), tokens, torch.float16)


def test_experts_of_different_widths():
    weight, x, offsets, rows = expert_case()
    packed = pack_weight(weight).to("cuda")
    y = BACKENDS["triton"].grouped(
        x.cuda(), packed.qweight, packed.scales, packed.zeros, None, None, offsets.cuda(),
        packed.layout.segment_ints(), rows * 5, x.shape[1],
    ).cpu()  # fmt: skip
    check_experts(y, x, weight, offsets, rows)
