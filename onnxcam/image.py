"""Pictures in, tensors out: open, orient, resize, normalise, and the way back from a map to the picture.

Coordinates are in pixels of the upright picture, measured from its top left corner: pixel 0 covers 0..1
and its centre is 0.5.
"""

import dataclasses
import io
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

from onnxcam.card import Preprocess
from onnxcam.errors import OnnxcamError

_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What turns a picture of each EXIF orientation upright. Pillow's `exif_transpose` would also write the
EXIF anew, and fails where a camera left odd values in it."""
_OPTIONS = {"height": "--size", "width": "--size"}
_TWO_STEP_PIXELS = 1 << 26
"""A resized picture of more pixels than this is never made whole only to be cropped."""


def open_image(path: str | os.PathLike[str]) -> Image.Image:
    """Decode the picture at `path` completely, turn it upright and convert it to 8-bit RGB.

    EXIF orientation is applied, transparency is laid over white, an animation gives its first frame.
    16-bit grey is divided by 257. Float grey is read as 0..1, 0..255 or 0..65535, the first of the three
    that holds all its values. Colour profiles are ignored.

    Returns:
        A picture of mode ``RGB``, held in memory; no file stays open.

    Raises:
        OnnxcamError: the file cannot be read, is empty, is no picture, is damaged or cut short, or has
            more pixels than Pillow's limit against decompression bombs (``2 * Image.MAX_IMAGE_PIXELS``).
    """
    try:
        data = Path(path).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the path
        raise OnnxcamError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    if not data:
        raise OnnxcamError(f"{path} is empty: it has 0 bytes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a large picture or odd metadata is no news to the user
            with Image.open(io.BytesIO(data)) as image:
                return upright(image)
    except Image.DecompressionBombError as error:
        raise OnnxcamError(f"{path} is too large to open: {error}") from error
    except UnidentifiedImageError as error:
        raise OnnxcamError(
            f"{path} is not a picture that Pillow can read, or its start is damaged"
        ) from error
    except OnnxcamError as error:
        raise OnnxcamError(f"{path}: {error}") from error
    except Exception as error:  # decoders raise struct.error, SyntaxError, zlib.error and more
        reason = " ".join(str(error).split()) or type(error).__name__
        raise OnnxcamError(f"{path} is damaged, cut short or not supported by Pillow: {reason}") from error


def upright(image: Image.Image) -> Image.Image:
    """Return a copy of `image`, turned as its EXIF orientation says, as `to_rgb` makes it."""
    image.load()
    turn = _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    return to_rgb(image if turn is None else image.transpose(turn))


def to_rgb(image: Image.Image) -> Image.Image:
    """Return a copy of `image`, of any mode, as 8-bit ``RGB``, by the rules of `open_image`.

    Raises:
        OnnxcamError: the grey values of a 32-bit or float picture fit none of the ranges named there.
    """
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _to_8_bit(image)
    elif image.mode == "La":
        image = image.convert("LA")
    if not image.has_transparency_data:
        return image.convert("RGB")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def _to_8_bit(image: Image.Image) -> Image.Image:
    """Scale the grey values of a 16-bit, 32-bit or float picture to mode ``L``; Pillow would clip them."""
    values = np.asarray(image).astype(np.float64)
    low, high = values.min(), values.max()
    fulls = (1, 255, 65535) if image.mode == "F" else (65535,)
    full = next((full for full in fulls if low >= 0 and high <= full), None)
    if full is None:
        raise OnnxcamError(
            f"its grey values run from {low:g} to {high:g}; values of 0 to {fulls[-1]} can be read"
        )
    if "transparency" in image.info:  # a 16-bit grey PNG may name one value as transparent
        values[values == image.info["transparency"]] = full
    return Image.fromarray(np.rint(values * (255 / full)).astype(np.uint8))


@dataclasses.dataclass(frozen=True)
class Viewport:
    """The part of the upright picture that the model saw.

    Attributes:
        left, top, right, bottom: the box, in pixels of the picture; seldom whole numbers.
        width, height: the size of the whole picture in pixels.
    """

    left: float
    top: float
    right: float
    bottom: float
    width: int
    height: int

    def to_picture(self, heat: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Spread a map over the picture, by bilinear interpolation between the centres of its cells.

        Beyond the outermost centres the outermost values continue. Where the picture has fewer pixels
        than the map has cells, each pixel averages the cells that it covers, as Pillow does.

        Args:
            heat: float32 [H, W], finite; it covers the viewport exactly.

        Returns:
            The map as float32 [height, width], zero outside the viewport, and as bool [height, width]
            which pixels the model saw, if only in part.
        """
        heat = heat.astype(np.float32, copy=False)
        if heat.shape == (self.height, self.width) and self == self.whole():
            return heat, self.seen()
        rows = _resample(self.height, self.top, self.bottom, heat.shape[0])
        columns = _resample(self.width, self.left, self.right, heat.shape[1])
        return (rows @ heat @ columns.T).astype(np.float32, copy=False), self.seen()

    def seen(self) -> NDArray[np.bool_]:
        """Return which pixels the model saw, if only in part: bool [height, width]."""
        return np.outer(
            _touched(self.height, self.top, self.bottom), _touched(self.width, self.left, self.right)
        )

    def whole(self) -> "Viewport":
        """Return the whole picture."""
        return Viewport(0, 0, self.width, self.height, self.width, self.height)

    def scaled(self, width: int, height: int) -> "Viewport":
        """Return the same part of the picture after it was resized to width x height."""
        x, y = width / self.width, height / self.height
        return Viewport(self.left * x, self.top * y, self.right * x, self.bottom * y, width, height)

    def to_pixel(self, row: float, column: float, shape: tuple[int, ...]) -> tuple[float, float]:
        """Return the point (x, y) of the picture, in pixels, at the centre of one cell of a map.

        Args:
            row: the cell's row, counted from 0; a fraction is a point between centres.
            column: the cell's column, likewise.
            shape: the map's [H, W].
        """
        return (
            self.left + (column + 0.5) / shape[1] * (self.right - self.left),
            self.top + (row + 0.5) / shape[0] * (self.bottom - self.top),
        )


