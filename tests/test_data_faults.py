"""Bad data: every case ends in the error of its kind, without running, allocating or hanging on anything."""

from __future__ import annotations

import io
import os
import pickle
import shutil
import struct
import tracemalloc
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from helpers import npy_bytes, npz_bytes, write, zip_bytes
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import save, save_file

from qexport.calibration.reading import data as data_module
from qexport.calibration.reading.data import DataSpec, ImageSpec, InputSpec, open_dataset, sample_digest
from qexport.errors import DataInvalid, IntegrityError, ResourceExhausted, UnsafeInput

F32 = np.dtype(np.float32)
X = (InputSpec("x", F32, (None, 3)),)
PICTURE = (InputSpec("pixels", F32, (None, 3, 4, 4)),)
VALUES = np.arange(12, dtype=np.float32).reshape(4, 3)


def npy_header(shape: str, descr: str = "'<f4'", order: str = "False") -> bytes:
    text = f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


def zip_of(name: str, packed: bytes, size: int, crc: int) -> bytes:
    """A zip of one deflated member whose directory says whatever it is told to."""
    fields = struct.pack("<HHHHIIIHH", 0, 8, 0, 0, crc, len(packed), size, len(name), 0)
    local = b"PK\x03\x04" + struct.pack("<H", 20) + fields + name.encode()
    entry = b"PK\x01\x02" + struct.pack("<HH", 20, 20) + fields + struct.pack("<HHHII", 0, 0, 0, 0, 0) + name.encode()
    end = b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, 1, 1, len(entry), len(local) + len(packed), 0)
    return local + packed + entry + end


