"""What needs a CUDA device: the kernels themselves, streams and graphs, models. Run by benchmarks/run_gpu.sh."""

import itertools

import pytest
import torch

import mpq_kernels as mpq
from mpq_kernels.format import reference
from mpq_kernels.format.weights import QuantizedBlock, QuantizedWeight
from mpq_kernels.format.words import pack_weight, unpack_weight
from tests.made.checkpoints import tiny_model
from tests.made.weights import check_experts, expert_case, mixed_weight, random_weight, support_matrix

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
X_DTYPES = (torch.float16, torch.bfloat16)


@pytest.fixture(scope="module", autouse=True)
def kernels():
    """Loads the kernels; their reason for refusing is a failure here, where a device is."""
    if torch.cuda.is_available():
        mpq.warmup()


def linear(packed, x, bias=None):
    """mpq::linear with everything on the device of x."""
    moved = packed.to(x.device)
    layout = packed.layout
    return torch.ops.mpq.linear(
        x, moved.qweight, moved.scales, moved.zeros, moved.perm, None if bias is None else bias.to(x.device),
        layout.segment_ints(), layout.out_features, layout.in_features,
    )  # fmt: skip


def check(weight, m, dtype=torch.float16, bias=None, margin=4):
    """y against fp64. Tensor cores truncate where fp32 rounds: each addition may lose `margin` times as much."""
    k = weight.layout.in_features
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(m)).to(dtype)
    y = linear(pack_weight(weight), x.cuda(), bias).cpu()
    error = (y.double() - reference.linear(x, weight, bias)).abs()
    assert (error <= margin * reference.error_bound(x, weight, bias)).all()
    return y


@pytest.mark.parametrize(("bits", "zero", "scale_dtype"), support_matrix())
@pytest.mark.parametrize("dtype", X_DTYPES, ids=str)
def test_one_hot_tokens_return_the_weights_bit_for_bit(bits, zero, scale_dtype, dtype):
    weight = random_weight(200, 256, bits, 64, zero, scale_dtype)
    wanted = reference.dequantize(weight).T.to(dtype)
    x = torch.eye(256, dtype=dtype, device="cuda")
    for m in (1, 8, 16, 64, 256):
        assert torch.equal(linear(pack_weight(weight), x[:m]).cpu(), wanted[:m])


@pytest.mark.parametrize("bits", range(1, 9))
def test_any_number_of_tokens_and_any_shape(bits):
    for m in (1, 2, 5, 8, 9, 16, 17, 33, 200):
        check(random_weight(200, 1024, bits, 128), m, X_DTYPES[m % 2], torch.randn(200))
    for n, k in itertools.product((1, 63, 65, 640), (1, 65, 172, 1000)):
        check(random_weight(n, k, bits), 3)
    for group_size in (16, 32, 48, 8, 384):
        check(random_weight(100, 384, bits, group_size), 3)


@pytest.mark.parametrize("m", [1, 12, 40])
@pytest.mark.parametrize("permuted", [False, True])
def test_segments_of_all_kinds(m, permuted):
    check(mixed_weight(permuted=permuted), m, bias=torch.randn(200).half())


def test_shapes_of_real_layers():
    generator = torch.Generator("cuda").manual_seed(0)
    from mpq_kernels.format.layout import WeightLayout
    from mpq_kernels.format.random import random_weight as random_packed

    for n, k, bits, m in ((8192, 8192, 4, 1), (4096, 14336, 3, 8), (28672, 4096, 2, 16), (6144, 4096, 8, 64)):
        packed = random_packed(WeightLayout.uniform(n, k, bits, 128, "int"), "cuda", generator)
        x = torch.randn(m, k, device="cuda", generator=generator).half()
        dense = reference.dequantize(packed, torch.float64)
        y = linear(packed, x)
        error = (y.double() - x.double() @ dense.T).abs().max() / (x.double() @ dense.T).abs().max()
        assert error < 1e-3  # one rounding of fp16, and of sums of 14336 products with truncation


@pytest.mark.parametrize("dtype", X_DTYPES, ids=str)
def test_many_tokens_take_the_dense_product(dtype):
    weight = random_weight(320, 512, 4, 64)
    x = torch.randn(700, 512).to(dtype)
    bias = torch.randn(320)
    y = linear(pack_weight(weight), x.cuda(), bias).cpu()
    wanted = reference.linear(x, weight, bias)
    # Weights, bias and result are rounded once each.
    assert (y.double() - wanted).norm() <= 3 * torch.finfo(dtype).eps * wanted.norm()


