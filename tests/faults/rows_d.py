"""Data: rows D01 to D11."""

from __future__ import annotations

import io
import itertools
import os
import pickle
import struct
import subprocess
import zlib
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from generating import tokenizer, write_folder
from helpers import npy_bytes, npz_bytes
from numpy.typing import NDArray
from safetensors.numpy import save
from tokenizers import Tokenizer, models, pre_tokenizers

from faults.case import Case, Ended, Room

COUNT, WIDTH = 16, 32
TOKENS = """<ir_version: 10, opset_import: ["" : 21]>
g (int64[n, t] input_ids) => (float[n, t, 8] y) { y = Gather(table, input_ids) }"""


def values(count: int = COUNT, seed: int = 1) -> NDArray[np.float32]:
    """Samples for the good model."""
    return np.random.default_rng(seed).standard_normal((count, WIDTH)).astype(np.float32)


def calib(name: str, content: bytes | Callable[[Room], bytes], *more: str) -> Callable[[Room], list[str]]:
    """The good build with other calibration data."""

    def plant(room: Room) -> list[str]:
        path = room.inputs / name
        path.write_bytes(content if isinstance(content, bytes) else content(room))
        return room.build_of(room.good / "model.onnx", "--calib", str(path), *more)

    return plant


def flipped(data: bytes, at: int = -2) -> bytes:
    """One bit of it is another."""
    changed = bytearray(data)
    changed[at] ^= 1
    return bytes(changed)


# ---------------------------------------------------------------- D01, D02: dangerous, and far too large


class Payload:
    """What a pickle runs when it is read: it makes a folder beside the outputs."""

    def __init__(self, room: Room) -> None:
        self.path = str(room.out / "payload-ran")

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


def objects(room: Room) -> NDArray[np.object_]:
    """An array that runs the payload."""
    return np.array([Payload(room)] * COUNT, object)


def object_npz(room: Room) -> bytes:
    """As ``numpy.savez`` pickles objects."""
    file = io.BytesIO()
    np.savez(file, x=objects(room))
    return file.getvalue()


def object_npy(room: Room) -> bytes:
    """As ``numpy.save`` pickles objects."""
    file = io.BytesIO()
    np.save(file, objects(room), allow_pickle=True)
    return file.getvalue()


def did_not_run(room: Room, _: Ended) -> None:
    """The payload was only looked at."""
    assert not list(room.out.glob("payload*"))
    pickle.loads(pickle.dumps(Payload(room)))
    assert list(room.out.glob("payload*")), "the payload would have run"
    (room.out / "payload-ran").rmdir()


def npy_header(shape: str) -> bytes:
    """The header of an array of any shape, without the array."""
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


