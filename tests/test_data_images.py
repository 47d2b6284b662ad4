"""Images as data: a folder and an npz of the same pixels are the same samples, prepared as the recipe says."""

from __future__ import annotations

import struct
import subprocess
import sys
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from qexport.calibration.reading.data import DataSpec, ImageSpec, InputSpec, open_dataset
from qexport.calibration.reading.evaluation import open_evaluation
from qexport.errors import DataInvalid, ResourceExhausted

F32 = np.dtype(np.float32)
PICTURE = (InputSpec("pixels", F32, (None, 3, 4, 4)),)
X = (InputSpec("x", F32, (None, 3)),)


def save_arrays(path: Path, arrays: dict[str, np.ndarray]) -> Path:
    np.savez(path, **arrays)
    return path


def save_pictures(folder: Path) -> np.ndarray:
    pixels = np.random.default_rng(1).integers(0, 256, (3, 4, 4, 3), np.uint8)
    folder.mkdir()
    for name, picture in zip(["b.png", "a.bmp", "c.PNG"], pixels, strict=True):
        Image.fromarray(picture).save(folder / name)
    (folder / "notes.md").write_text("not a picture")
    return pixels[[1, 0, 2]]


IMAGE = ImageSpec(mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_a_folder_and_an_npz_of_the_same_pixels_are_the_same_data(tmp_path, layout):
    pixels = save_pictures(tmp_path / "pictures")
    save_arrays(tmp_path / "data.npz", {"images": pixels, "labels": np.array([2, 0, 1])})
    shape = (None, 3, 4, 4) if layout == "NCHW" else (None, 4, 4, 3)
    inputs = (InputSpec("pixels", F32, shape),)
    spec = DataSpec(image=IMAGE.model_copy(update={"layout": layout}))
    folder, archive = (open_dataset(tmp_path / name, inputs, spec) for name in ("pictures", "data.npz"))
    assert folder.digest == archive.digest
    wanted = (pixels / 255 - [0.5, 0.4, 0.3]) / [0.2, 0.3, 0.4]
    wanted = wanted.transpose(0, 3, 1, 2) if layout == "NCHW" else wanted
    np.testing.assert_allclose([sample["pixels"] for sample in folder], wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("size", "side"), [(None, 4), (2, 2), ((2, 2), 2)])
def test_pictures_are_scaled_to_cover_and_cut_at_the_centre(tmp_path, size, side):
    (tmp_path / "p").mkdir()
    picture = np.zeros((8, 48, 3), np.uint8)
    picture[:, 16:32] = 200
    Image.fromarray(picture).save(tmp_path / "p" / "wide.png")
    save_arrays(tmp_path / "data.npz", {"images": picture[None]})
    inputs = (InputSpec("pixels", F32, (None, 3, side, side)),)
    for name in ("p", "data.npz"):
        (sample,) = open_dataset(tmp_path / name, inputs, DataSpec(image=ImageSpec(size=size, scale=1)))
        np.testing.assert_array_equal(sample["pixels"], np.full((3, side, side), 200, np.float32))


def test_an_integer_input_takes_grey_pixels_as_they_are(tmp_path):
    pixels = np.arange(32, dtype=np.uint8).reshape(2, 4, 4, 1)
    inputs = (InputSpec("pixels", np.dtype(np.uint8), (None, 1, None, None)),)
    dataset = open_dataset(save_arrays(tmp_path / "data.npz", {"images": pixels}), inputs, DataSpec(image=ImageSpec()))
    np.testing.assert_array_equal([sample["pixels"] for sample in dataset], pixels.transpose(0, 3, 1, 2))


def test_float_arrays_named_images_go_to_an_input_of_that_name_untouched(tmp_path):
    inputs = (InputSpec("images", F32, (None, 3, 4, 4)),)
    values = np.random.default_rng(2).normal(size=(2, 3, 4, 4)).astype(np.float32)
    dataset = open_dataset(save_arrays(tmp_path / "data.npz", {"images": values}), inputs, DataSpec(image=ImageSpec()))
    np.testing.assert_array_equal([sample["images"] for sample in dataset], values)


@pytest.mark.parametrize("name", ["images", "pixels"])
def test_labels_make_a_top1_task(tmp_path, name):
    arrays = {"images": save_pictures(tmp_path / "p"), "labels": np.array([2, 0, 1], np.uint8)}
    spec = DataSpec(image=IMAGE)
    if name == "pixels":
        arrays["pixels"], spec = arrays.pop("images").transpose(0, 3, 1, 2).astype(np.float32), DataSpec()
    evaluation = open_evaluation(save_arrays(tmp_path / "data.npz", arrays), PICTURE, spec)
    assert evaluation.task is not None
    assert evaluation.task.name == "top1"
    assert evaluation.task.score(np.eye(3)[[2, 0, 0]]) == pytest.approx(200 / 3)


@pytest.mark.parametrize("values", [{"std": (0.0,)}, {"mean": (float("nan"),)}, {"mean": ()}, {"colour": 1}])
def test_an_impossible_image_section_is_refused(values):
    with pytest.raises(ValidationError):
        ImageSpec(**values)


# ---------------------------------------------------------------- D02, D04: broken, vast, or of the wrong kind


def test_d04_pictures_that_cannot_be_decoded_or_do_not_fit_are_named(tmp_path):
    spec = DataSpec(image=ImageSpec())
    (tmp_path / "p").mkdir()
    with pytest.raises(DataInvalid, match="no picture"):
        open_dataset(tmp_path / "p", PICTURE, spec)
    (tmp_path / "p" / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(50))
    with pytest.raises(DataInvalid, match=r"a\.png: cannot be decoded"):
        open_dataset(tmp_path / "p", PICTURE, spec)
    Image.new("RGB", (4, 5)).save(tmp_path / "p" / "a.png")
    free = (InputSpec("pixels", F32, (None, 3, None, 4)),)
    with pytest.raises(DataInvalid, match=r"expected 'pixels' float32\[\?, 3, \?, 4\], found .*\[\?, 3, 8, 9\]"):
        open_dataset(tmp_path / "p", free, DataSpec(image=ImageSpec(size=(8, 9))))


def test_d04_a_truncated_picture_is_invalid_wherever_it_is_cut(tmp_path):
    (tmp_path / "p").mkdir()
    for name in ("a.png", "a.jpg", "a.bmp", "a.webp"):
        path = tmp_path / "p" / name
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)).save(path)
        whole = path.read_bytes()
        for end in range(0, len(whole) - len(whole) // 8, 23):
            path.write_bytes(whole[:end])
            with pytest.raises(DataInvalid):
                open_dataset(path.parent, PICTURE, DataSpec(image=ImageSpec()))
        path.unlink()


@pytest.mark.filterwarnings("ignore")
def test_d02_a_picture_of_very_many_pixels_is_refused_before_it_is_decoded(tmp_path):
    (tmp_path / "p").mkdir()
    head = struct.pack(">II", 10_000, 10_000) + b"\x08\x02\x00\x00\x00"
    chunk = struct.pack(">I", 13) + b"IHDR" + head + struct.pack(">I", zlib.crc32(b"IHDR" + head))
    (tmp_path / "p" / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + b"IDAT" + bytes(4))
    tracemalloc.start()
    with pytest.raises(ResourceExhausted, match="100000000 pixels"):
        open_dataset(tmp_path / "p", PICTURE, DataSpec(image=ImageSpec()))
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("inputs", "image", "message"),
    [
        (PICTURE, None, r"need a data.image section.*--set 'data.image.mean=\[0.5, 0.5, 0.5\]'"),
        (X, ImageSpec(), "one input of four axes"),
        (PICTURE + X, ImageSpec(), "one input of four axes"),
        (PICTURE, ImageSpec(input="x"), "one input named 'x' of four axes"),
        (PICTURE, ImageSpec(mean=(0.1, 0.2)), "2 means and 1 deviations for 3 channels"),
        (
            PICTURE,
            ImageSpec(layout="NHWC"),
            "expected 'images' uint8\\[\\?, \\?, \\?, 4\\].*check data\\.image\\.layout",
        ),
    ],
)
def test_d04_pixels_need_a_model_and_a_section_that_fit(tmp_path, inputs, image, message):
    path = save_arrays(tmp_path / "data.npz", {"images": np.zeros((2, 4, 4, 3), np.uint8)})
    with pytest.raises(DataInvalid, match=message):
        open_dataset(path, inputs, DataSpec(image=image))


def test_arrays_are_read_where_pillow_is_missing_and_a_folder_says_what_to_install(tmp_path):
    (tmp_path / "p").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "p" / "a.png")
    save_arrays(tmp_path / "data.npz", {"images": np.ones((2, 4, 4, 3), np.uint8)})
    code = (
        "import sys; sys.modules['PIL'] = None\n"
        "import numpy as np\n"
        "from qexport.calibration.reading.data import *\n"
        "from qexport.errors import EnvironmentMismatch\n"
        "inputs, spec = (InputSpec('x', np.dtype('f4'), (None, 3, 4, 4)),), DataSpec(image=ImageSpec())\n"
        "assert len(open_dataset('data.npz', inputs, spec)) == 1\n"
        "try: open_dataset('p', inputs, spec)\n"
        "except EnvironmentMismatch as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "pip install 'qexport[images]'" in done.stdout
