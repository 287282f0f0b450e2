"""Maps as pictures: a colour map, a map laid over its photo, a panel of several, and PNG files."""

import contextlib
import functools
import os
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from onnxcam.errors import OnnxcamError

# The colour map's corners as (lightness, chroma, hue in degrees) in OKLCh, from 0 to 1.
_CORNERS = (
    (0.32, 0.14, 270),  # dark blue
    (0.46, 0.17, 260),
    (0.60, 0.14, 240),
    (0.69, 0.12, 215),
    (0.75, 0.13, 180),
    (0.80, 0.17, 152),  # green
    (0.86, 0.19, 128),
    (0.90, 0.18, 108),  # yellow
    (0.86, 0.17, 86),
    (0.75, 0.18, 58),
    (0.60, 0.22, 30),  # red
)


@functools.cache
def _table() -> NDArray[np.uint8]:
    """Return the colour map, uint8 [256, 3]: equal steps of colour difference in OKLab.

    Björn Ottosson, "A perceptual color space for image processing", 2020; sRGB by IEC 61966-2-1.
    """
    lightness, chroma, hue = np.array(_CORNERS).T
    lab = np.stack([lightness, chroma * np.cos(np.deg2rad(hue)), chroma * np.sin(np.deg2rad(hue))])
    steps = np.linalg.norm(np.diff(lab), axis=0)
    at = np.concatenate([[0], steps.cumsum() / steps.sum()])
    lab = np.stack([np.interp(np.linspace(0, 1, 256), at, channel) for channel in lab])
    to_cone = [
        [1, 0.3963377774, 0.2158037573],
        [1, -0.1055613458, -0.0638541728],
        [1, -0.0894841775, -1.2914855480],
    ]
    to_linear = [
        [4.0767416621, -3.3077115913, 0.2309699292],
        [-1.2684380046, 2.6097574011, -0.3413193965],
        [-0.0041960863, -0.7034186147, 1.7076147010],
    ]
    linear = np.clip(to_linear @ (to_cone @ lab) ** 3, 0, 1)
    srgb = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    table: NDArray[np.uint8] = np.rint(255 * srgb.T).astype(np.uint8)
    return table


