"""The safetensors reader refuses every malformed file by name; the writer's bytes are exact, aligned and repeatable."""

import json
import os
import stat

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from mpq_kernels.errors import CheckpointError
from mpq_kernels.files.safetensors import (
    ALIGNMENT,
    DTYPES,
    NewFile,
    encode_header,
    file_bytes,
    nbytes,
    read_header,
    storage_order,
    tensor_bytes,
)


def specs_of(tensors):
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def write(path, tensors):
    path.unlink(missing_ok=True)
    with NewFile.create(path, specs_of(tensors)) as file:
        for name, tensor in tensors.items():
            file.write(name, 0, tensor)


def raw_file(path, header, data=b""):
    """A file from a header (bytes, or a value to dump) without any check."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def random_tensor(dtype, shape):
    count = nbytes((dtype, shape))
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (count,), dtype=torch.uint8)
    return raw.view(dtype).reshape(shape)


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_round_trips_bit_for_bit(name, tmp_path):
    tensors = {"a": random_tensor(DTYPES[name], (3, 5)), "b": random_tensor(DTYPES[name], ()), "c": torch.zeros(0, 4)}
    write(tmp_path / "x.safetensors", tensors)
    header = read_header(tmp_path / "x.safetensors")
    assert header.metadata == {"format": "pt"}
    assert (header.tensors["a"].dtype, header.tensors["a"].shape) == (name, (3, 5))
    loaded = load_file(tmp_path / "x.safetensors")
    for key, tensor in tensors.items():
        assert loaded[key].dtype == tensor.dtype and loaded[key].shape == tensor.shape
        assert bytes(tensor_bytes(loaded[key])) == bytes(tensor_bytes(tensor))


def test_reader_agrees_with_the_library_on_its_own_files(tmp_path):
    tensors = {f"layer.{i}": torch.randn(i, 7) for i in range(5)} | {"ids": torch.arange(3)}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt", "more": "text"})
    header = read_header(tmp_path / "x.safetensors")
    data = (tmp_path / "x.safetensors").read_bytes()
    assert header.metadata == {"format": "pt", "more": "text"}
    assert set(header.tensors) == set(tensors)
    for name, entry in header.tensors.items():
        assert entry.shape == tuple(tensors[name].shape) and DTYPES[entry.dtype] == tensors[name].dtype
        assert data[entry.start : entry.end] == bytes(tensor_bytes(tensors[name]))


def test_exact_bytes(tmp_path):
    """Byte for byte: u64 length, compact JSON padded with spaces to 64, largest alignment first, no gaps."""
    tensors = {"odd": torch.tensor([7], dtype=torch.uint8), "wide": torch.arange(16, dtype=torch.int32)}
    write(tmp_path / "x.safetensors", tensors)
    text = (
        b'{"__metadata__":{"format":"pt"},"wide":{"dtype":"I32","shape":[16],"data_offsets":[0,64]},'
        b'"odd":{"dtype":"U8","shape":[1],"data_offsets":[64,65]}}'
    )
    text += b" " * (-(len(text) + 8) % 64)
    data = b"".join(i.to_bytes(4, "little") for i in range(16)) + b"\x07"
    assert (tmp_path / "x.safetensors").read_bytes() == len(text).to_bytes(8, "little") + text + data
    assert file_bytes(specs_of(tensors)) == (tmp_path / "x.safetensors").stat().st_size


def test_tensors_are_aligned(tmp_path):
    """Each tensor starts at a multiple of the largest power of two, up to 64, that divides its bytes."""
    shapes = [(1,), (172,), (16, 4), (64,), (3, 3), (128,), (5,), (40,)]
    tensors = {
        f"{i}.{dtype}": torch.zeros(shape, dtype=dtype)
        for i, shape in enumerate(shapes)
        for dtype in (torch.uint8, torch.float16, torch.int32, torch.float64)
    }
    write(tmp_path / "x.safetensors", tensors)
    header = read_header(tmp_path / "x.safetensors")
    assert min(entry.start for entry in header.tensors.values()) % ALIGNMENT == 0
    for name, entry in header.tensors.items():
        power = min(entry.nbytes & -entry.nbytes, ALIGNMENT)
        assert entry.start % power == 0, name
        assert entry.start % tensors[name].dtype.itemsize == 0, name
    multiples = [name for name in tensors if nbytes(specs_of(tensors)[name]) % 64 == 0]
    assert storage_order(specs_of(tensors))[: len(multiples)] == multiples  # the caller's order is otherwise kept


def test_parts_in_any_order_and_in_two_sittings(tmp_path):
    """The file is the same as when its tensors are written at once; what has been written can be read back."""
    tensors = {"a": torch.arange(100), "b": torch.randn(3, 7), "c": torch.ones(5, dtype=torch.uint8)}
    write(tmp_path / "x.safetensors", tensors)
    specs = specs_of(tensors)
    with NewFile.create(tmp_path / "y.safetensors", specs) as file:
        file.write("c", 0, tensors["c"])
        file.write("a", 60, tensors["a"][60:])
        assert file.path.stat().st_size == file_bytes(specs)
    with NewFile.reopen(tmp_path / "y.safetensors", specs) as file:
        assert torch.equal(file.read("a", 60, 40), tensors["a"][60:]) and not file.read("a", 0, 60).any()
        file.write("a", 0, tensors["a"][:60])
        file.write("b", 0, tensors["b"])
        assert torch.equal(file.read("b", 7, 14), tensors["b"][1:].reshape(-1))
        assert file.read("c", 5, 0).shape == (0,)
    assert (tmp_path / "y.safetensors").read_bytes() == (tmp_path / "x.safetensors").read_bytes()


def test_mode_follows_umask(tmp_path):
    before = os.umask(0o027)
    try:
        write(tmp_path / "x.safetensors", {"a": torch.ones(2)})
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x.safetensors").stat().st_mode) == 0o640


@pytest.mark.parametrize(
    ("start", "tensor"),
    [(0, torch.ones(3)), (1, torch.ones(2)), (-1, torch.ones(1)), (0, torch.ones(2).half())],
)
def test_what_does_not_fit_is_refused(start, tensor, tmp_path):
    with NewFile.create(tmp_path / "x.safetensors", {"a": (torch.float32, (2,)), "b": (torch.float32, (2,))}) as file:
        with pytest.raises(CheckpointError, match=r"'a'.* does not fit behind .* of torch.float32 \[2\]"):
            file.write("a", start, tensor)
        assert not file.read("a", 0, 2).any() and not file.read("b", 0, 2).any()


def test_other_files_are_not_gone_on_with(tmp_path):
    path, specs = tmp_path / "x.safetensors", {"a": (torch.float32, (20,))}
    with pytest.raises(FileNotFoundError):
        NewFile.reopen(path, specs)
    write(path, {"a": torch.ones(20)})
    with pytest.raises(FileExistsError):
        NewFile.create(path, specs)
    for other in ({"a": (torch.float32, (21,))}, {"a": (torch.int32, (20,))}, {"b": (torch.float32, (20,))}):
        with pytest.raises(CheckpointError, match="not those of the tensors"):
            NewFile.reopen(path, other)
    os.truncate(path, file_bytes(specs) - 4)
    with pytest.raises(CheckpointError, match="not those of the tensors"):
        NewFile.reopen(path, specs)


def test_dtype_without_a_name_is_refused():
    with pytest.raises(CheckpointError, match="no dtype for torch.complex128"):
        encode_header({"a": (torch.complex128, (1,))})


GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
# header -> part of the message; the file then has 8 bytes of data
MALFORMED = {
    "dtype": ({"t": GOOD | {"dtype": "F31"}}, "dtype 'F31' is not one of"),
    "dtype type": ({"t": GOOD | {"dtype": ["F32"]}}, "is not one of"),
    "shape": ({"t": GOOD | {"shape": [3]}}, "takes 12 bytes, data_offsets give 8"),
    "negative": ({"t": GOOD | {"shape": [-2]}}, "is not a list of at most"),
    "float size": ({"t": GOOD | {"shape": [2.0]}}, "is not a list of at most"),
    "bool size": ({"t": GOOD | {"shape": [True, 2]}}, "is not a list of at most"),
    "rank": ({"t": GOOD | {"shape": [1] * 40 + [2]}}, "is not a list of at most 32"),
    "overflow": ({"t": GOOD | {"shape": [2**62, 2**62, 4]}}, "sizes out of range"),
    "offsets": ({"t": GOOD | {"data_offsets": [8, 0]}}, r"are not \[begin, end\]"),
    "three offsets": ({"t": GOOD | {"data_offsets": [0, 4, 8]}}, r"are not \[begin, end\]"),
    "beyond": ({"t": GOOD | {"shape": [4], "data_offsets": [0, 16]}}, "truncated"),
    "gap": ({"t": GOOD | {"shape": [1], "data_offsets": [4, 8]}}, "leaves a gap"),
    "overlap": ({"t": GOOD, "u": GOOD | {"shape": [1], "data_offsets": [4, 8]}}, "overlaps"),
    "same bytes": ({"t": GOOD, "u": GOOD}, "overlaps"),
    "rest": ({"t": GOOD | {"shape": [1], "data_offsets": [0, 4]}}, "4 bytes after the last tensor"),
    "extra key": ({"t": GOOD | {"more": 1}}, "expected the keys dtype, shape and data_offsets"),
    "missing key": ({"t": {"dtype": "F32", "shape": [2]}}, "expected the keys"),
    "not an object": ({"t": 3}, "expected the keys"),
    "empty name": ({"": GOOD}, "printable and not empty"),
    "newline": ({"a\nb": GOOD}, "printable and not empty"),
    "surrogate": (b'{"\\ud800":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', "surrogates not allowed"),
    "empty and huge": ({"t": {"dtype": "F32", "shape": [0, 2**63], "data_offsets": [0, 0]}}, "sizes out of range"),
    "surrogate in the metadata": (b'{"__metadata__":{"a":"\\ud800"},"t":{}}', "surrogates not allowed"),
    "metadata": ({"__metadata__": {"a": 1}, "t": GOOD}, "__metadata__ must map"),
    "repeated name": (b'{"t":%s,"t":%s}' % ((json.dumps(GOOD).encode(),) * 2), "the key 't' appears twice"),
    "repeated key": (b'{"t":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}', "appears twice"),
    "huge integer": (b'{"t":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,8]}}', "5000 digits"),
    "NaN": (b'{"t":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}', "NaN is not JSON"),
    "list": (b"[1]", "not a JSON object"),
    "space first": (b' {"a":1}', "not a JSON object"),
    "not JSON": (b"{]", "not valid JSON"),
    "not UTF-8": (b'{"\xff":1}', "not valid JSON"),
    "deep": (b'{"t":' + b"[" * 100_000, "not valid JSON"),
    "empty": (b"", "not a JSON object"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_headers_are_refused_by_name(case, tmp_path):
    header, message = MALFORMED[case]
    path = raw_file(tmp_path / "bad.safetensors", header, b"\0" * 8)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(path)
    assert str(path) in str(caught.value)
    if isinstance(header, dict) and "t" in header and case != "metadata":
        assert "'t'" in str(caught.value) or "'u'" in str(caught.value) or case == "rest"


@pytest.mark.parametrize("keep", [0, 7, 8, 20, 200, -1])
def test_truncated_files_are_refused(keep, tmp_path):
    path = tmp_path / "x.safetensors"
    write(path, {"a": torch.ones(100), "b": torch.ones(3)})
    data = path.read_bytes()
    path.write_bytes(data[:keep])
    with pytest.raises(CheckpointError, match="truncated"):
        read_header(path)


def test_huge_header_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "x.safetensors"
    with open(path, "wb") as file:
        file.write((200_000_000).to_bytes(8, "little") + b"{")
        file.truncate(1_000_000_000)  # sparse
    with pytest.raises(CheckpointError, match="more than the limit of 100000000"):
        read_header(path)


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name, message in (("pipe", "not a regular file"), (".", "not a regular file"), ("none", "cannot be read")):
        with pytest.raises(CheckpointError, match=message):
            read_header(tmp_path / name)


def outcome(path):
    """Header of a file or None; anything but CheckpointError escapes and fails the test."""
    try:
        return read_header(path)
    except CheckpointError as error:
        assert str(path) in str(error)
        return None


def check_against_the_library(path):
    """What the strict reader accepts, the library accepts too, with the same shapes."""
    header = outcome(path)
    if header is None:
        return
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise AssertionError(f"accepted here, refused by the library: {error}") from error
    assert shapes == {name: entry.shape for name, entry in header.tensors.items()}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["F32", "U8"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=10,
)
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*DTYPES, "F4", "f32"]) | JSON,
        "shape": st.lists(st.integers(-1, 4), max_size=3) | JSON,
        "data_offsets": st.lists(st.integers(-1, 40), min_size=2, max_size=2) | JSON,
    }
)


@settings(max_examples=300, deadline=None)
@given(header=st.dictionaries(st.text(max_size=6), ENTRY | JSON, max_size=3) | JSON, data=st.binary(max_size=40))
def test_fuzz_structured_headers(header, data, tmp_path_factory):
    check_against_the_library(raw_file(tmp_path_factory.getbasetemp() / "fuzz1.safetensors", header, data))


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=60), length=st.integers(0, 2**64 - 1) | st.integers(0, 60))
def test_fuzz_raw_bytes(data, length, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "fuzz2.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + data)
    check_against_the_library(path)
    path.write_bytes(data)
    check_against_the_library(path)


@settings(max_examples=300, deadline=None)
@given(
    edits=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=4), cut=st.integers(0, 9)
)
def test_fuzz_damaged_files(edits, cut, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "fuzz3.safetensors"
    write(path, {"a.qweight": torch.arange(8, dtype=torch.int32), "b": torch.ones(3), "c": torch.ones(1).half()})
    data = bytearray(path.read_bytes())
    for at, value in edits:
        data[at % len(data)] = value
    path.write_bytes(data[: len(data) - cut] if cut < 5 else data)
    check_against_the_library(path)