@pytest.mark.parametrize("dtype", [torch.float32, *X_DTYPES], ids=str)
def test_dequantize_is_the_reference_bit_for_bit(dtype):
    for weight in (mixed_weight(permuted=True), mixed_weight(), random_weight(65, 172, 3, 43, "float")):
        packed = pack_weight(weight).to("cuda")
        layout = packed.layout
        dense = torch.ops.mpq.dequantize(
            packed.qweight, packed.scales, packed.zeros, packed.perm, layout.segment_ints(), *dense_shape(layout), dtype
        )
        assert torch.equal(dense.cpu(), reference.dequantize(weight, dtype))


def dense_shape(layout):
    return layout.out_features, layout.in_features


def test_experts_of_different_widths():
    weight, x, offsets, rows = expert_case()
    packed = pack_weight(weight).to("cuda")
    y = torch.ops.mpq.grouped_linear(
        x.cuda(), packed.qweight, packed.scales, packed.zeros, None, None, offsets.cuda(),
        packed.layout.segment_ints(), rows * 5, x.shape[1],
    ).cpu()  # fmt: skip
    check_experts(y, x, weight, offsets, rows)


def test_silu_and_product_in_the_same_launch():
    weight = random_weight(100, 320, 4, 64)
    packed = pack_weight(weight).to("cuda")
    gate, up = torch.randn(5, 320).half().cuda(), torch.randn(5, 320).half().cuda()
    y = torch.ops.mpq.silu_mul_linear(
        gate, up, packed.qweight, packed.scales, packed.zeros, None, None, packed.layout.segment_ints(), 100, 320
    )
    wanted = reference.linear((torch.nn.functional.silu(gate) * up).cpu(), weight)
    assert (y.cpu().double() - wanted).norm() <= 2e-3 * wanted.norm()


def test_rows_that_lie_apart():
    packed = pack_weight(random_weight(70, 320, 3, 32))
    space = torch.randn(6, 1000, device="cuda").half()
    for first in (0, 1, 8):
        x = space[:, first : first + 320]
        assert torch.equal(linear(packed, x), linear(packed, x.contiguous()))
    many = space[:, :320].reshape(2, 3, 320)
    assert torch.equal(linear(packed, many).view(6, 70), linear(packed, space[:, :320]))


@pytest.mark.parametrize("m", [1, 7, 16, 100])
def test_every_run_and_every_replay_gives_the_same_bits(m):
    packed = pack_weight(random_weight(300, 2048, 3, 128)).to("cuda")
    x = torch.randn(m, 2048, device="cuda").half()
    first = linear(packed, x)
    for _ in range(50):
        assert torch.equal(linear(packed, x), first)
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        linear(packed, x)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        y = [linear(packed, x) for _ in range(3)]
    for _ in range(20):
        for t in y:
            t.fill_(float("nan"))
        graph.replay()
        assert all(torch.equal(t, first) for t in y)


