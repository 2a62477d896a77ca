"""mpq_kernels.jax against torch.ops.mpq, bit for bit: under jit, vmap, grad and export. `make test-jax` has jax."""

import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

jax = pytest.importorskip("jax", reason="needs jax: make test-jax")

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

import mpq_kernels as mpq  # noqa: E402
import mpq_kernels.backends.ops  # noqa: E402, F401  (registers the operators)
from mpq_kernels import jax as mpq_jax  # noqa: E402
from mpq_kernels.checkpoint.packed import PackedCheckpoint  # noqa: E402
from mpq_kernels.format.words import pack_weight  # noqa: E402
from mpq_kernels.jax import build  # noqa: E402
from mpq_kernels.jax.weight import array_of  # noqa: E402
from tests.made.checkpoints import tiny_model  # noqa: E402
from tests.made.mixtures import expert_plan  # noqa: E402
from tests.made.weights import BITS, ZEROS, expert_case, mixed_weight, random_weight  # noqa: E402

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    """Handlers that were compiled from these sources."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        build.register()
        yield


def operands(packed):
    return packed.qweight, packed.scales, packed.zeros, packed.perm


def shape(packed):
    return packed.layout.segment_ints(), packed.layout.out_features, packed.layout.in_features


def same_bits(got, wanted):
    """An array has the dtype, the shape and the bits of a tensor."""
    expected = np.asarray(array_of(wanted))
    assert got.dtype == expected.dtype and got.shape == expected.shape
    return np.asarray(got).tobytes() == expected.tobytes()


@pytest.mark.parametrize("zero", ZEROS)
@pytest.mark.parametrize("bits", BITS)
def test_every_width_and_kind(bits, zero):
    packed = pack_weight(random_weight(70, 192, bits, 64, zero, permuted=bits % 2 == 0))
    bias, dtype = torch.randn(70), DTYPES[bits % 3]
    weight = mpq_jax.Weight.from_packed(packed, bias)
    for tokens in (1, 5, 33):
        x = torch.randn(tokens, 192).to(dtype)
        exact = torch.ops.mpq.linear(x, *operands(packed), bias, *shape(packed))
        assert same_bits(jax.jit(mpq_jax.linear)(array_of(x), weight), exact)
        int8 = torch.ops.mpq.linear_int8(x, *operands(packed), bias, *shape(packed))
        assert same_bits(mpq_jax.linear(array_of(x), weight, activations="int8"), int8)
    wanted = torch.ops.mpq.dequantize(*operands(packed), *shape(packed), dtype)
    name = {torch.float32: jnp.float32, torch.float16: jnp.float16, torch.bfloat16: jnp.bfloat16}[dtype]
    assert same_bits(mpq_jax.dequantize(weight, name), wanted)
    ids = torch.tensor([[3, 69], [0, 1]])
    assert same_bits(jax.jit(mpq_jax.embedding, static_argnums=2)(array_of(ids), weight, name), wanted[ids])


@pytest.fixture(scope="module")
def mixed():
    """(Weight, PackedWeight) of several widths, large enough for work to be shared among threads."""
    packed = pack_weight(mixed_weight(permuted=True))
    return mpq_jax.Weight.from_packed(packed), packed


def test_threads_of_xla():
    packed, x = pack_weight(random_weight(2050, 1024, 3, 64)), torch.randn(3, 1024)
    weight, wanted = mpq_jax.Weight.from_packed(packed), None
    wanted = torch.ops.mpq.linear(x, *operands(packed), None, *shape(packed))
    product = jax.jit(lambda x, w: [mpq_jax.linear(x + i - i, w) for i in range(4)])
    for _ in range(5):
        assert all(same_bits(y, wanted) for y in product(array_of(x), weight))


def test_vmap_over_tokens(mixed):
    weight, packed = mixed
    x = torch.randn(4, 3, 5, 320)
    wanted = torch.ops.mpq.linear(x, *operands(packed), None, *shape(packed))
    product = partial(mpq_jax.linear, weight=weight)
    assert same_bits(jax.jit(jax.vmap(product))(array_of(x)), wanted)
    assert same_bits(jax.vmap(jax.vmap(jax.vmap(product)))(array_of(x)), wanted)
    last = jax.vmap(product, in_axes=1, out_axes=1)(array_of(x))
    assert same_bits(last, wanted)
    ids = torch.randint(0, 200, (6, 7))
    rows = torch.ops.mpq.embedding(ids, *operands(packed), *shape(packed), torch.float32)
    assert same_bits(jax.vmap(partial(mpq_jax.embedding, weight=weight))(array_of(ids)), rows)


def test_weights_are_not_batched(mixed):
    stacked = jax.tree.map(lambda a: jnp.stack([a, a]), mixed[0])
    with pytest.raises(Exception, match="use jax.lax.map"):
        jax.block_until_ready(jax.vmap(mpq_jax.linear)(jnp.zeros((2, 1, 320)), stacked))
    y = jax.lax.map(lambda pair: mpq_jax.linear(*pair), (jnp.ones((2, 1, 320)), stacked))
    assert (y[0] == y[1]).all() and (y[0] == mpq_jax.linear(jnp.ones((1, 320)), mixed[0])).all()


def test_gradient_of_x(mixed):
    weight, packed = mixed
    x, g = torch.randn(3, 320), torch.randn(3, 200)
    found = jax.jit(jax.grad(lambda x: (mpq_jax.linear(x, weight) * array_of(g)).sum()))(array_of(x))
    dense = torch.ops.mpq.dequantize(*operands(packed), *shape(packed), torch.float32).double()
    wanted = g.double() @ dense
    # fp32 sums of 200 products: 200 * 2**-24 of the sum of magnitudes, margin 2.
    bound = 400 * 2.0**-24 * (g.double().abs() @ dense.abs())
    assert ((torch.from_numpy(np.array(found)).double() - wanted).abs() <= bound).all()


def test_experts():
    weight, x, offsets, rows = expert_case()
    packed, bias = pack_weight(weight), torch.randn(5 * rows)
    held = mpq_jax.Weight.from_packed(packed, bias, experts=5)
    wanted = torch.ops.mpq.grouped_linear(x, *operands(packed), bias, offsets, *shape(packed))
    assert same_bits(jax.jit(mpq_jax.grouped_linear)(array_of(x), held, array_of(offsets)), wanted)
    with pytest.raises(mpq.FormatError, match="offsets name 4 experts"):
        mpq_jax.grouped_linear(array_of(x), held, array_of(offsets[:5]))
    with pytest.raises(Exception, match="the experts do not share out"):
        jax.block_until_ready(mpq_jax.grouped_linear(array_of(x), held, array_of(offsets.flip(0))))


def test_export(mixed, tmp_path):
    """Another process runs what was exported: it registers the handlers and knows nothing of the weight."""
    weight, packed = mixed
    x = torch.randn(7, 320).bfloat16()
    (tokens,) = jax.export.symbolic_shape("tokens")
    checks = [jax.export.DisabledSafetyCheck.custom_call("mpq_linear_cpu")]
    shapes = jax.ShapeDtypeStruct((tokens, 320), jnp.bfloat16)
    exported = jax.export.export(jax.jit(lambda x: mpq_jax.linear(x, weight)), disabled_checks=checks)(shapes)
    (tmp_path / "linear").write_bytes(exported.serialize())
    (tmp_path / "x.npy").write_bytes(np.asarray(array_of(x)).view(np.int16).tobytes())
    code = f"""
