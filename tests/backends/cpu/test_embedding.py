"""`mpq::embedding`: rows by number are those of the dequantized weight, bit for bit; refusals, opcheck, compile."""

import pytest
import torch

from mpq_kernels.backends import BACKENDS
from mpq_kernels.errors import FormatError
from mpq_kernels.format import reference
from mpq_kernels.format.lookup import lookup
from mpq_kernels.format.words import pack_weight
from tests.made.weights import SIZES, X_DTYPES, mixed_weight, random_weight, support_matrix

WAYS = {"operator": torch.ops.mpq.embedding.default, "triton": torch.ops.mpq_triton.embedding.default}
WAYS["reference"] = BACKENDS["reference"].embedding


def rows(way, packed, ids, dtype=torch.float32):
    layout = packed.layout
    shape = layout.segment_ints(), layout.out_features, layout.in_features
    return WAYS[way](ids, packed.qweight, packed.scales, packed.zeros, packed.perm, *shape, dtype)


def bits_of(tensor):
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32}[tensor.element_size()])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("bits", "zero", "scale_dtype"), support_matrix())
def test_every_row_of_every_kind(way, bits, zero, scale_dtype):
    packed = pack_weight(random_weight(130, 172, bits, 43, zero, scale_dtype))
    dense = reference.dequantize(packed)
    assert torch.equal(bits_of(rows(way, packed, torch.arange(130))), bits_of(dense))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", X_DTYPES, ids=str)
@pytest.mark.parametrize("permuted", [False, True])
def test_mixed_widths_round_once(way, dtype, permuted):
    packed = pack_weight(mixed_weight(permuted=permuted))
    ids = torch.randint(0, 200, (3, 70), generator=torch.Generator().manual_seed(1))
    for kind in (torch.int64, torch.int32):
        found = rows(way, packed, ids.to(kind), dtype)
        assert found.shape == (3, 70, 320) and found.dtype == dtype
        assert torch.equal(bits_of(found), bits_of(reference.dequantize(packed, dtype)[ids]))


@pytest.mark.parametrize("way", WAYS)
def test_shapes_of_ids_and_of_weights(way):
    for index, size in enumerate(SIZES):
        packed = pack_weight(random_weight(size, SIZES[-1 - index], 1 + index % 8, -1))
        dense = reference.dequantize(packed)
        for ids in (
            torch.tensor(size - 1),
            torch.zeros(0, dtype=torch.int64),
            torch.arange(size)[::2],
            torch.arange(1),
        ):
            assert torch.equal(rows(way, packed, ids), dense[ids])
        apart = torch.arange(2 * size).view(size, 2).t() // 2  # not contiguous
        assert torch.equal(rows(way, packed, apart), dense[apart])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("bad", [-1, 65, 2**40])
def test_ids_outside_are_refused(way, bad):
    packed = pack_weight(random_weight(65, 64, 4, 64))
    with pytest.raises((RuntimeError, IndexError), match="out of range"):
        rows(way, packed, torch.tensor([3, bad, 4]))


def test_other_operands_are_refused():
    packed = pack_weight(random_weight(65, 64, 4, 64))
    with pytest.raises(RuntimeError, match="ids must be int64 or int32"):
        rows("operator", packed, torch.tensor([1.0]))
    with pytest.raises(RuntimeError, match="dtype must be float32, float16 or bfloat16"):
        rows("operator", packed, torch.tensor([1]), torch.float64)


def test_threads_do_not_matter():
    packed = pack_weight(random_weight(1000, 1024, 3, 128))
    ids = torch.randint(0, 1000, (3000,), generator=torch.Generator().manual_seed(2))
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(rows("operator", packed, ids, torch.bfloat16))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)
    assert torch.equal(found[0], reference.dequantize(packed, torch.bfloat16)[ids])


def test_opcheck_and_compile():
    packed = pack_weight(mixed_weight(permuted=True))
    layout = packed.layout
    rest = (packed.qweight, packed.scales, packed.zeros, packed.perm, layout.segment_ints(), 200, 320, torch.bfloat16)
    for ids in (torch.arange(5), torch.arange(6, dtype=torch.int32).view(2, 3)):
        torch.library.opcheck(torch.ops.mpq.embedding.default, (ids, *rest))
    compiled = torch.compile(lambda ids: torch.ops.mpq.embedding(ids, *rest) + 1, fullgraph=True, backend="aot_eager")
    for count in (3, 7):
        ids = torch.arange(count)
        assert torch.equal(compiled(ids), lookup(packed, ids, torch.bfloat16) + 1)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("absent", ["ids", "qweight", "scales", "zeros", "perm"])
def test_tensors_of_several_devices_are_refused(way, absent):
    """A weight without values must not become memory that nobody wrote."""
    packed = pack_weight(mixed_weight(permuted=True))
    given = {name: getattr(packed, name) for name in ("qweight", "scales", "zeros", "perm")}
    given |= {"ids": torch.arange(3)}
    given[absent] = given[absent].to("meta")
    shape = packed.layout.segment_ints(), packed.layout.out_features, packed.layout.in_features
    with pytest.raises((RuntimeError, FormatError), match="device|on meta"):
        WAYS[way](given["ids"], given["qweight"], given["scales"], given["zeros"], given["perm"], *shape, torch.float32)
