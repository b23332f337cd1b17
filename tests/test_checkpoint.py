"""`Checkpoint`: what is checked when it is opened, and that pages leave memory with the tensors read."""

from __future__ import annotations

import gc
import json
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.formats.writers import write_checkpoint
from twinweight.checkpoint import Checkpoint
from twinweight.errors import CheckpointError, UnsupportedError

GENERATOR = torch.Generator().manual_seed(0)
TENSORS = {
    "large": torch.randn(300, 257, generator=GENERATOR),  # mapped
    "half": torch.randn(7, 3, generator=GENERATOR).half(),
    "brain": torch.randn(5, generator=GENERATOR).bfloat16(),
    "odd": torch.arange(5, dtype=torch.uint8),
    "flag": torch.tensor([True, False, True]),
    "scalar": torch.tensor(3, dtype=torch.int64),
    "empty": torch.zeros(0, 4),
    "words": torch.randint(-(2**31), 2**31 - 1, (200, 201), generator=GENERATOR, dtype=torch.int32),
}
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize("shards", [1, 3])
def test_reads_what_was_written(shards: int, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {"model_type": "llama"}, TENSORS, shards=shards)
    ckpt = Checkpoint.open(str(tmp_path))
    assert ckpt.config == {"model_type": "llama"}
    assert set(ckpt.names()) == set(TENSORS)
    assert "large" in ckpt
    assert "small" not in ckpt
    for name, tensor in TENSORS.items():
        info = ckpt.info(name)
        assert (info.dtype, info.shape, info.nbytes) == (tensor.dtype, tuple(tensor.shape), tensor.nbytes)
        found = ckpt.read(name)
        assert found.dtype == tensor.dtype
        assert torch.equal(found, tensor)


def test_writing_to_a_tensor_leaves_the_file_alone(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {}, TENSORS)
    ckpt = Checkpoint.open(tmp_path)
    ckpt.read("large").zero_()
    assert torch.equal(ckpt.read("large"), TENSORS["large"])


def raw_file(file: Path, header: object, data: bytes = b"") -> None:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(raw)) + raw + data)


def test_data_that_is_not_aligned(tmp_path: Path) -> None:
    values = torch.arange(20_000, dtype=torch.int32)
    header = json.dumps({"x": {"dtype": "I32", "shape": [20_000], "data_offsets": [0, 80_000]}})
    (tmp_path / "config.json").write_text("{}")
    for pad in range(4):
        raw_file(tmp_path / "model.safetensors", (header + " " * pad).encode(), values.numpy().tobytes())
        assert torch.equal(Checkpoint.open(tmp_path).read("x"), values)


def test_old_index_and_file_names(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {}, TENSORS, shards=2)
    (tmp_path / INDEX).rename(tmp_path / "gptq_model-4bit-128g.safetensors.index.json")
    assert len(Checkpoint.open(tmp_path).names()) == len(TENSORS)
    (tmp_path / "gptq_model-4bit-128g.safetensors.index.json").unlink()
    assert len(Checkpoint.open(tmp_path).names()) == len(TENSORS)


def test_other_files_beside_model_safetensors_are_left_alone(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {}, TENSORS)
    save_file(TENSORS, tmp_path / "consolidated.safetensors")
    assert Checkpoint.open(tmp_path).source.name == "model.safetensors"


def x(**entries: object) -> dict[str, object]:
    return {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | entries}


