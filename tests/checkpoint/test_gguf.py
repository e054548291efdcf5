"""Headers of GGUF files: what the `gguf` package wrote is what is read, and nothing else gets through."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from gguf.quants import quantize

from zimage import CheckpointError
from zimage.checkpoint import gguf
from zimage.checkpoint.gguf import is_gguf, read_gguf_header

HEAD = struct.Struct("<4sIQQ")


def text(words: str) -> bytes:
    return struct.pack("<Q", len(words)) + words.encode()


def tensor(name: str = "a", shape: tuple[int, ...] = (4,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def file(*tensors: bytes, described: tuple[bytes, ...] = (), data: int = 32, version: int = 3) -> bytes:
    """A file with these descriptions and so many bytes of data."""
    head = HEAD.pack(b"GGUF", version, len(tensors), len(described)) + b"".join((*described, *tensors))
    return head + bytes(-len(head) % 32) + bytes(data)


@pytest.fixture
def sample(tmp_path: Path) -> Path:
    rng, path = np.random.default_rng(0), tmp_path / "sample.gguf"
    writer = GGUFWriter(path, "lumina2")
    writer.add_description("a model of a test")
    writer.add_bool("test.flag", True)
    writer.add_float64("test.number", 0.5)
    writer.add_array("test.words", ["one", "two", "three"])
    writer.add_array("test.numbers", [1, 2, 3])
    for name, kind, columns in (("one", "Q8_0", 64), ("two.weight", "Q4_0", 96), ("three", "Q5_1", 32)):
        values = rng.normal(size=(3, columns)).astype(np.float32)
        writer.add_tensor(name, quantize(values, GGMLQuantizationType[kind]), raw_dtype=GGMLQuantizationType[kind])
    six = GGMLQuantizationType.Q6_K
    writer.add_tensor("four", rng.integers(0, 256, (2, 420), dtype=np.uint8), raw_dtype=six)
    writer.add_tensor("five", rng.normal(size=7).astype(np.float32))
    writer.add_tensor("six", rng.normal(size=(2, 3)).astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_header_says_what_the_package_wrote(sample: Path) -> None:
    header, reader = read_gguf_header(sample), GGUFReader(sample)
    assert is_gguf(sample)
    assert header.architecture == "lumina2"
    assert header.size == sample.stat().st_size
    assert header.entries.keys() == {one.name for one in reader.tensors}
    content = sample.read_bytes()
    for one in reader.tensors:
        entry = header.entries[one.name]
        assert entry.dtype == one.tensor_type.name
        assert entry.shape == tuple(reversed(one.shape.tolist()))
        assert content[entry.start : entry.end] == np.ascontiguousarray(one.data).tobytes()
    assert header.data == reader.data_offset


WRONG: dict[str, tuple[bytes, str]] = {
    "another file": (b"PK\3\4" + bytes(60), "does not begin with GGUF"),
    "nothing": (b"", "ends within its header"),
    "an old version": (file(version=1), "GGUF of version 1; 2 and 3 are read"),
    "big-endian": (file(version=3 << 24), "version 50331648; 2 and 3 are read, in little-endian"),
    "billions of tensors": (HEAD.pack(b"GGUF", 3, 1 << 60, 0), "ends within its header"),
    "billions of values": (HEAD.pack(b"GGUF", 3, 0, 1 << 60), "ends within its header"),
    "a long name": (HEAD.pack(b"GGUF", 3, 1, 0) + struct.pack("<Q", 1 << 62), "ends within its header"),
    "a long array": (
        file(described=(text("x") + struct.pack("<IIQ", 9, 0, 1 << 61),)), "ends within its header"),
    "arrays in arrays": (
        file(described=(text("x") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 9,)), "the unknown type 9"),
    "a value of no type": (file(described=(text("x") + struct.pack("<I", 99),)), "a value has the unknown type 99"),
    "no alignment": (
        file(described=(text("general.alignment") + struct.pack("<II", 4, 0),)), "its alignment is 0"),
    "five dimensions": (file(tensor(shape=(1, 1, 1, 1, 4))), "has 5 dimensions"),
    "a huge shape": (file(tensor(shape=(1 << 40, 1 << 40))), "has the shape"),
    "a kind that is not read": (file(tensor(kind=16)), r"as ggml's type 16, which is not read; .* Q4_K"),
    "parts of blocks": (file(tensor(shape=(33, 2), kind=8)), "not a multiple of 32"),
    "a name twice": (file(tensor(), tensor(offset=32), data=64), "'a' occurs twice"),
    "an overlap": (file(tensor(shape=(16,)), tensor("b", offset=32), data=96), "'b' does not follow"),
    "a gap": (file(tensor(), tensor("b", offset=64), data=96), "'b' does not follow"),
    "too little": (file(tensor(shape=(16,)), data=60), "end at byte 128 and the file has 124 bytes"),
    "too much": (file(tensor(), data=33), "end at byte 80 and the file has 97 bytes"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_whole_file_is_refused(name: str, tmp_path: Path) -> None:
    content, message = WRONG[name]
    path = tmp_path / "wrong.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_gguf_header(path)
    assert str(path) in str(caught.value)


def test_a_header_is_read_up_to_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "long.gguf"
    path.write_bytes(file(tensor(), described=(text("x") + struct.pack("<I", 8) + text("y" * 500),)))
    assert read_gguf_header(path).entries
    monkeypatch.setattr(gguf, "MAX_HEADER", 400)
    with pytest.raises(CheckpointError, match="its header has more than the 400 bytes that are read"):
        read_gguf_header(path)


def test_a_file_that_ends_early_is_refused_wherever_it_ends(sample: Path) -> None:
    content = sample.read_bytes()
    for end in {*range(0, read_gguf_header(sample).data, 7), len(content) - 40}:
        sample.write_bytes(content[:end])
        with pytest.raises(CheckpointError, match="not a whole GGUF file"):
            read_gguf_header(sample)


def test_flipped_bits_are_refused_or_harmless(sample: Path) -> None:
    content, header = sample.read_bytes(), read_gguf_header(sample)
    outcomes = {check(sample, content, place, flip) for place in range(header.data) for flip in (1, 0x80)}
    assert outcomes == {"refused", "read"}


def check(path: Path, content: bytes, place: int, flip: int) -> str:
    changed = bytearray(content)
    changed[place] ^= flip
    path.write_bytes(changed)
    try:
        header = read_gguf_header(path)
    except CheckpointError:
        return "refused"
    assert all(0 < entry.start <= entry.end <= len(content) for entry in header.entries.values())
    return "read"


def read_as_text(path: Path) -> None:
    path.write_text("not a model")


def remove(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("damage", [read_as_text, remove])
def test_what_is_no_file_or_another_is_told_apart(damage: Callable[[Path], None], sample: Path) -> None:
    damage(sample)
    if sample.exists():
        assert not is_gguf(sample)
    else:
        with pytest.raises(CheckpointError, match="is missing"):
            is_gguf(sample)
