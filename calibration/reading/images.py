"""Pictures from a folder or an npz of pixels, prepared the way a recipe says."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qexport.calibration.reading.arrays import LABELS, Member, cast, fits
from qexport.calibration.reading.spec import DataSpec, ImageSpec, InputSpec, Sample, describe, describe_all
from qexport.errors import DataInvalid, EnvironmentMismatch, ResourceExhausted
from qexport.safe_io import read_bytes

if TYPE_CHECKING:
    from types import ModuleType

    from PIL.Image import Image

PIXELS = "images"
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".bmp": "BMP", ".webp": "WEBP"}
MODES = {1: "L", 3: "RGB", 4: "RGBA"}
MAX_FILE_BYTES = 64 << 20


@dataclass(frozen=True)
class Frame:
    """What one model input asks of a picture: axes ``height, width, channels`` before the layout is applied."""

    entry: InputSpec
    image: ImageSpec

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width to resize to, or ``None`` to keep the picture's."""
        if isinstance(self.image.size, int):
            return self.image.size, self.image.size
        if self.image.size is not None:
            return self.image.size
        _, *axes = self.entry.shape
        height, width = axes[1:] if self.image.layout == "NCHW" else axes[:2]
        return (height, width) if height is not None and width is not None else None

    @property
    def channels(self) -> int:
        """Number of colour channels, 3 where the model leaves it free."""
        return self.entry.shape[1 if self.image.layout == "NCHW" else 3] or 3

    def prepare(self, pixels: NDArray[np.uint8], where: str) -> Sample:
        """Turn ``[height, width, channels]`` pixels into a sample; an integer input takes them as they are.

        Raises:
            DataInvalid: The result does not fit the model.
        """
        values: NDArray[Any] = pixels
        if self.entry.dtype.kind not in "iu":
            mean, std = (np.asarray(numbers, np.float32) for numbers in (self.image.mean, self.image.std))
            values = (pixels.astype(np.float32) * np.float32(self.image.scale) - mean) / std
        if self.image.layout == "NCHW":
            values = values.transpose(2, 0, 1)
        if not fits(values.shape, self.entry.shape[1:]):
            found = describe(self.entry.name, self.entry.dtype, (None, *values.shape))
            raise DataInvalid(f"expected {self.entry}, found {found}", where=where, hint="set data.image.size")
        return {self.entry.name: np.ascontiguousarray(cast(values, self.entry.dtype))}


@dataclass(frozen=True)
class FolderSource:
    """Samples from the pictures of a folder, in the order of their names."""

    files: tuple[Path, ...]
    frame: Frame

    def __iter__(self) -> Iterator[Sample]:
        for path in self.files:
            yield self.frame.prepare(read_picture(path, self.frame), str(path))


@dataclass(frozen=True)
class PixelSource:
    """Samples from an array ``images``, uint8 ``[samples, height, width, channels]``."""

    files: tuple[Path, ...]
    member: Member
    frame: Frame
    labels: Member | None = None

    def __iter__(self) -> Iterator[Sample]:
        for index, pixels in enumerate(self.member.rows()):
            if self.frame.size not in (None, pixels.shape[:2]):
                pixels = resize(_pillow().fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels), self.frame)
            yield self.frame.prepare(pixels, f"{self.files[0]}: sample {index}")


def open_folder(path: Path, inputs: tuple[InputSpec, ...], spec: DataSpec) -> FolderSource:
    """Open a folder of pictures; other files in it and folders below it are left alone.

    Raises:
        DataInvalid: There is no picture, no ``data.image``, or the model takes no pictures.
        EnvironmentMismatch: Pillow is not installed.
    """
    frame = open_frame(inputs, spec, str(path))
    files = tuple(sorted(entry for entry in path.iterdir() if entry.suffix.lower() in FORMATS and entry.is_file()))
    if not files:
        raise DataInvalid(f"the folder holds no picture ({', '.join(FORMATS)})", where=str(path))
    _pillow()
    return FolderSource(files, frame)