HEADERS: list[tuple[object, bytes, str]] = [
    (b"", b"", "expected a JSON header, found invalid JSON (line 1 column 1: Expecting value)"),
    (b"{", b"", "expected a JSON header, found invalid JSON (line 1 column 2: Expecting property name"),
    (b"\xff", b"", "expected a JSON header, found bytes that are not UTF-8"),
    (b"[]", b"", "expected a JSON object as header, found list"),
    ({"x": 3}, b"", "tensor x: expected dtype, shape and data_offsets in the header, found 3"),
    (x(), b"1234", "tensor x: expected data up to byte 77, found a truncated file of 73 bytes"),
    (x(), b"12345678z", "expected 77 bytes, as the header says, found 78 bytes"),
    (x(shape=[3]), b"12345678", "tensor x: expected 12 bytes for F32 [3], found data_offsets [0, 8]"),
    (x(shape=[1.9]), b"12345678", "tensor x: expected dtype, shape and data_offsets in the header"),
    (x(shape=[True]), b"1234", "tensor x: expected dtype, shape and data_offsets in the header"),
    (x(data_offsets="08"), b"12345678", "tensor x: expected dtype, shape and data_offsets in the header"),
    (b'{"x":{"dtype":"F32","shape":[1e999],"data_offsets":[0,8]}}', b"12345678", "expected dtype, shape and data_offsets"),
    (b"[" * 100_000, b"", "expected a JSON header"),
    (x(shape=[-2]), b"12345678", "tensor x: expected -8 bytes for F32 [-2], found data_offsets [0, 8]"),
    (x(data_offsets=[4, 12]), b"123456789012", "tensor x: expected data from byte 70 (no hole, no overlap), found byte 74"),
    (x() | {"y": x()["x"]}, b"12345678", "(no hole, no overlap), found byte 130"),
    (b'{"x":1,"x":2}', b"", "tensor x: expected every name once, found the name twice in the header"),
]