def colorize(heat: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Colour a map: 0 is dark blue, then green and yellow, 1 is red.

    Args:
        heat: float [...], of any shape; clipped to 0..1, and values that are not finite count as 0.

    Returns:
        uint8 [..., 3], RGB.
    """
    return np.take(_table(), _levels(heat), axis=0)


def _levels(heat: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Return `heat` clipped to 0..1 in steps of 1/255, with 0 for what is not finite."""
    scaled = heat * np.float32(255)
    np.clip(np.rint(scaled, out=scaled), 0, 255, out=scaled)
    scaled[~np.isfinite(heat)] = 0
    return scaled.astype(np.uint8)


OPACITY = 0.7
"""Of the map where it is 1, unless asked otherwise: the least at which red reads as red on any photo."""


def overlay(
    image: Image.Image,
    heat: NDArray[np.float32],
    mask: NDArray[np.bool_] | None = None,
    opacity: float = OPACITY,
) -> Image.Image:
    """Lay a coloured map over a photo.

    Cool regions are more transparent (0.4 of `opacity` where the map is 0), so the photo stays visible;
    its own colours are muted by `opacity`, so that a red thing in it is not taken for a hot one.

    Args:
        image: the photo, W x H pixels.
        heat: float [H, W], 0 to 1; see `colorize`.
        mask: bool [H, W], False where the model did not see the photo: grey and pale there, and no map.
        opacity: of the map where it is 1, from 0 (photo only) to 1 (map only).

    Returns:
        A new picture of mode ``RGB`` and of the photo's size.

    Raises:
        OnnxcamError: `heat` or `mask` has not the photo's size, or `opacity` is not in 0..1.
    """
    size = image.height, image.width
    for name, array in (("heat map", heat), ("mask", mask)):
        if array is not None and array.shape != size:
            raise OnnxcamError(f"the {name} has shape {array.shape}; the photo needs {size}")
    if not 0 <= opacity <= 1:
        raise OnnxcamError(f"opacity is {opacity}; it must be between 0 and 1")
    photo = image if image.mode == "RGB" else image.convert("RGB")
    level = Image.fromarray(_levels(heat))
    alpha = level.point([round(255 * opacity * (0.4 + 0.6 * step / 255)) for step in range(256)])
    level.putpalette(_table().tobytes())
    luma = np.append(np.array([0.299, 0.587, 0.114]) * opacity, 0)
    over = photo.convert("RGB", tuple((luma + (1 - opacity) * np.eye(3, 4)).flat))
    over.paste(level.convert("RGB"), mask=alpha)
    if mask is None or mask.all():
        return over
    unseen = photo.convert("L").point([round(0.55 * grey + 0.45 * 255) for grey in range(256)]).convert("RGB")
    return Image.composite(over, unseen, Image.fromarray(mask.astype(np.uint8) * 255))


class Column(NamedTuple):
    """One explained class in a panel.

    Attributes:
        picture: the map over the photo, as `overlay` makes it.
        label: the name of the class.
        score: its probability, 0 to 1, or None.
        note: a remark beneath, such as ``flat map``.
    """

    picture: Image.Image
    label: str
    score: float | None = None
    note: str = ""


_INK, _GREY, _FAINT = (28, 30, 34), (104, 108, 116), (222, 224, 228)
PANEL = 420, 480
"""Width and height in pixels that no picture in a panel exceeds."""
_NARROW = 240  # least width of a column
_MARGIN, _GAP, _PER_ROW = 32, 24, 4
_Line = tuple[str, int, tuple[int, int, int]]  # text, size in pixels, colour


def panel(image: Image.Image, columns: Sequence[Column], title: str = "") -> Image.Image:
    """Compose one picture to look at: the photo, each class's map with label and score, a colour bar.

    Pictures are scaled to fit 420 x 480 pixels, enlarged at most twice; four stand in a row. Pillow's
    built-in font draws ASCII only: accents are dropped, letters of other scripts become boxes.

    Args:
        image: the photo.
        columns: the classes, best first.
        title: a line above; empty for none.

    Returns:
        A new picture of mode ``RGB`` on white.
    """
    scale = min(PANEL[0] / image.width, PANEL[1] / image.height, 2)
    width, height = (max(1, round(edge * scale)) for edge in image.size)
    column = max(width, _NARROW)
    captions: list[list[_Line]] = [[], *(_caption(cell, column) for cell in columns)]
    depth = max(_leading(26), *(sum(_leading(size) for _, size, _ in lines) for lines in captions))
    pitch = height + 12 + depth + _GAP
    top = _MARGIN + (48 if title else 0)
    across, down = min(len(captions), _PER_ROW), -(-len(captions) // _PER_ROW)
    right = _MARGIN + across * (column + _GAP) - _GAP
    sheet = Image.new("RGB", (right + _MARGIN, top + down * pitch - _GAP + _MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    if title:
        draw.text((_MARGIN, _MARGIN - 4), "".join(_fit(title, 26, right - _MARGIN, 1)), _INK, _font(26))
    for index, picture in enumerate([image, *(cell.picture for cell in columns)]):
        x, y = _MARGIN + index % _PER_ROW * (column + _GAP), top + index // _PER_ROW * pitch
        sheet.paste(picture.convert("RGB").resize((width, height), Image.Resampling.LANCZOS), (x, y))
        draw.rectangle((x - 1, y - 1, x + width, y + height), outline=_FAINT)
        y += height + 12
        for text, size, ink in captions[index]:
            draw.text((x, y), text, ink, _font(size))
            y += _leading(size)
    _color_bar(sheet, _MARGIN, top + height + 12, column)
    return sheet


def _caption(cell: Column, width: int) -> list[_Line]:
    """Return the lines beneath a map: its label, then score and note."""
    facts = [] if cell.score is None else [_percent(cell.score)]
    facts += [cell.note] if cell.note else []
    lines: list[_Line] = [(text, 20, _INK) for text in _fit(cell.label, 20, width, 2)]
    return lines + [(text, 16, _GREY) for text in _fit(" · ".join(facts), 16, width, 2)]


def _percent(score: float) -> str:
    """Return a probability as a person reads it, never rounded to none or to certainty."""
    if 0 < score < 0.0005:
        return "< 0.1 %"
    return "> 99.9 %" if 0.9995 <= score < 1 else f"{100 * score:.1f} %"


def _color_bar(sheet: Image.Image, left: int, top: int, width: int) -> None:
    """Draw the colour map as a bar with its ends named, `width` pixels in all."""
    draw, font = ImageDraw.Draw(sheet), _font(16)
    start, stop = left + round(font.getlength("low")) + 10, left + width - round(font.getlength("high")) - 10
    stop = min(stop, start + 220)
    bar = colorize(np.tile(np.linspace(0, 1, stop - start, dtype=np.float32), (12, 1)))
    sheet.paste(Image.fromarray(bar), (start, top + 5))
    draw.text((left, top), "low", _GREY, font)
    draw.text((stop + 10, top), "high", _GREY, font)


def _fit(text: str, size: int, width: int, most: int) -> list[str]:
    """Break `text` into at most `most` lines of `width` pixels; an ellipsis stands for what is left over."""
    letters = unicodedata.normalize("NFKD", " ".join(text.split()))
    drawable = "".join(c for c in letters if c.isprintable() and not unicodedata.combining(c))
    length = _font(size).getlength
    lines: list[str] = []
    for word in drawable[:300].split():
        if lines and length(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    lines[most - 1 :] = [" ".join(lines[most - 1 :])] if len(lines) >= most else []
    for index, line in enumerate(lines):
        while length(lines[index]) > width:
            line = line[:-1]
            lines[index] = f"{line.rstrip()}…"
    return lines


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Return Pillow's built-in font at `size` pixels."""
    return ImageFont.load_default(size)


def _leading(size: int) -> int:
    """Return the distance in pixels between lines of text of this size."""
    return round(1.35 * size)


def save_png(image: Image.Image, path: str | os.PathLike[str]) -> None:
    """Write `image` to `path` as a PNG, whole or not at all.

    It is written beside `path` under a temporary name first, which then replaces `path`.

    Raises:
        OnnxcamError: the folder does not exist or cannot be written, or the disk is full.
    """
    path = Path(path)
    temporary = path.parent / f".{os.urandom(8).hex()}.tmp"
    try:
        with temporary.open("xb") as file:
            image.save(file, "PNG", compress_level=1)
        temporary.replace(path)
    except OSError as error:
        raise OnnxcamError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):  # gone already, unless something went wrong
            temporary.unlink()