def open_pixels(
    path: Path, members: Mapping[str, Member], inputs: tuple[InputSpec, ...], spec: DataSpec
) -> PixelSource:
    """Open the array ``images`` of a file, with ``labels`` beside it if there are any.

    Raises:
        DataInvalid: It is not uint8 with four axes and the model's channels, or the model takes no pictures.
    """
    frame, member = open_frame(inputs, spec, str(path)), members[PIXELS]
    if member.dtype != np.uint8 or len(member.shape) != 4 or member.shape[3] != frame.channels or 0 in member.shape:
        wanted = describe(PIXELS, np.dtype(np.uint8), (None, None, None, frame.channels))
        raise DataInvalid(
            f"expected {wanted}, found {member}",
            where=str(path),
            hint=f"check data.image.layout, now {frame.image.layout}",
        )
    return PixelSource((path,), member, frame, members.get(LABELS))


def open_frame(inputs: tuple[InputSpec, ...], spec: DataSpec, where: str) -> Frame:
    """Match the ``data.image`` section with the model.

    Raises:
        DataInvalid: There is no such section, the model has other inputs too, or means and channels disagree.
    """
    if spec.image is None:
        raise DataInvalid(
            "images need a data.image section that says how pixels are prepared",
            where=where,
            hint="name the mean and std that the model was trained with, as in --set 'data.image.mean=[0.5, 0.5, 0.5]'",
        )
    frame = Frame(inputs[0], spec.image) if len(inputs) == 1 and len(inputs[0].shape) == 4 else None
    if frame is None or spec.image.input not in (None, frame.entry.name):
        wanted = f"named {spec.image.input!r} " if spec.image.input else ""
        raise DataInvalid(
            f"images need a model with one input {wanted}of four axes, found {describe_all(inputs)}",
            where=where,
            hint="give the samples as npz arrays otherwise",
        )
    if {len(spec.image.mean), len(spec.image.std)} - {1, frame.channels} or frame.channels not in MODES:
        raise DataInvalid(
            f"{len(spec.image.mean)} means and {len(spec.image.std)} deviations for {frame.channels} channels",
            where=where,
            hint=f"check data.image.layout, now {spec.image.layout}",
        )
    return frame


def read_picture(path: Path, frame: Frame) -> NDArray[np.uint8]:
    """Decode one file to ``[height, width, channels]``, resized as the frame asks.

    Raises:
        DataInvalid: It cannot be decoded.
        ResourceExhausted: It has very many pixels.
    """
    pillow = _pillow()
    data = read_bytes(path, limit=MAX_FILE_BYTES)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pillow.DecompressionBombWarning)
            with pillow.open(io.BytesIO(data), formats=sorted(set(FORMATS.values()))) as image:
                return resize(image.convert(MODES[frame.channels]), frame)
    except (pillow.DecompressionBombWarning, pillow.DecompressionBombError) as error:
        raise ResourceExhausted(str(error).lower(), where=str(path)) from error
    except (OSError, ValueError, SyntaxError, EOFError, IndexError) as error:
        raise DataInvalid(f"cannot be decoded as a picture: {error}", where=str(path)) from error


def resize(image: Image, frame: Frame) -> NDArray[np.uint8]:
    """Scale to cover the frame, keeping the aspect, and cut the centre out (bilinear)."""
    from PIL import ImageOps

    if frame.size is not None:
        height, width = frame.size
        image = ImageOps.fit(image, (width, height), _pillow().Resampling.BILINEAR)
    pixels = np.asarray(image, np.uint8)
    return pixels[..., np.newaxis] if pixels.ndim == 2 else pixels


def _pillow() -> ModuleType:
    try:
        from PIL import Image
    except ImportError as error:
        raise EnvironmentMismatch("Pillow is not installed", hint="pip install 'qexport[images]'") from error
    return Image