@pytest.mark.parametrize(("header", "data", "message"), HEADERS)
def test_damaged_header(header: object, data: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    raw_file(tmp_path / "model.safetensors", header, data)
    with pytest.raises(CheckpointError) as error:
        Checkpoint.open(tmp_path)
    assert str(error.value).startswith(f"file {tmp_path / 'model.safetensors'}")
    assert message in str(error.value)


def test_unknown_dtype(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    raw_file(tmp_path / "model.safetensors", x(dtype="F4"), b"12345678")
    with pytest.raises(UnsupportedError, match=r"/model\.safetensors, tensor x: expected a dtype of .*, found F4"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("keep", [0, 7, 8, 100, -1])
def test_truncated_file(keep: int, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {}, TENSORS, shards=2)
    (tmp_path / SECOND).write_bytes((tmp_path / SECOND).read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=rf"file /.*/{SECOND}.*: expected .*, found .*\d+ bytes"):
        Checkpoint.open(tmp_path)


def test_a_file_of_something_else(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {}, TENSORS)
    for content in (b"PK\x03\x04" * 100, (1000).to_bytes(8, "little") + b"\x93NUMPY"):
        (tmp_path / "model.safetensors").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"/model\.safetensors: expected .*, found not a safetensors file$"):
            Checkpoint.open(tmp_path)


def test_why_a_file_cannot_be_read_names_it_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError) as error:
        Checkpoint.open(".")
    assert str(error.value) == "file config.json: expected a JSON object, found Is a directory"
    (tmp_path / "sub").mkdir()
    for content, why in ((b"\xff", "bytes that are not UTF-8 (from byte 0)"), (b"[" * 100_000, "JSON that is nested too deep")):
        (tmp_path / "sub" / "config.json").write_bytes(content)
        with pytest.raises(CheckpointError) as error:
            Checkpoint.open("sub")
        assert str(error.value) == f"file sub/config.json: expected a JSON object, found {why}"


def test_file_that_shrinks_after_it_was_opened(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {}, TENSORS)
    ckpt = Checkpoint.open(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    for name in ("large", "half"):
        with pytest.raises(CheckpointError, match=f"file .*/model.safetensors, tensor {name}: expected data up to byte"):
            ckpt.read(name)


def edit_index(directory: Path, name: str, file: str | None) -> None:
    index = json.loads((directory / INDEX).read_text())
    index["weight_map"][name] = file
    (directory / INDEX).write_text(json.dumps(index))


BAD, OTHER = CheckpointError, UnsupportedError
DIRECTORIES: list[tuple[Callable[[Path], object], type[CheckpointError], str]] = [
    (lambda d: (d / "config.json").unlink(), BAD, r"file /.*/config\.json: expected config\.json .*, found none"),
    (lambda d: (d / "config.json").write_text("{"), BAD, r"/config\.json: .* found invalid JSON .line 1 column 2: "),
    (lambda d: (d / "config.json").write_text("[]"), BAD, r"file /.*/config\.json: .*, found list"),
    (lambda d: (d / INDEX).write_text("{}"), BAD, rf"file /.*/{INDEX}: expected a weight_map .*, found None"),
    (lambda d: (d / INDEX).write_text("?"), BAD, rf"file /.*/{INDEX}: expected a JSON object"),
    (lambda d: (d / SECOND).unlink(), BAD, rf"file /.*/{SECOND}: expected the shard .*, found no such file"),
    (
        lambda d: edit_index(d, "large", SECOND),
        CheckpointError,
        rf"{SECOND}, tensor large: expected it in .*, found it in {FIRST}",
    ),
    (
        lambda d: edit_index(d, "more", FIRST),
        CheckpointError,
        rf"{FIRST}, tensor more: expected it in .*, found no such tensor",
    ),
    (lambda d: edit_index(d, "more", "../x"), BAD, rf"{INDEX}, tensor more: expected a file name .*, found '../x'"),
    (lambda d: edit_index(d, "more", None), BAD, rf"{INDEX}, tensor more: expected a file name .*, found None"),
    (
        lambda d: (d / SECOND).write_bytes((d / FIRST).read_bytes()),
        CheckpointError,
        "expected every name in one file, found it in",
    ),
    (lambda d: [(d / f).unlink() for f in (INDEX, SECOND)], BAD, rf"file /.*/{FIRST}: expected 2 shards, found 1"),
    (
        lambda d: [f.unlink() for f in d.glob("model*")],
        CheckpointError,
        r"expected \*\.safetensors files, found no weight files",
    ),
    (
        lambda d: [f.rename(d / "pytorch_model.bin") for f in d.glob("model*")],
        OTHER,
        r"expected \*\.safetensors files, found pytorch_model\.bin",
    ),
]


@pytest.mark.parametrize(("damage", "kind", "message"), DIRECTORIES)
def test_damaged_directory(damage: Callable[[Path], object], kind: type[CheckpointError], message: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {}, TENSORS, shards=2)
    damage(tmp_path)
    with pytest.raises(kind, match=message):
        Checkpoint.open(tmp_path)


def test_missing_directory_and_tensor(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"expected a local model directory, found none$"):
        Checkpoint.open(tmp_path / "Qwen")
    write_checkpoint(tmp_path, {}, TENSORS)
    with pytest.raises(CheckpointError, match=r"/model\.safetensors, tensor y: expected a tensor of that name, found none"):
        Checkpoint.open(tmp_path).info("y")


def mapped(file: str) -> int:
    return sum(file in line for line in Path("/proc/self/maps").read_text().splitlines())


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_a_mapping_dies_with_the_last_view(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {}, TENSORS)
    ckpt = Checkpoint.open(tmp_path)
    large = ckpt.read("large")
    view = large[3:5]
    assert mapped(str(tmp_path)) == 1
    del large
    assert torch.equal(view, TENSORS["large"][3:5])
    del view
    gc.collect()
    assert mapped(str(tmp_path)) == 0


PROBE = """
import sys, torch
from pathlib import Path
from twinweight.checkpoint import Checkpoint

def status(key):
    return next(int(l.split()[1]) for l in Path("/proc/self/status").read_text().splitlines() if l.startswith(key))

ckpt = Checkpoint.open(sys.argv[1])
torch.ones(1000).sum()
before, file_before, kept, highest = status("VmRSS:"), status("RssFile:"), [], 0
for name in ckpt.names():
    tensor = ckpt.read(name)
    kept.append(tensor.clone())
    highest = max(highest, status("VmRSS:") - before)
    del tensor
print(highest, status("VmRSS:") - before, status("RssFile:") - file_before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_pages_of_the_file_do_not_stay_in_memory(tmp_path: Path) -> None:
    size = 4 << 20
    tensors = {f"layer.{i}": torch.full((size // 4,), i, dtype=torch.int32) for i in range(24)}
    write_checkpoint(tmp_path, {}, tensors, shards=2)
    del tensors
    done = subprocess.run([sys.executable, "-c", PROBE, str(tmp_path)], capture_output=True, text=True, check=True)
    highest, final, file = (int(v) * 1024 for v in done.stdout.split())
    assert final >= 24 * size * 0.95
    assert highest <= final * 1.1 + size
    assert file < size