import jax, numpy as np, jax.numpy as jnp
from mpq_kernels.jax import build
build.register()
from pathlib import Path
folder = Path({str(tmp_path)!r})
x = np.frombuffer((folder / "x.npy").read_bytes(), jnp.bfloat16).reshape(7, 320)
run = jax.export.deserialize(bytearray((folder / "linear").read_bytes())).call
(folder / "y").write_bytes(np.asarray(run(x)).tobytes())
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    wanted = torch.ops.mpq.linear(x, *operands(packed), None, *shape(packed))
    assert (tmp_path / "y").read_bytes() == np.asarray(array_of(wanted)).tobytes()


def test_a_packed_directory(tmp_path):
    tiny_model("mixtral", tmp_path / "model", dtype=torch.bfloat16)
    mpq.pack(tmp_path / "model", tmp_path / "out", expert_plan(tmp_path / "model"), quantizer="rtn")
    weights, checkpoint = mpq_jax.load(tmp_path / "out"), PackedCheckpoint.open(tmp_path / "out")
    assert list(weights) == list(checkpoint.modules)
    for name, weight in weights.items():
        packed = checkpoint.weight(name)
        module = checkpoint.modules[name]
        assert weight.experts == (module.experts.count if module.experts else 0)
        wanted = torch.ops.mpq.dequantize(*operands(packed), *shape(packed), torch.float32)
        assert same_bits(mpq_jax.dequantize(weight), wanted)


def test_what_is_refused(mixed):
    weight, _ = mixed
    with pytest.raises(mpq.FormatError, match="in_features=320"):
        mpq_jax.linear(jnp.zeros((2, 319)), weight)
    with pytest.raises(mpq.FormatError, match="activations='int4' is not one of"):
        mpq_jax.linear(jnp.zeros((2, 320)), weight, activations="int4")
    for call, text in (
        (lambda: mpq_jax.embedding(jnp.array([200]), weight), "an id is outside"),
        (lambda: mpq_jax.embedding(jnp.array([-1]), weight), "an id is outside"),
        (lambda: mpq_jax.linear(jnp.zeros((2, 320), jnp.int32), weight), "float32, float16 or bfloat16"),
        (lambda: mpq_jax.dequantize(mpq_jax.Weight(**vars(weight) | {"scales": weight.scales[1:]})), "scales has"),
    ):
        with pytest.raises(Exception, match=text):
            jax.block_until_ready(call())


def test_no_compiler_is_told(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(mpq.UnsupportedError, match="needs a C.. compiler"):
        build.compiled()


def test_a_compiler_that_refuses_is_told_and_leaves_nothing(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "handlers.cpp").write_text('#error "no"\n')
    monkeypatch.setattr(build, "SOURCE", tmp_path / "handlers.cpp")
    with pytest.raises(mpq.UnsupportedError, match="the compiler says:"):
        build.compiled()
    assert not list((tmp_path / "mpq_kernels").rglob("*.so"))


def test_handlers_of_cuda_compile(tmp_path):
    """They need no toolkit; to link and to run they need libmpq_cuda, and a GPU."""
    command = [part for part in build._command() if not part.startswith("-l")] + ["-DMPQ_JAX_CUDA", "-c"]
    command.remove("-shared")
    subprocess.run([*command, "-Wall", "-Werror", "-o", str(tmp_path / "handlers.o")], check=True)
    names = subprocess.run(["nm", tmp_path / "handlers.o"], capture_output=True, text=True, check=True).stdout
    for operation in build.OPERATIONS:
        assert re.search(rf" T mpq_jax_{operation}_cuda$", names, re.M)


def test_the_package_imports_no_jax():
    code = "import sys, mpq_kernels, mpq_kernels.hf.load, mpq_kernels.cli; print('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


def test_without_jax_the_module_says_what_to_do():
    code = "import sys; sys.modules['jax'] = None\nimport mpq_kernels.jax"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path("/"))
    assert "pip install 'mpq_kernels[jax]'" in done.stderr