def bomb(name: str = "x.npy", mib: int = 2048) -> bytes:
    """2 GiB of zeros in a zip of 2 MB, made of one compressed block again and again."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    head = packer.compress(npy_header(f"({mib << 13}, {WIDTH})")) + packer.flush(zlib.Z_FULL_FLUSH)
    block = packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    packed = head + block * mib + packer.flush()
    size = len(npy_header(f"({mib << 13}, {WIDTH})")) + (mib << 20)
    fields = struct.pack("<HHHHIIIHH", 0, 8, 0, 0, 0, len(packed), size, len(name), 0)
    local = b"PK\x03\x04" + struct.pack("<H", 20) + fields + name.encode()
    entry = b"PK\x01\x02" + struct.pack("<HH", 20, 20) + fields + struct.pack("<HHHII", 0, 0, 0, 0, 0) + name.encode()
    end = b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, 1, 1, len(entry), len(local) + len(packed), 0)
    return local + packed + entry + end


SMALL = {"rss": 500}

UNSAFE = [
    Case("D01_npz_of_objects", calib("a.npz", object_npz), 4, "Python objects, which can run code", did_not_run),
    Case("D01_npy_of_objects", calib("a.npy", object_npy), 4, "Python objects, which can run code", did_not_run),
    Case("D01_pickle_named_npz", calib("a.npz", lambda room: pickle.dumps([Payload(room)])), 4, "is a pickle",
         did_not_run),
    Case("D01_old_pickle_named_npz", calib("a.npz", lambda room: pickle.dumps([Payload(room)], 0)), 4, "is a pickle",
         did_not_run),
    Case("D02_npz_bomb", calib("a.npz", lambda _: bomb()), 9, r"expands from \d+ to 21474\d+ bytes", limits=SMALL),
    Case("D02_npy_header_lies", calib("a.npy", npy_header("(1099511627776,)") + bytes(64)), 5,
         "needs 4398046511", limits=SMALL),
    Case("D02_npy_header_overflows", calib("a.npy", npy_header(f"({2**62}, {2**62})")), 5, "needs", limits=SMALL),
    Case("D02_npy_header_negative", calib("a.npy", npy_header("(-1, 32)") + bytes(64)), 5, "needs", limits=SMALL),
    Case("D02_safetensors_header_lies", calib("a.safetensors", (2**62).to_bytes(8, "little") + b"{}"), 5,
         "is too long", limits=SMALL),
]  # fmt: skip


# ---------------------------------------------------------------- D03, D04: damaged, or for another model


def with_digest(content: Callable[[bytes], bytes]) -> Callable[[Room], list[str]]:
    """The good samples as ``.npy``, changed after their digest was taken."""

    def plant(room: Room) -> list[str]:
        good, path = npy_bytes(values()), room.inputs / "a.npy"
        path.write_bytes(content(good))
        (room.inputs / "a.npy.sha256").write_text(f"{sha256(good).hexdigest()}  a.npy\n")
        return room.build_of(room.good / "model.onnx", "--calib", str(path))

    return plant


STORED = io.BytesIO()
np.savez(STORED, x=values())
TENSORS = save({"x": values()})
BOTH = r"expected 'x' float32\[\?, 32\], found "

DAMAGED = [
    Case("D03_npz_truncated", calib("a.npz", npz_bytes(x=values())[:-100]), 5, "is damaged"),
    Case("D03_npz_bit_flipped", calib("a.npz", flipped(STORED.getvalue(), 1000)), 5, r"checksum|damaged"),
    Case("D03_npz_packed_bit_flipped", calib("a.npz", flipped(npz_bytes(x=values()), 1000)), 5, r"checksum|damaged"),
    Case("D03_npy_truncated", calib("a.npy", npy_bytes(values())[:-1]), 5, "needs 2176 bytes, the file has 2175"),
    Case("D03_safetensors_truncated", calib("a.safetensors", TENSORS[:-4]), 5, "needs 2048 bytes"),
    Case("D03_npy_bit_flipped_beside_its_digest", with_digest(flipped), 11, r"a\.npy\.sha256 says another"),
    Case("D03_npy_whole_beside_its_digest", with_digest(lambda good: good), 0),
    Case("D04_another_name", calib("a.npz", npz_bytes(z=values())), 5, f"'x' is missing.*{BOTH}'z'"),
    Case("D04_another_width", calib("a.npz", npz_bytes(x=values()[:, :31])), 5, BOTH + r"'x' float32\[16, 31\]"),
    Case("D04_another_type", calib("a.npz", npz_bytes(x=values().astype(complex))), 5, "not an array of numbers"),
    Case("D04_integers", calib("a.npz", npz_bytes(x=np.ones((4, 32), np.int64))), 5, f"'x' is int64.*{BOTH}"),
    Case("D04_another_rank", calib("a.npz", npz_bytes(x=values()[None])), 5, f"shape of 'x' does not fit.*{BOTH}"),
    Case("D04_no_batch", calib("a.npy", npy_bytes(values()[0])), 5, BOTH + r"'x' float32\[32\]"),
    Case("D04_one_too_many", calib("a.npz", npz_bytes(x=values(), z=values())), 5, f"'z' is not an input.*{BOTH}"),
    Case("D04_none", calib("a.npz", npz_bytes(labels=np.arange(4))), 5, f"'x' is missing.*{BOTH}"),
    Case("D04_empty", calib("a.npz", npz_bytes(x=values(0))), 5, "'x' is empty"),
]  # fmt: skip


# ---------------------------------------------------------------- D05: no range to measure


def scales_are_positive(room: Room, _: Ended) -> None:
    """Every scale of the artefact is a positive number; where all is zero, nothing is quantized."""
    model = onnx.load(room.artefact / "model.onnx")
    held = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    scales = [held[node.input[1]] for node in model.graph.node if node.op_type.endswith("izeLinear")]
    for scale in scales:
        assert np.all(np.isfinite(scale))
        assert np.all(scale > 0)


def warned(says: str) -> Callable[[Room, Ended], None]:
    """The result has this warning, and all scales are positive."""

    def after(room: Room, ended: Ended) -> None:
        scales_are_positive(room, ended)
        assert says in (room.artefact / "result.json").read_text()

    return after


def with_one(value: float) -> bytes:
    """The good samples, one number of which is another."""
    changed = values()
    changed[3, 5] = value
    return npz_bytes(x=changed)


DEGENERATE = [
    Case("D05_nan", calib("a.npz", with_one(np.nan)), 5, "sample 3, input 'x': holds NaN"),
    Case("D05_inf", calib("a.npz", with_one(-np.inf)), 5, "sample 3, input 'x': holds Inf"),
    Case("D05_all_zero", calib("a.npz", npz_bytes(x=np.zeros((16, 32), "f"))),
         after=warned("input 'x' is 0 everywhere")),
    Case("D05_constant", calib("a.npz", npz_bytes(x=np.full((16, 32), 3, "f"))),
         after=warned("input 'x' is 3 everywhere")),
    Case("D05_tiny", calib("a.npz", npz_bytes(x=np.full((16, 32), 1e-42, "f"))), after=warned("everywhere")),
    Case("D05_one_sample", calib("a.npz", npz_bytes(x=values(1))), after=warned("there is only one sample")),
    Case("D05_equal_samples", calib("a.npz", npz_bytes(x=np.repeat(values(1), 8, 0))),
         after=warned("7 of 8 samples are equal")),
]  # fmt: skip


# ---------------------------------------------------------------- D06 to D09: what is read, and when


def note_rows(root: str) -> None:
    """Write down the digest of every row of ``x`` that a session is given."""
    from qexport.runtime.backends.ort import OrtSession

    run = OrtSession.run

    def noting(self: Any, feeds: Any, outputs: Any = None) -> Any:
        with open(f"{root}/tmp/rows", "a", encoding="ascii") as file:
            file.writelines(f"{sha256(np.ascontiguousarray(row)).hexdigest()}\n" for row in feeds.get("x", ()))
        return run(self, feeds, outputs)

    OrtSession.run = noting  # type: ignore[method-assign]  # a spy


def all_were_read(room: Room, _: Ended) -> None:
    """As many different rows were run as there are samples, and they are the samples."""
    seen = set((room.tmp / "rows").read_text().split())
    assert {sha256(row).hexdigest() for row in values(50)} <= seen
    (room.tmp / "rows").unlink()


def after_survey(*command: str) -> Callable[[str], None]:
    """A hook that has another program change the data once they have been read for the first time."""

    def hook(root: str) -> None:
        from qexport.calibration.reading import data

        survey = data.survey

        def surveyed(*arguments: Any, **more: Any) -> Any:
            found = survey(*arguments, **more)
            subprocess.run(command, cwd=f"{root}/inputs", check=True)
            return found

        data.survey = surveyed

    return hook


replace = after_survey("cp", "other.npz", "a.npz")
replace_unseen = after_survey("cp", "--preserve=timestamps", "other.npz", "a.npz")
remove = after_survey("rm", "a.npz")


def moving(content: bytes, other: bytes) -> Callable[[Room], list[str]]:
    """The good build, with other data at hand that take the place of the first; as old as these."""

    def plant(room: Room) -> list[str]:
        argv = calib("a.npz", content)(room)
        (room.inputs / "other.npz").write_bytes(other)
        for name in ("a.npz", "other.npz"):
            os.utime(room.inputs / name, (1_600_000_000, 1_600_000_000))
        return argv

    return plant


def given(make: Callable[[], Iterator[dict[str, Any]]]) -> Callable[[str], None]:
    """A hook by which ``build`` is given a function instead of the file."""

    def hook(_root: str) -> None:
        from qexport.calibration.reading import data
        from qexport.exporter import build

        road = build.build
        data.MAX_SAMPLES = 500
        build.build = lambda model, **asked: road(model, **{**asked, "calib": make})

    return hook


def endless() -> Iterator[dict[str, Any]]:
    """Samples that never end."""
    return (
        {"x": np.random.default_rng(index).standard_normal(WIDTH).astype(np.float32)} for index in itertools.count()
    )


def failing() -> Iterator[dict[str, Any]]:
    """Samples that fail after three."""
    yield from itertools.islice(endless(), 3)
    raise OSError("the database went away")


give_endless, give_failing = given(endless), given(failing)


def good(*more: str) -> Callable[[Room], list[str]]:
    """The good build."""
    return lambda room: room.build(*more)


MOVING = {"code": 11, "says": "the data changed since it was read first", "moves_inputs": True}
MANY = calib("a.npz", npz_bytes(x=values(50)))
FILE, PLAIN = STORED.getvalue(), npy_bytes(values())

READING = [
    Case("D06_every_sample_is_run", MANY, after=all_were_read, hook="rows_d:note_rows"),
    Case("D07_no_data", lambda room: room.build_of(room.good / "model.onnx"), 2,
         "needs calibration data.*none are made up"),
    Case("D07_no_random_data", lambda room: [*room.build_of(room.good / "model.onnx"), "--random-calib"], 2,
         "--random-calib"),
    Case("D08_shorter", moving(FILE, npz_bytes(x=values(8))), hook="rows_d:replace", **MOVING),
    Case("D08_replaced", moving(FILE, npz_bytes(x=values(seed=9))), hook="rows_d:replace", **MOVING),
    Case("D08_removed", moving(FILE, b""), hook="rows_d:remove", **MOVING),
    Case("D08_flipped_as_old_as_before", moving(PLAIN, flipped(PLAIN)), hook="rows_d:replace_unseen", **MOVING),
    Case("D09_raises", good(), 5, r"failing\(\): sample 3: .* raised OSError: the database went away",
         hook="rows_d:give_failing"),
    Case("D09_never_ends", good(), 9, "more than 500 samples.*data.max_samples", hook="rows_d:give_endless"),
    Case("D09_never_ends_but_is_capped", good("--set", "data.max_samples=20"), hook="rows_d:give_endless",
         after=warned("quality is measured on samples")),
]  # fmt: skip


# ---------------------------------------------------------------- D10, D11: order, and tokens


def same_model(**arrays: NDArray[Any]) -> Callable[[Room, Ended], None]:
    """A build from these arrays gives the same bytes."""

    def after(room: Room, _: Ended) -> None:
        first = (room.artefact / "model.onnx").read_bytes()
        other = room.tmp / "other.npz"
        other.write_bytes(npz_bytes(**arrays))
        argv = room.build_of(room.good / "model.onnx", "--calib", str(other))
        argv[argv.index("-o") + 1] = str(room.out / "b")
        assert room.run(argv).code == 0
        assert (room.out / "b/model.onnx").read_bytes() == first
        other.unlink()

    return after


def words(folder: Path, count: int) -> None:
    """A tokenizer of so many words."""
    made = Tokenizer(models.WordLevel({"[UNK]": 0} | {str(n): n for n in range(1, count)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    (folder / "tokenizer.json").write_text(made.to_str())


def texts(count: int, command: str) -> Callable[[Room], list[str]]:
    """A model of 50 words and a tokenizer of ``count``, none of it where that is 0."""

    def plant(room: Room) -> list[str]:
        proto = onnx.parser.parse_model(TOKENS)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.eye(50, 8, dtype=np.float32), "table"))
        (room.inputs / "model.onnx").write_bytes(proto.SerializeToString())
        (room.inputs / "text.txt").write_text("1 2 3\n4 5 6\n")
        if count:
            words(room.inputs, count)
        if command == "export":
            return ["export", str(room.inputs), "-o", str(room.artefact)]
        return room.build_of(room.inputs / "model.onnx", "--calib", str(room.inputs / "text.txt"))

    return plant


def pair(room: Room) -> list[str]:
    """A target and a draft, two tokens of which have changed places."""
    other = tokenizer().to_str().replace('"c"', '"?"').replace('"d"', '"c"').replace('"?"', '"d"')
    target = write_folder(room.inputs / "target")
    draft = write_folder(room.inputs / "draft", made=Tokenizer.from_str(other))
    return ["generate", str(target), "--draft", str(draft), "--prompt", "a b"]


AROUND = [
    Case("D10_permuted", MANY, after=same_model(x=values(50)[np.random.default_rng(3).permutation(50)])),
    Case("D10_twice", MANY, after=same_model(x=np.concatenate([values(50), values(50)[::-1]]))),
    Case("D11_text_without_tokenizer", texts(0, "build"), 5, "tokenizer"),
    Case("D11_tokenizer_of_more_words", texts(51, "build"), 5, "the tokenizer gives numbers up to 50"),
    Case("D11_export_with_tokenizer_of_more_words", texts(51, "export"), 5, "the tokenizer gives numbers up to 50"),
    Case("D11_draft_of_other_words", pair, 5, "its tokenizer is not that of the target: token 3 is 'd', there 'c'"),
]

CASES = [*UNSAFE, *DAMAGED, *DEGENERATE, *READING, *AROUND]