def _touched(pixels: int, low: float, high: float) -> NDArray[np.bool_]:
    """Return which pixels of a line low..high touches, bool [pixels]."""
    edges = np.arange(pixels)
    touched: NDArray[np.bool_] = (edges + 1 > low + 1e-6) & (edges < high - 1e-6)
    return touched


def _resample(pixels: int, low: float, high: float, cells: int) -> NDArray[np.float32]:
    """Return the weights float32 [pixels, cells] that take a line of cells over low..high to pixels.

    Pixels that low..high does not touch have none.
    """
    pitch = cells / (high - low)
    at = np.clip((np.arange(pixels) + 0.5 - low) * pitch - 0.5, 0, cells - 1)
    weights = np.maximum(0, 1 - np.abs(at[:, None] - np.arange(cells)) / max(pitch, 1))
    weights *= (_touched(pixels, low, high) / weights.sum(axis=1))[:, None]
    return weights.astype(np.float32)


def check_facts(preprocess: Preprocess, needed: Sequence[str] | None = None) -> None:
    """See that all is known that `prepare` needs, or the facts named.

    Raises:
        OnnxcamError: names the missing facts and the options that give them.
    """
    unknown = [fact for fact in preprocess.missing() if needed is None or fact in needed]
    if unknown:
        options = dict.fromkeys(_OPTIONS.get(fact, f"--{fact}") for fact in unknown)
        raise OnnxcamError(
            f"the model does not say how a picture becomes its input: {', '.join(unknown)} unknown; "
            f"give {', '.join(options)}"
        )


def prepare(image: Image.Image, preprocess: Preprocess) -> tuple[NDArray[np.float32], Viewport]:
    """Resize, crop and normalise a picture into the model's input, as torchvision's transforms do.

    Args:
        image: an upright picture of any mode; `to_rgb` is applied unless it is ``RGB`` already.
        preprocess: the model's rule; see `Preprocess` for the meaning of its fields.

    Returns:
        The input, float32 [1, C, height, width] or [1, height, width, C] by `preprocess.layout`, and the
        part of the picture that it shows.

    Raises:
        OnnxcamError: a fact that is needed is missing from `preprocess`.
    """
    p = preprocess
    check_facts(p)
    assert p.height and p.width and p.scale is not None and p.mean and p.std
    image = image if image.mode == "RGB" else to_rgb(image)
    if p.color == "GRAY":
        image = image.convert("L")
    resized, view = _resize(image, p.width, p.height, p.shorter_edge, _FILTERS[p.interpolation])
    pixels = np.asarray(resized).reshape(p.height, p.width, p.channels)
    if p.color == "BGR":
        pixels = pixels[:, :, ::-1]
    shades = np.repeat(np.arange(256.0)[:, None], p.channels, axis=1)
    levels = ((shades * p.scale - p.mean) / p.std).astype(np.float32)
    values = np.empty((p.channels, p.height, p.width), np.float32)
    for c in range(p.channels):
        np.take(levels[:, c], pixels[:, :, c], out=values[c], mode="clip")  # the mode that needs no buffer
    return np.ascontiguousarray((values if p.layout == "NCHW" else values.transpose(1, 2, 0))[None]), view


def _resize(
    image: Image.Image, width: int, height: int, shorter_edge: int | None, resample: Image.Resampling
) -> tuple[Image.Image, Viewport]:
    """Resize to width x height; with a `shorter_edge`, crop that from the centre of a resized picture."""
    view = seen(image.size, width, height, shorter_edge)
    if shorter_edge is None:
        return image.resize((width, height), resample), view
    across, down, left, top = _crop(image.size, width, height, shorter_edge)
    if across * down <= _TWO_STEP_PIXELS:
        cropped = image.resize((across, down), resample).crop((left, top, left + width, top + height))
    else:  # a sliver, 1000 times as long as wide: one grey level off (bicubic: a few), no gigabytes
        cropped = image.resize((width, height), resample, box=(view.left, view.top, view.right, view.bottom))
    return cropped, view


def seen(size: tuple[int, int], width: int, height: int, shorter_edge: int | None) -> Viewport:
    """Return what a model of input width x height sees of a picture of a size (width, height)."""
    if shorter_edge is None:
        return Viewport(0, 0, *size, *size)
    across, down, left, top = _crop(size, width, height, shorter_edge)
    x, y = size[0] / across, size[1] / down
    return Viewport(left * x, top * y, (left + width) * x, (top + height) * y, *size)


def _crop(size: tuple[int, int], width: int, height: int, shorter_edge: int) -> tuple[int, int, int, int]:
    """Return the size to which a picture is resized and where in it the crop begins, (left, top)."""
    across, down = (int(shorter_edge * edge / min(size)) for edge in size)
    return across, down, round((across - width) / 2), round((down - height) / 2)
