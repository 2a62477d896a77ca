"""What the ranks of a tensor-parallel layer keep gives the product of the whole weight; no vLLM is needed for it."""

import pytest
import torch
from torch import nn

from mpq_kernels.checkpoint.config import Float8Module, PackedModule
from mpq_kernels.errors import CheckpointError
from mpq_kernels.format.float8 import Float8Shape, from_float8, to_float8
from mpq_kernels.format.reference import dequantize
from mpq_kernels.format.words import pack_weight
from mpq_kernels.vllm_plugin.launches import place
from mpq_kernels.vllm_plugin.sources import Source, share
from tests.made.weights import mixed_weight, random_weight

CPU = torch.device("cpu")


def loaded(name, weight, wanted, columns=None):
    source = Source(name, PackedModule(name, weight.layout), wanted, columns)
    for key, tensor in weight.tensors().items():
        source.take(key, tensor, CPU)
    return source


def run(kept, x, bias=None):
    layer = nn.Module()
    launches = place(layer, kept)
    return launches.run(layer, x, bias), launches


def inputs(k, seed=0):
    return torch.randn(5, k, generator=torch.Generator().manual_seed(seed))


WEIGHTS = {
    "uniform": lambda: random_weight(192, 256, 4, 64),
    "one group": lambda: random_weight(130, 256, 3, 256, "float"),
    "no cut between groups": lambda: random_weight(64, 320, 5, 160),
    "permuted": lambda: random_weight(128, 256, 6, 32, permuted=True),
    "segments": mixed_weight,
}


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("case", WEIGHTS)
def test_columns_of_all_ranks_add_up(case, ranks):
    weight = pack_weight(WEIGHTS[case]())
    rows, cols = weight.layout.out_features, weight.layout.in_features
    x, y = inputs(cols), torch.zeros(5, rows)
    for rank in range(ranks):
        columns = share(cols, cols // ranks, rank)
        source = loaded("m", weight, [(0, rows)], columns)
        y += run(source.kept, x[:, slice(*columns)].contiguous())[0]
        assert (source.widened() is None) == (source.kept[0].before == source.kept[0].after == 0)
    torch.testing.assert_close(y, x @ dequantize(weight).T, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("ranks", [1, 2, 5])
@pytest.mark.parametrize("case", WEIGHTS)
def test_rows_of_all_ranks_follow_each_other(case, ranks):
    weight = pack_weight(WEIGHTS[case]())
    rows, cols = weight.layout.out_features, weight.layout.in_features
    x, parts, size = inputs(cols), [], rows // ranks
    for rank in range(ranks):
        source = loaded("m", weight, [share(size * ranks, size, rank)])
        assert not source.held
        parts.append(run(source.kept, x)[0])
    wanted = (x @ dequantize(weight).T)[:, : size * ranks]
    torch.testing.assert_close(torch.cat(parts, 1), wanted, rtol=1e-4, atol=1e-3)


def test_members_of_the_same_input_are_one_launch():
    q, k, v = (pack_weight(random_weight(n, 128, bits, 32, "none")) for n, bits in ((128, 4), (64, 3), (64, 8)))
    x, bias = inputs(128), torch.randn(256)
    kept = [loaded(name, w, [(0, w.layout.out_features)]).kept[0] for name, w in (("q", q), ("k", k), ("v", v))]
    y, launches = run(kept, x, bias)
    assert len(launches.each) == 1 and launches.each[0].rows is None
    wanted = x @ torch.cat([dequantize(w) for w in (q, k, v)]).T + bias
    torch.testing.assert_close(y, wanted, rtol=1e-4, atol=1e-3)


def test_members_of_every_kind_are_joined_in_order():
    packed, zeros = (pack_weight(random_weight(70, 128, 4, 32, zero)) for zero in ("int", "float"))
    dense = torch.randn(64, 128)
    codes, scales = to_float8(torch.randn(32, 128))
    sources = [loaded("a", packed, [(3, 67)]), loaded("b", zeros, [(0, 70)])]
    kept_dense = Source("c", None, [(0, 64)])
    kept_dense.take("weight", dense, CPU)
    floats = Source("d", Float8Module("d", Float8Shape(32, 128)), [(16, 32)])
    floats.take("qweight", codes, CPU)
    floats.take("scales", scales, CPU)
    x, bias = inputs(128), torch.randn(64 + 70 + 64 + 16)
    y, launches = run([source.kept[0] for source in (*sources, kept_dense, floats)], x, bias)
    assert len(launches.each) == 4  # two dtypes of zeros, a dense weight, one in float8
    values = [dequantize(packed)[3:67], dequantize(zeros), dense, from_float8(codes, scales, torch.float32)[16:]]
    torch.testing.assert_close(y, x @ torch.cat(values).T + bias, rtol=1e-4, atol=1e-3)


def test_parts_of_one_fused_weight():
    weight = pack_weight(mixed_weight())  # bands of 70, 64, 65 and 1 rows
    x = inputs(320)
    wanted = [(0, 35), (70, 102), (134, 200)]
    y, launches = run(loaded("m", weight, wanted).kept, x)
    assert len(launches.each) == 1
    values = torch.cat([dequantize(weight)[slice(*rows)] for rows in wanted])
    torch.testing.assert_close(y, x @ values.T, rtol=1e-4, atol=1e-3)


def test_what_is_held_for_others_is_said():
    weight = pack_weight(random_weight(128, 256, 4, 32))
    assert loaded("m", weight, [(0, 64)], (64, 128)).widened() is None
    assert "32 rows of others are held" in loaded("m", weight, [(0, 32)]).widened()
    assert "columns 32..96: 0..128 are held" in loaded("m", weight, [(0, 128)], (32, 96)).widened()
    permuted = pack_weight(random_weight(128, 256, 4, 32, permuted=True))
    assert "all are held (they are permuted)" in loaded("m", permuted, [(0, 128)], (0, 128)).widened()


def test_files_that_do_not_fit():
    weight = pack_weight(random_weight(64, 128, 4, 32))
    source = Source("m", PackedModule("m", weight.layout), [(0, 64)])
    with pytest.raises(CheckpointError, match=r"m\.qweight is torch.int32 \[10\]"):
        source.take("qweight", torch.zeros(10, dtype=torch.int32), CPU)
    source.take("qweight", weight.qweight, CPU)
    with pytest.raises(CheckpointError, match="the files lack scales, zeros"):
        source.check_loaded()
    with pytest.raises(CheckpointError, match="m.perm is .* no such tensor"):
        source.take("perm", torch.zeros(128, dtype=torch.int32), CPU)