def test_streams_and_graphs_do_not_disturb_each_other():
    packed = pack_weight(random_weight(300, 4096, 4, 128)).to("cuda")
    xs = [torch.randn(m, 4096, device="cuda").half() for m in (1, 4, 9, 16)]
    wanted = [linear(packed, x) for x in xs]
    graphs = []
    for x in xs:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = linear(packed, x)
        graphs.append((graph, y))
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in xs]
    for _ in range(20):
        results = []
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                graphs[i][0].replay()
                results += [linear(packed, xs[i]) for _ in range(4)]
        torch.cuda.synchronize()
        assert all(torch.equal(y, wanted[i // 4]) for i, y in enumerate(results))
        assert all(torch.equal(y, w) for (_, y), w in zip(graphs, wanted, strict=True))


@pytest.mark.alone
def test_graphs_that_are_gone_cost_no_memory():
    packed = pack_weight(random_weight(300, 4096, 4, 128)).to("cuda")
    x = torch.randn(4, 4096, device="cuda").half()
    wanted = linear(packed, x)
    free = None
    for i in range(400):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = linear(packed, x)
        graph.replay()
        assert torch.equal(y, wanted)
        graph.reset()
        if i == 100:
            free = torch.cuda.mem_get_info()[0]
    assert free - torch.cuda.mem_get_info()[0] < 2 << 20


@pytest.mark.alone
def test_compiled_with_graphs():
    """mode="reduce-overhead": torch refuses a recording with blocks of its pools that it does not know."""
    layers = [mpq.MixedLinear.from_packed(pack_weight(random_weight(256, 256, bits, 64))) for bits in (2, 3, 4)]
    model = torch.nn.Sequential(*layers).cuda()
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    with torch.no_grad():
        for seed in range(8):
            x = torch.randn(1, 256, generator=torch.Generator().manual_seed(seed)).half().cuda()
            assert torch.equal(compiled(x).clone(), model(x))


def test_more_than_2_to_the_31_weights():
    from mpq_kernels.format.layout import WeightLayout
    from mpq_kernels.format.random import random_weight as random_packed

    n, k = 65536, 40960
    packed = random_packed(WeightLayout.uniform(n, k, 1, k, "int"), "cuda", torch.Generator("cuda").manual_seed(0))
    x = torch.zeros(4, k, dtype=torch.float16, device="cuda")
    columns = [0, 1, k // 2 + 77, k - 1]
    x[torch.arange(4), columns] = 1
    tail, parts = packed.layout.rows(0, n)  # one band: compare whole columns with the same weight made dense in pieces
    y = linear(packed, x)
    dense = torch.ops.mpq.dequantize(
        packed.qweight, packed.scales, packed.zeros, None, tail.segment_ints(), n, k, torch.float16
    )
    assert parts["qweight"] == (0, packed.qweight.numel()) and torch.equal(y, dense[:, columns].T)


@pytest.mark.parametrize("dtype", [torch.float32, *X_DTYPES], ids=str)
@pytest.mark.parametrize("bits", range(1, 9))
def test_embedding_gives_rows_of_the_dense_weight(bits, dtype):
    packed = pack_weight(random_weight(500, 192, bits, 64))
    check_embedding(packed, torch.tensor([0, 499, 7, 7, 63, 64]), dtype)
    check_embedding(packed, torch.arange(12, dtype=torch.int32).view(3, 4), dtype)


def test_embedding_of_all_kinds_of_segments():
    for weight in (mixed_weight(permuted=True), random_weight(65, 172, 3, 43, "float")):
        packed = pack_weight(weight)
        check_embedding(packed, torch.arange(packed.layout.out_features), torch.float16)
        check_embedding(packed, torch.zeros(0, dtype=torch.int64), torch.float16)
    with pytest.raises(RuntimeError, match="ids must be on CUDA device"):
        embedding(packed.to("cuda"), torch.zeros(2, dtype=torch.int64), torch.float16)


def embedding(packed, ids, dtype):
    layout = packed.layout
    return torch.ops.mpq.embedding(
        ids,
        packed.qweight,
        packed.scales,
        packed.zeros,
        packed.perm,
        layout.segment_ints(),
        *dense_shape(layout),
        dtype,
    )


def check_embedding(packed, ids, dtype):
    """Rows bit for bit, on the default stream and in a graph."""
    moved, on_device = packed.to("cuda"), ids.cuda()
    wanted = reference.dequantize(packed, dtype)[ids.long()]
    assert torch.equal(embedding(moved, on_device, dtype).cpu(), wanted)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rows = embedding(moved, on_device, dtype)
    rows.fill_(float("nan"))
    graph.replay()
    assert torch.equal(rows.cpu(), wanted)


def test_tensors_of_several_devices_are_refused():
    packed = pack_weight(random_weight(70, 320, 3, 32, "float", permuted=True))
    moved, x = packed.to("cuda"), torch.randn(2, 320).half()
    with pytest.raises(RuntimeError, match="x must be on a CUDA device"):
        linear_of(x, moved.qweight, moved.scales, moved.zeros, moved.perm, moved.layout)
    for name in ("qweight", "scales", "zeros", "perm"):
        tensors = {
            key: getattr(packed if key == name else moved, key) for key in ("qweight", "scales", "zeros", "perm")
        }
        with pytest.raises(RuntimeError, match=f"{name} must be on CUDA device"):
            linear_of(x.cuda(), *tensors.values(), moved.layout)


def linear_of(x, qweight, scales, zeros, perm, layout):
    return torch.ops.mpq.linear(x, qweight, scales, zeros, perm, None, layout.segment_ints(), *dense_shape(layout))


def test_refusals_in_words():
    packed = pack_weight(random_weight(70, 320, 3, 32)).to("cuda")
    with pytest.raises(RuntimeError, match="float16 or bfloat16 on CUDA"):
        linear(packed, torch.zeros(1, 320, device="cuda"))
    with pytest.raises(RuntimeError, match="in_features=320"):
        linear(packed, torch.zeros(1, 321, device="cuda").half())
    assert linear(packed, torch.zeros(0, 320, device="cuda").half()).shape == (0, 70)


def test_operators_pass_opcheck():
    packed = pack_weight(random_weight(70, 320, 3, 32)).to("cuda")
    x = torch.randn(3, 320, device="cuda").half()
    args = (x, packed.qweight, packed.scales, packed.zeros, None, None, packed.layout.segment_ints(), 70, 320)
    torch.library.opcheck(torch.ops.mpq.linear.default, args)


@pytest.mark.alone
@pytest.mark.parametrize("dtype", X_DTYPES, ids=str)
def test_a_model_generates_what_its_dense_form_generates(tmp_path, dtype):
    tiny_model("llama", tmp_path / "m", sizes={"intermediate_size": 128})
    plan = mpq.Plan.uniform(tmp_path / "m", bits=4, group_size=32)
    mpq.pack(tmp_path / "m", tmp_path / "out", plan, quantizer="rtn")
    model = mpq.load(tmp_path / "out", device="cuda", dtype=dtype)
    assert {m.backend for m in model.modules() if hasattr(m, "backend")} == {"cuda"}
    ids = torch.arange(3, 20)[None].cuda()
    logits = model(ids).logits.float()
    dense = mpq.load(tmp_path / "out", device="cuda", dtype=dtype, backend="reference")(ids).logits.float()
    assert (logits - dense).norm() <= 2e-2 * dense.norm()  # roundings of activations to dtype, through two layers
    compiled = torch.compile(model)(ids).logits.float()
    assert (logits - compiled).norm() <= 2e-2 * logits.norm()


def test_packed_tensors_come_back_as_they_went():
    packed = pack_weight(mixed_weight(permuted=True))
    back = packed.to("cuda").to("cpu")
    for name, tensor in packed.tensors().items():
        assert torch.equal(back.tensors()[name], tensor), name


def test_unpacking_on_the_device_gives_the_same_codes():
    packed = pack_weight(mixed_weight(permuted=True))
    for (_, _, a), (_, _, b) in zip(unpack_weight(packed).blocks, unpack_weight(packed.to("cuda")).blocks, strict=True):
        assert torch.equal(a.codes, b.codes.cpu()) and torch.equal(a.scales, b.scales.cpu())
    assert torch.equal(reference.dequantize(packed), reference.dequantize(packed.to("cuda")).cpu())


@pytest.mark.parametrize(("bits", "zero", "scale_dtype"), support_matrix())
def test_packing_on_the_device_gives_the_same_words(bits, zero, scale_dtype):
    weight = random_weight(100, 96, bits, 32, zero, scale_dtype)
    block = weight.blocks[0][2]
    zeros = None if block.zeros is None else block.zeros.cuda()
    moved = QuantizedBlock(bits, block.codes.cuda(), block.scales.cuda(), zeros, zero)
    on_device = pack_weight(QuantizedWeight.uniform(moved), "torch")
    assert torch.equal(on_device.qweight.cpu(), pack_weight(weight).qweight)


def test_the_reference_backend_generates_what_the_cpu_generates(tmp_path):
    tiny_model("llama", tmp_path / "m", sizes={"intermediate_size": 128})
    plan = mpq.Plan.uniform(tmp_path / "m", bits=4, group_size=32)
    mpq.pack(tmp_path / "m", tmp_path / "out", plan, quantizer="rtn")
    model = mpq.load(tmp_path / "out", device="cuda", backend="reference")
    ids = torch.arange(3, 20)[None]
    logits = model(ids.cuda()).logits.cpu()
    expected = mpq.load(tmp_path / "out")(ids).logits
    assert (logits - expected).norm() <= 1e-3 * expected.norm()  # fp32 in another order, or TF32 where torch allows it