def deflated(header: bytes, zeros_mib: int) -> bytes:
    """A true deflate stream of ``header`` and many zeros, made of one block copied over and over."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    head = packer.compress(header) + packer.flush(zlib.Z_FULL_FLUSH)
    block = packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    return head + block * zeros_mib + packer.flush()


@contextmanager
def at_most(limit: int) -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < limit
    finally:
        tracemalloc.stop()


# ---------------------------------------------------------------- D01: pickles


class Payload:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def object_npy(target: Path) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([Payload(target)], dtype=object), allow_pickle=True)
    return buffer.getvalue()


PICKLES = {
    "object array.npy": object_npy,
    "object array.npz": lambda target: zip_bytes("x.npy", object_npy(target)),
    "raw pickle.npz": lambda target: pickle.dumps(Payload(target)),
    "protocol 2.npy": lambda target: pickle.dumps(Payload(target), protocol=2),
    "protocol 1.npz": lambda target: pickle.dumps(Payload(target), protocol=1),
    "protocol 0.npz": lambda target: pickle.dumps(Payload(target), protocol=0),
    "long pickle.npz": lambda target: pickle.dumps([Payload(target), bytes(2 << 20)]),
    "pickle in a zip.npz": lambda target: zip_bytes("archive/data.pkl", pickle.dumps(Payload(target))),
}


@pytest.mark.parametrize("name", PICKLES)
def test_d01_a_pickle_is_unsafe_and_its_payload_never_runs(tmp_path, name):
    target = tmp_path / "payload ran"
    path = write(tmp_path / name, PICKLES[name](target))
    with pytest.raises(UnsafeInput, match="can run code"):
        open_dataset(path, X, DataSpec())
    assert not target.exists()


def test_d01_the_payload_of_the_test_does_run_when_unpickled(tmp_path):
    np.load(write(tmp_path / "x.npy", object_npy(tmp_path / "ran")), allow_pickle=True)
    assert (tmp_path / "ran").exists()


# ---------------------------------------------------------------- D02: bombs and headers that lie


def test_d02_an_archive_that_expands_two_megabytes_to_two_gibibytes_is_refused_before_it_is_expanded(tmp_path):
    header = npy_header("(2048, 262144)")
    packed = deflated(header, 2048)
    path = write(tmp_path / "bomb.npz", zip_of("x.npy", packed, len(header) + (2 << 30), 0))
    assert path.stat().st_size < 3 << 20
    with at_most(8 << 20), pytest.raises(ResourceExhausted, match=r"expands from \d+ to 2147483\d+ bytes"):
        open_dataset(path, (InputSpec("x", F32, (None, None)),), DataSpec())


def test_d02_an_archive_that_denies_its_true_size_is_not_read_beyond_what_it_admits(tmp_path):
    header = npy_header("(4, 3)")
    path = write(tmp_path / "bomb.npz", zip_of("x.npy", deflated(header, 256), len(header) + 48, 0))
    with at_most(8 << 20), pytest.raises(DataInvalid):
        open_dataset(path, X, DataSpec())


def test_d02_an_honest_archive_of_zeros_is_read(tmp_path):
    header = npy_header("(64, 131072)")
    crc = zlib.crc32(header + bytes(32 << 20))
    path = write(tmp_path / "zeros.npz", zip_of("x.npy", deflated(header, 32), len(header) + (32 << 20), crc))
    with at_most(8 << 20):
        assert open_dataset(path, (InputSpec("x", F32, (None, 131072)),), DataSpec()).duplicates == 63


@pytest.mark.parametrize("shape", ["(1099511627776,)", "(4294967296, 4294967296, 4294967296)", "(2, -3)", "(4, 3)"])
@pytest.mark.parametrize("name", ["x.npy", "x.npz"])
def test_d02_a_header_that_lies_about_its_shape_is_refused_without_allocation(tmp_path, name, shape):
    lie = npy_header(shape) + bytes(40)
    path = write(tmp_path / name, lie if name == "x.npy" else zip_bytes("x.npy", lie))
    with at_most(8 << 20), pytest.raises(DataInvalid, match=rf"needs -?\d+ bytes, the file has {len(lie)}"):
        open_dataset(path, (InputSpec("x", F32, (None,) * (shape.count(",") + (shape[-2] != ","))),), DataSpec())


@pytest.mark.parametrize(
    "header",
    [
        npy_header("(4, 3)", descr="'<U4'"),
        npy_header("(4, 3)", descr="[('a', '<f4')]"),
        npy_header("(4, 3)", descr="'no type'"),
        npy_header("(4, 3)", order="True"),
        npy_header("(" * 4000),
        npy_header("-" * 9000 + "1"),
        npy_header("__import__('os').getcwd()"),
        b"\x93NUMPY\x01\x00\xff\xff{",
        b"\x93NUMPY\x02\x00\xff\xff\xff\xff{",
        b"\x93NUMPY\x09\x00\x00\x00",
        b"\x93NUMPY",
        b"",
        b"<!DOCTYPE html>",
    ],
)
def test_d02_a_header_that_cannot_be_read_is_invalid(tmp_path, header):
    for name, content in {"x.npy": header + bytes(48), "x.npz": zip_bytes("x.npy", header + bytes(48))}.items():
        with pytest.raises(DataInvalid):
            open_dataset(write(tmp_path / name, content), X, DataSpec())


def test_d02_a_sample_larger_than_any_sample_should_be_is_refused(tmp_path):
    path = tmp_path / "x.npy"
    with path.open("wb") as file:
        file.write(header := npy_header("(1, 134217728)"))
        file.truncate(len(header) + (512 << 20))  # sparse
    with at_most(8 << 20), pytest.raises(ResourceExhausted, match="one sample of 'x' takes 536870912 bytes"):
        open_dataset(path, (InputSpec("x", F32, (None, None)),), DataSpec())


# ---------------------------------------------------------------- D03: damage


@pytest.mark.parametrize("content", [npz_bytes(x=VALUES), zip_bytes("x.npy", npy_bytes(VALUES))])
def test_d03_a_truncated_archive_is_invalid_wherever_it_is_cut(tmp_path, content):
    for end in range(0, len(content), 7):
        with pytest.raises(DataInvalid):
            open_dataset(write(tmp_path / "x.npz", content[:end]), X, DataSpec())


@pytest.mark.parametrize("stored", [True, False])
def test_d03_a_flipped_bit_is_found_by_the_checksum_even_behind_the_samples_taken(tmp_path, stored):
    values = np.random.default_rng(0).normal(size=(1 << 14, 3)).astype(np.float32)
    content = bytearray(zip_bytes("x.npy", npy_bytes(values)) if stored else npz_bytes(x=values))
    content[len(content) * 9 // 10] ^= 4
    with pytest.raises(DataInvalid, match=r"checksum|damaged"):
        open_dataset(write(tmp_path / "x.npz", bytes(content)), X, DataSpec(max_samples=1))


def test_d03_bytes_behind_the_values_are_invalid(tmp_path):
    with pytest.raises(DataInvalid, match="needs 176 bytes, the file has 180"):
        open_dataset(write(tmp_path / "x.npy", npy_bytes(VALUES) + bytes(4)), X, DataSpec())


@settings(max_examples=150, deadline=None)
@given(st.data(), st.sampled_from(["x.npz", "x.npy", "x.safetensors"]))
def test_d03_any_flipped_byte_is_an_error_of_ours_or_no_change_of_a_checked_archive(tmp_path_factory, data, name):
    whole = {"x.npz": npz_bytes(x=VALUES), "x.npy": npy_bytes(VALUES), "x.safetensors": save({"x": VALUES})}[name]
    position = data.draw(st.integers(0, len(whole) - 1))
    broken = bytearray(whole)
    broken[position] ^= data.draw(st.integers(1, 255))
    folder = tmp_path_factory.mktemp("flip")
    digest = open_dataset(write(folder / name, whole), X, DataSpec()).digest
    try:
        found = open_dataset(write(folder / name, bytes(broken)), X, DataSpec())
        again = sorted(map(sample_digest, found))
    except (DataInvalid, UnsafeInput, ResourceExhausted):
        return
    assert again == sorted(found.digests)
    assert name != "x.npz" or found.digest == digest


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 16,
        struct.pack("<Q", 1 << 62) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        *(
            struct.pack("<Q", len(table)) + table + bytes(48)
            for table in (
                b'{"x":1}',
                b'{"x":{"dtype":"F32","shape":[4,3],"data_offsets":[0,96]}}',
                b'{"x":{"dtype":"F32","shape":[4,3],"data_offsets":[48,96]}}',
                b'{"x":{"dtype":"F32","shape":[4,3],"data_offsets":[-60,-12]}}',
                b'{"x":{"dtype":"F32","shape":[-4,-3],"data_offsets":[0,48]}}',
                b'{"x":{"dtype":"F32","shape":[1e400],"data_offsets":[0,48]}}',
                b'{"x":{"dtype":"BF16","shape":[4,6],"data_offsets":[0,48]}}',
                b"[" * 100000,
            )
        ),
    ],
)
def test_d03_damaged_safetensors_are_invalid(tmp_path, content):
    with pytest.raises(DataInvalid):
        open_dataset(write(tmp_path / "x.safetensors", content), X, DataSpec())


def test_d03_doubled_encrypted_and_strangely_packed_members_are_invalid(tmp_path):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("x.npy", npy_bytes(VALUES))
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("x.npy", npy_bytes(VALUES + 1))
    encrypted = bytearray(zip_bytes("x.npy", npy_bytes(VALUES)))
    encrypted[encrypted.index(b"PK\x01\x02") + 8] |= 1
    strange = io.BytesIO()
    with zipfile.ZipFile(strange, "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("x.npy", npy_bytes(VALUES))
    crowd = io.BytesIO()
    with zipfile.ZipFile(crowd, "w") as archive:
        for number in range(1001):
            archive.writestr(f"{number}.npy", b"")
    for content in (buffer.getvalue(), bytes(encrypted), strange.getvalue(), crowd.getvalue()):
        with pytest.raises(DataInvalid):
            open_dataset(write(tmp_path / "x.npz", content), X, DataSpec())


# ---------------------------------------------------------------- D05: values


@pytest.mark.parametrize(("value", "word"), [(np.nan, "NaN"), (np.inf, "Inf"), (-np.inf, "Inf"), (1e300, "Inf")])
@pytest.mark.parametrize("suffix", [".npz", ".npy", ".safetensors"])
def test_d05_a_value_that_is_not_finite_is_refused_by_sample_and_input(tmp_path, suffix, value, word):
    values = VALUES.astype(np.float64)
    values[2, 1] = value
    path = tmp_path / f"data{suffix}"
    if suffix == ".safetensors":
        save_file({"x": values}, path)
    else:
        write(path, npy_bytes(values) if suffix == ".npy" else npz_bytes(x=values))
    with pytest.raises(DataInvalid, match=f"sample 2, input 'x': holds {word}"):
        open_dataset(path, X, DataSpec())


# ---------------------------------------------------------------- D06: distinct samples


def test_d06_n_samples_are_n_distinct_ones_on_every_pass(tmp_path, monkeypatch):
    values = np.arange(60, dtype=np.float32).reshape(20, 3)
    path = write(tmp_path / "data.npz", npz_bytes(x=np.concatenate([values, values, values[::-1]])))
    dataset = open_dataset(path, X, DataSpec(max_samples=16))
    read: list[bytes] = []
    monkeypatch.setattr(
        data_module, "sample_digest", lambda sample: read.append(digest := sample_digest(sample)) or digest
    )
    for _ in range(3):
        read.clear()
        seen = {sample["x"].tobytes() for sample in dataset}
        assert len(dataset) == len(seen) == len(set(read)) == len(read) == 16


def test_d06_duplicates_are_counted_and_reported(tmp_path):
    dataset = open_dataset(write(tmp_path / "x.npy", npy_bytes(VALUES[[0, 1, 0, 2, 1]])), X, DataSpec())
    assert (len(dataset), dataset.duplicates) == (3, 2)
    assert dataset.warnings == ("2 of 5 samples are equal to an earlier one and were dropped",)


# ---------------------------------------------------------------- D08: data that changes between passes


def rewrite(path: Path, content: bytes, *, keep_time: bool) -> None:
    before = path.stat()
    path.write_bytes(content)
    if keep_time:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("keep_time", [True, False])
def test_d08_a_file_that_changes_between_passes_is_found(tmp_path, keep_time):
    path = write(tmp_path / "x.npy", npy_bytes(VALUES))
    dataset = open_dataset(path, X, DataSpec())
    assert len(list(dataset)) == 4
    changed = VALUES.copy()
    changed[3, 2] += 1
    rewrite(path, npy_bytes(changed), keep_time=keep_time)
    with pytest.raises(IntegrityError, match="changed since"):
        list(dataset)


def test_d08_a_change_behind_the_samples_that_are_taken_is_found_too(tmp_path):
    path = write(tmp_path / "x.npy", npy_bytes(VALUES))
    dataset = open_dataset(path, X, DataSpec(max_samples=2))
    rewrite(path, npy_bytes(np.concatenate([VALUES[:2], -VALUES[2:]])), keep_time=False)
    with pytest.raises(IntegrityError, match="changed since"):
        list(dataset)


@pytest.mark.parametrize("content", [b"", npy_bytes(VALUES)[:-20], npy_bytes(VALUES[:3])])
def test_d08_a_file_that_shrinks_during_a_pass_is_found_and_kills_nobody(tmp_path, content):
    values = np.arange(3 << 18, dtype=np.float32).reshape(-1, 3)[: 1 << 12]
    path = write(tmp_path / "x.npy", npy_bytes(values))
    stream = iter(open_dataset(path, X, DataSpec()))
    next(stream)
    rewrite(path, content, keep_time=False)
    with pytest.raises(IntegrityError, match="changed since"):
        list(stream)


def test_d08_a_file_that_goes_away_is_found(tmp_path):
    (tmp_path / "p").mkdir()
    for n in range(3):
        Image.new("RGB", (4, 4), (n, 0, 0)).save(tmp_path / "p" / f"{n}.png")
    dataset = open_dataset(tmp_path / "p", PICTURE, DataSpec(image=ImageSpec()))
    (tmp_path / "p" / "1.png").unlink()
    with pytest.raises(IntegrityError, match="changed since"):
        list(dataset)
    shutil.rmtree(tmp_path / "p")
    with pytest.raises(DataInvalid):
        open_dataset(tmp_path / "p", PICTURE, DataSpec(image=ImageSpec()))
