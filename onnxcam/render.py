"""Maps as pictures: a colour map, a map laid over its photo, a panel of several, and PNG files."""

import functools
import math
import os
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from onnxcam.errors import OnnxcamError
from onnxcam.files import replacing

# Corners of the colour maps as (lightness, chroma, hue in degrees) in OKLCh.
_CORNERS = (  # from 0 to 1
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
_SIDES = (  # from 0 to -1 and from 0 to 1, equally light; towards 0 they fade out
    ((0.70, 0.14, 245), (0.47, 0.21, 263)),  # light to dark blue
    ((0.70, 0.17, 38), (0.47, 0.19, 28)),  # light to dark red
)


@functools.cache
def color_table(signed: bool) -> NDArray[np.uint8]:
    """Return a colour map, uint8 [256, 3] from 0 to 1, or [255, 3] from -1 to 1."""
    if not signed:
        return _ramp(_CORNERS, 256)
    against, for_ = (_ramp(corners, 128) for corners in _SIDES)
    return np.concatenate([against[:0:-1], for_])


def _ramp(corners: Sequence[tuple[float, float, float]], count: int) -> NDArray[np.uint8]:
    """Return colours uint8 [count, 3] from corner to corner: equal steps of colour difference in OKLab.

    Björn Ottosson, "A perceptual color space for image processing", 2020; sRGB by IEC 61966-2-1.
    """
    lightness, chroma, hue = np.array(corners).T
    lab = np.stack([lightness, chroma * np.cos(np.deg2rad(hue)), chroma * np.sin(np.deg2rad(hue))])
    steps = np.linalg.norm(np.diff(lab), axis=0)
    at = np.concatenate([[0], steps.cumsum() / steps.sum()])
    lab = np.stack([np.interp(np.linspace(0, 1, count), at, channel) for channel in lab])
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


def colorize(heat: NDArray[np.float32], signed: bool = False) -> NDArray[np.uint8]:
    """Colour a map: 0 is dark blue, then green and yellow, 1 is red.

    Args:
        heat: float [...], of any shape; clipped to 0..1, and values that are not finite count as 0.
        signed: from -1 to 1 instead: below 0 blue and above 0 red, the farther from it the darker.

    Returns:
        uint8 [..., 3], RGB.
    """
    return np.take(color_table(signed), _levels(heat, signed), axis=0)


def _levels(heat: NDArray[np.float32], signed: bool) -> NDArray[np.uint8]:
    """Return the place of each value in the colour map; what is not finite counts as 0."""
    scaled = np.where(np.isfinite(heat), heat, np.float32(0))
    scaled = (np.clip(scaled, -1, 1) + 1) * 127 if signed else np.clip(scaled, 0, 1) * 255
    return np.rint(scaled).astype(np.uint8)


@functools.cache
def strengths(signed: bool) -> NDArray[np.float64]:
    """Return the opacity of each colour of the map, of which the highest is 1; on both sides of 0 it is 0."""
    if signed:
        return 1 - (1 - np.abs(np.linspace(-1, 1, 255))) ** 2
    return np.linspace(0.4, 1, 256)


def muting(opacity: float, signed: bool) -> NDArray[np.float64]:
    """Return the matrix [3,3] from the photo's colours to the muted ones beneath a map: grey, at the most."""
    mute = min(2 * opacity, 1) if signed else opacity
    return mute * LUMA + (1 - mute) * np.eye(3)


LUMA = np.array([0.299, 0.587, 0.114])
"""Weights of red, green and blue in grey; ITU-R BT.601."""

PALE = 0.55
"""Of its darkness, what is left of the grey photo where the model did not see it."""

AGAINST = ("against", "both", "counterfactual")
"""The kinds of evidence that speak against the class, at least in part."""

OPACITY = 0.7
"""Of the map where it is 1, unless asked otherwise: the least at which red reads as red on any photo."""


def overlay(
    image: Image.Image,
    heat: NDArray[np.float32],
    mask: NDArray[np.bool_] | None = None,
    opacity: float = OPACITY,
    evidence: str | None = None,
) -> Image.Image:
    """Lay a coloured map over a photo.

    Cool regions are more transparent (0.4 of `opacity` where the map is 0), so the photo stays visible;
    its own colours are muted by `opacity`, so that a red thing in it is not taken for a hot one.

    Evidence against the class is blue and evidence for it red; both fade out towards 0, where the photo
    alone is left. It is grey then, as at half the usual opacity already.

    Args:
        image: the photo, W x H pixels.
        heat: float [H, W], 0 to 1, or -1 to 1 for evidence against the class; see `colorize`.
        mask: bool [H, W], False where the model did not see the photo: grey and pale there, and no map.
        opacity: of the map where it is 1 or -1, from 0 (photo only) to 1 (map only).
        evidence: what the map shows, of ``onnxcam.card.EVIDENCE``. A ``counterfactual`` map, 0 to 1, speaks
            against the class and is drawn as if below zero.

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
    signed = evidence in AGAINST
    level = Image.fromarray(_levels(-heat if evidence == "counterfactual" else heat, signed))
    opacities = np.resize(opacity * strengths(signed), 256)  # as many as a byte has values
    alpha = level.point([round(255 * each) for each in opacities])
    level.putpalette(color_table(signed).tobytes())
    over = photo.convert("RGB", tuple(np.pad(muting(opacity, signed), ((0, 0), (0, 1))).flat))
    over.paste(level.convert("RGB"), mask=alpha)
    if mask is None or mask.all():
        return over
    unseen = photo.convert("L").point([round(PALE * grey + (1 - PALE) * 255) for grey in range(256)])
    return Image.composite(over, unseen.convert("RGB"), Image.fromarray(mask.astype(np.uint8) * 255))


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


def panel(
    image: Image.Image, columns: Sequence[Column], title: str = "", evidence: str | None = None
) -> Image.Image:
    """Compose one picture to look at: the photo, each class's map with label and score, a colour bar.

    Pictures are scaled to fit 420 x 480 pixels, enlarged at most twice; four stand in a row. Pillow's
    built-in font draws ASCII only: accents are dropped, letters of other scripts become boxes.

    Args:
        image: the photo.
        columns: the classes, best first.
        title: a line above; empty for none.
        evidence: what the maps show, see `overlay`.

    Returns:
        A new picture of mode ``RGB`` on white.
    """
    scale = min(PANEL[0] / image.width, PANEL[1] / image.height, 2)
    width, height = (max(1, round(edge * scale)) for edge in image.size)
    column = max(width, _NARROW)
    captions: list[list[_Line]] = [[], *(_caption(cell, column) for cell in columns)]
    depth = max(_leading(26), *map(_depth, captions))
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
        _frame(sheet, picture, x, y, width, height)
        _write(draw, x, y + height + 12, captions[index])
    _color_bar(sheet, _MARGIN, top + height + 12, column, evidence)
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


_BARS = {
    "against": (-1, 0, "against", "nothing"),
    "counterfactual": (-1, 0, "against", "nothing"),
    "both": (-1, 1, "against", "for"),
}
"""By evidence: the ends of the colour bar and their names."""


def _color_bar(sheet: Image.Image, left: int, top: int, width: int, evidence: str | None) -> None:
    """Draw the colour map as a bar with its ends named, `width` pixels in all."""
    draw, font = ImageDraw.Draw(sheet), _font(16)
    low, high, first, last = _BARS.get(evidence or "", (0, 1, "low", "high"))
    start, stop = left + round(font.getlength(first)) + 10, left + width - round(font.getlength(last)) - 10
    stop = min(stop, start + 220)
    bar = np.linspace(low, high, stop - start, dtype=np.float32)[None].repeat(12, axis=0)
    colors = colorize(bar, low < 0).astype(np.float64)
    if low < 0:
        colors += (255 - colors) * (1 - strengths(True)[_levels(bar, True), None])  # on the white sheet
    sheet.paste(Image.fromarray(np.rint(colors).astype(np.uint8)), (start, top + 5))
    draw.text((left, top), first, _GREY, font)
    draw.text((stop + 10, top), last, _GREY, font)


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


SMALLER = 300, 340
"""Width and height in pixels that no picture in a comparison exceeds."""
_ROW_HEAD = 220  # width in pixels of the names of rows


class Row(NamedTuple):
    """One method in a comparison.

    Attributes:
        name: of the method.
        facts: further lines about it.
        columns: its maps, one for each class; empty if there is none.
        reason: why there is none.
    """

    name: str
    facts: Sequence[str]
    columns: Sequence[Column]
    reason: str = ""


def comparison(
    image: Image.Image, rows: Sequence[Row], title: str, evidence: str | None = None
) -> Image.Image:
    """Compose one picture with a row for each method and a column for the photo and each class.

    Pictures are scaled to fit 300 x 340 pixels, enlarged at most twice.

    Args:
        image: the photo.
        rows: the methods, of which at least one has maps.
        title: a line above.
        evidence: what the maps show, see `overlay`.

    Returns:
        A new picture of mode ``RGB`` on white.
    """
    scale = min(SMALLER[0] / image.width, SMALLER[1] / image.height, 2)
    width, height = (max(1, round(edge * scale)) for edge in image.size)
    column = max(width, _NARROW)
    first = next(row.columns for row in rows if row.columns)
    heads: list[list[_Line]] = [_caption(cell._replace(note=""), column) for cell in first]
    left = _MARGIN + _ROW_HEAD + _GAP
    right = left + (1 + len(heads)) * (column + _GAP) - _GAP
    sides = [
        [(text, 20, _INK) for text in _fit(row.name, 20, _ROW_HEAD, 2)]
        + [(text, 16, _GREY) for fact in row.facts for text in _fit(fact, 16, _ROW_HEAD, 2)]
        for row in rows
    ]
    bodies = [_beneath(row, column, right - left) for row in rows]
    depths = [
        max(_depth(side), *map(_depth, lines))
        if row.reason
        else max(_depth(side), height + 8 + max(map(_depth, lines)))
        for row, side, lines in zip(rows, sides, bodies, strict=True)
    ]
    top = _MARGIN + 48 + max(map(_depth, heads)) + 8  # of the first row
    sheet = Image.new(
        "RGB", (right + _MARGIN, top + sum(depths) + len(rows) * _GAP - _GAP + _MARGIN), "white"
    )
    draw = ImageDraw.Draw(sheet)
    draw.text((_MARGIN, _MARGIN - 4), "".join(_fit(title, 26, right - _MARGIN, 1)), _INK, _font(26))
    _color_bar(sheet, _MARGIN, _MARGIN + 48, _ROW_HEAD, evidence)
    for k, head in enumerate(heads, 1):
        _write(draw, left + k * (column + _GAP), top - 8 - _depth(head), head)
    for row, side, lines, depth in zip(rows, sides, bodies, depths, strict=True):
        _write(draw, _MARGIN, top, side)
        cells = [] if row.reason else [image, *(cell.picture for cell in row.columns)]
        for k, cell in enumerate(cells):
            _frame(sheet, cell, left + k * (column + _GAP), top, width, height)
        for k, text in enumerate(lines):
            _write(draw, left + k * (column + _GAP), top + (height + 8 if cells else 0), text)
        top += depth + _GAP
    return sheet


def _beneath(row: Row, column: int, whole: int) -> list[list[_Line]]:
    """Return the lines beneath the photo and each map of a row, or the reason in the place of all."""
    if row.reason:
        return [[(text, 16, _GREY) for text in _fit(row.reason, 16, whole, 4)]]
    return [[], *([(text, 16, _GREY) for text in _fit(cell.note, 16, column, 2)] for cell in row.columns)]


def _depth(lines: Sequence[_Line]) -> int:
    return sum(_leading(size) for _, size, _ in lines)


def _write(draw: ImageDraw.ImageDraw, x: int, y: int, lines: Sequence[_Line]) -> None:
    for text, size, ink in lines:
        draw.text((x, y), text, ink, _font(size))
        y += _leading(size)


def _frame(sheet: Image.Image, picture: Image.Image, x: int, y: int, width: int, height: int) -> None:
    """Paste a picture at width x height with a thin frame around it."""
    sheet.paste(picture.convert("RGB").resize((width, height), Image.Resampling.LANCZOS), (x, y))
    ImageDraw.Draw(sheet).rectangle((x - 1, y - 1, x + width, y + height), outline=_FAINT)


_SHEET = 1200  # width in pixels that a grid is drawn to
_CELL = 96  # that one cell of it does not exceed


def grid(cells: NDArray[np.uint8], title: str, legend: str) -> Image.Image:
    """Compose a grid of small pictures, row by row, numbered from 0 along the left and the top.

    Each pixel of a cell becomes a square of whole pixels.

    Args:
        cells: uint8 [n,h,w,3], RGB.
        title: a line above.
        legend: what the colours mean, beneath it.

    Returns:
        A new picture of mode ``RGB`` on white.
    """
    count, height, width = cells.shape[:3]
    across = min(count, math.ceil(math.sqrt(1.5 * count * height / width)))
    down = -(-count // across)
    factor = max(1, min(_SHEET // (across * width), _CELL // max(height, width)))
    pitch_x, pitch_y = factor * width + 2, factor * height + 2
    font, leading = _font(14), _leading(14)
    gutter = round(font.getlength(str(count - 1))) + 8
    left, top = _MARGIN + gutter, _MARGIN + _leading(26) + _leading(16) + 12 + leading
    right = max(left + across * pitch_x, _MARGIN + 640)
    sheet = Image.new("RGB", (right + _MARGIN, top + down * pitch_y + _MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((_MARGIN, _MARGIN - 4), "".join(_fit(title, 26, right - _MARGIN, 1)), _INK, _font(26))
    below = _MARGIN + _leading(26)
    draw.text((_MARGIN, below), "".join(_fit(legend, 16, right - _MARGIN, 1)), _GREY, _font(16))
    for column in range(0, across, -(-gutter // pitch_x)):
        draw.text((left + column * pitch_x, top - leading), str(column), _GREY, font)
    for row in range(0, down, -(-leading // pitch_y)):
        draw.text((_MARGIN, top + row * pitch_y), str(row * across), _GREY, font)
    for index, cell in enumerate(cells.repeat(factor, axis=1).repeat(factor, axis=2)):
        place = left + index % across * pitch_x, top + index // across * pitch_y
        sheet.paste(Image.fromarray(cell), place)
    return sheet


def save_png(image: Image.Image, path: str | os.PathLike[str]) -> None:
    """Write `image` to `path` as a PNG, whole or not at all.

    Raises:
        OnnxcamError: the folder does not exist or cannot be written, or the disk is full.
    """
    with replacing(path) as file:
        image.save(file, "PNG", compress_level=1)
