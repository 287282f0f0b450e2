"""The picture itself as the model's input: what `onnxcam.image.prepare` does to it, as ONNX operators.

Resizing is a product with a matrix of weights on each side, computed from the picture's size in whole numbers
as far as they go. So it is Pillow's own resizing in every runtime, whatever that knows of antialiasing: along
the rows, rounded, then along the columns. (Pillow 13 begins with the columns where the height shrinks by more
than the width, so that a pixel's level may be the next one.)
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir import Value

from onnxcam.card import Preprocess
from onnxcam.emit import Emitter
from onnxcam.grid import PLANES

PICTURE = "cam_picture"
"""Name of the input: uint8 [N,H,W,3], RGB."""

_LUMA = np.array([19595, 38470, 7471], np.float32)
"""Weights of red, green and blue in Pillow's grey, in 65536ths; ITU-R BT.601."""

_FIXED_POINT = float(2**22)
"""Pillow's weights are whole multiples of one over this. A sum that is a half exactly is so here, too."""


@dataclasses.dataclass(frozen=True)
class Side:
    """How one side of the picture becomes one side of the model's input.

    Attributes:
        pixels: int64 scalar, of the picture.
        resized: int64 scalar, of the resized picture, before the crop.
        start: int64 scalar, where the crop begins in it.
        size: of the crop.
    """

    pixels: Value
    resized: Value
    start: Value
    size: int


@dataclasses.dataclass(frozen=True)
class Embedded:
    """A picture that the graph prepares.

    Attributes:
        picture: uint8 [N,H,W,3].
        facts: how it becomes the model's input; none is missing.
        rows, columns: how its sides do.
    """

    picture: Value
    facts: Preprocess
    rows: Side
    columns: Side

    @property
    def size(self) -> list[Any]:
        """The names of the picture's height and width."""
        assert self.picture.shape is not None
        return list(self.picture.shape)[1:3]

    @classmethod
    def add(cls, op: Emitter, original: Value, facts: Preprocess) -> "Embedded":
        """Put the input ``cam_picture`` in the place of the input `original`, which `feed` then computes."""
        assert original.shape is not None
        picture = Value(
            name=PICTURE,
            shape=ir.Shape([original.shape[0], "cam_height", "cam_width", 3]),
            type=ir.TensorType(ir.DataType.UINT8),
        )
        op.graph.inputs[list(op.graph.inputs).index(original)] = picture
        assert facts.height and facts.width
        with op.scope("picture"):
            height, width = (op.Squeeze(op.Shape(picture, start=axis, end=axis + 1), [0]) for axis in (1, 2))
            shorter = op.Min(height, width)
            rows, columns = (
                _side(op, pixels, shorter, size, facts.shorter_edge)
                for pixels, size in ((height, facts.height), (width, facts.width))
            )
        return cls(picture, facts, rows, columns)

    def feed(self, op: Emitter, original: Value) -> None:
        """Compute what was the input `original`, under its name, and let the model read that."""
        facts = self.facts
        assert facts.scale is not None and facts.mean and facts.std
        with op.scope("picture"):
            planes = op.Cast(op.Transpose(self.picture, perm=[0, 3, 1, 2]), to=ir.DataType.FLOAT)
            if facts.color == "GRAY":
                grey = op.ReduceSum(op.Mul(planes, _LUMA.reshape(3, 1, 1)), [1], keepdims=1)
                planes = op.Floor(op.Div(op.Add(grey, float(2**15)), float(2**16)))
            elif facts.color == "BGR":
                planes = op.Gather(planes, np.array([2, 1, 0]), axis=1)
            weigh = _FILTERS[facts.interpolation]
            columns = op.Transpose(_shrinking(op, self.columns, weigh), perm=[1, 0])
            planes = _whole(op, op.MatMul(planes, columns))
            planes = _whole(op, op.MatMul(_shrinking(op, self.rows, weigh), planes))
            scaled = op.Mul(planes, facts.scale)
            mean, std = (np.array(values, np.float32).reshape(-1, 1, 1) for values in (facts.mean, facts.std))
            x = op.Div(op.Sub(scaled, mean), std)
            if facts.layout != PLANES:
                x = op.Transpose(x, perm=[0, 2, 3, 1])
            prepared = op.Cast(x, to=original.dtype)
        original.replace_all_uses_with(prepared)
        prepared.name, original.name = original.name, None

    def spread(self, op: Emitter, heat: Value) -> Value:
        """Spread heat maps [N,K,h,w] over the picture: [N,K,H,W], 0 where the model saw nothing.

        The same as `onnxcam.image.Viewport.to_picture`.
        """
        with op.scope("picture"):
            rows, columns = _spreading(op, self.rows), op.Transpose(_spreading(op, self.columns), perm=[1, 0])
            return op.MatMul(op.MatMul(rows, heat), columns)

    def seen(self, op: Emitter) -> Value:
        """Return which pixels the model saw, if only in part: bool [H,W]."""
        with op.scope("picture"):
            return op.And(op.Unsqueeze(_seen(op, self.rows), [1]), _seen(op, self.columns))


def _side(op: Emitter, pixels: Value, shorter: Value, size: int, edge: int | None) -> Side:
    """Stretch a side to `size`, or make the shorter one `edge` long and crop `size` from the centre."""
    if edge is None:
        return Side(pixels, op.constant(np.array(size)), op.constant(np.array(0)), size)
    resized = op.Div(op.Mul(pixels, edge), shorter)
    # Half of the rest, and where that ends in one half, the even number next to it: Python's round.
    rest = op.Sub(resized, size)
    half = op.Div(rest, 2)
    return Side(pixels, resized, op.Add(half, op.Mul(op.Mod(rest, 2), op.Mod(half, 2))), size)


def _places(op: Emitter, count: "Value | int") -> Value:
    """The numbers 0 to count - 1, int64 [count]."""
    if isinstance(count, int):
        return op.constant(np.arange(count))
    return op.Range(np.int64(0), count, np.int64(1))


def _single(op: Emitter, number: Value) -> Value:
    return op.Cast(number, to=ir.DataType.FLOAT)


def _quotient(op: Emitter, above: Value, below: Value) -> tuple[Value, Value]:
    """Return the whole part of above / below, int64, and the rest of it, float32."""
    whole = op.Div(above, below)
    return whole, op.Div(_single(op, op.Sub(above, op.Mul(whole, below))), _single(op, below))


def _shrinking(op: Emitter, side: Side, weigh: "Callable[[Emitter, Value], Value] | None") -> Value:
    """Return the weights [size,pixels] with which the pixels make each pixel of the crop."""
    index = op.Add(op.Mul(op.Add(_places(op, side.size), side.start), 2), 1)
    whole, rest = _quotient(op, op.Mul(op.Unsqueeze(index, [1]), side.pixels), op.Mul(side.resized, 2))
    away = op.Sub(_places(op, side.pixels), whole)
    if weigh is None:
        return _single(op, op.Equal(away, 0))
    scale = op.Max(op.Div(_single(op, side.pixels), _single(op, side.resized)), 1.0)
    distance = op.Add(_single(op, away), op.Sub(0.5, rest))
    weights = weigh(op, op.Abs(op.Div(distance, scale)))
    weights = op.Div(weights, op.ReduceSum(weights, [1], keepdims=1))
    return op.Div(op.Round(op.Mul(weights, _FIXED_POINT)), _FIXED_POINT)


def _spreading(op: Emitter, side: Side) -> Value:
    """Return the weights [pixels,size] with which the cells of a map make each pixel of the picture."""
    middle = op.Add(op.Mul(_places(op, side.pixels), 2), 1)
    whole, rest = _quotient(op, op.Mul(middle, side.resized), op.Mul(side.pixels, 2))
    at = op.Add(_single(op, op.Sub(whole, side.start)), op.Sub(rest, 0.5))
    at = op.Unsqueeze(op.Min(op.Max(at, 0.0), float(side.size - 1)), [1])
    pitch = op.Max(op.Div(_single(op, side.resized), _single(op, side.pixels)), 1.0)
    cells = np.arange(side.size, dtype=np.float32)
    weights = op.Relu(op.Sub(1.0, op.Div(op.Abs(op.Sub(at, cells)), pitch)))
    weights = op.Div(weights, op.ReduceSum(weights, [1], keepdims=1))
    return op.Mul(weights, _single(op, op.Unsqueeze(_seen(op, side), [1])))


def _seen(op: Emitter, side: Side) -> Value:
    """Return which pixels lie in the crop, if only in part: bool [pixels]."""
    begins = op.Mul(_places(op, side.pixels), side.resized)
    ends = op.Add(begins, side.resized)
    low = op.Mul(side.start, side.pixels)
    high = op.Mul(op.Add(side.start, side.size), side.pixels)
    return op.And(op.Greater(ends, low), op.Less(begins, high))


def _whole(op: Emitter, pixels: Value) -> Value:
    """Round to the whole numbers 0 to 255, halves up."""
    return op.Clip(op.Floor(op.Add(pixels, 0.5)), 0.0, 255.0)


def _bilinear(op: Emitter, x: Value) -> Value:
    return op.Relu(op.Sub(1.0, x))


def _bicubic(op: Emitter, x: Value) -> Value:
    """Keys 1981 with a = -1/2, at x >= 0."""
    near = op.Add(op.Mul(op.Mul(x, x), op.Sub(op.Mul(x, 1.5), 2.5)), 1.0)
    far = op.Mul(op.Sub(op.Mul(op.Add(op.Mul(op.Sub(x, 5.0), x), 8.0), x), 4.0), -0.5)
    return op.Where(op.Less(x, 1.0), near, op.Where(op.Less(x, 2.0), far, 0.0))


def _lanczos(op: Emitter, x: Value) -> Value:
    """sinc(x) sinc(x/3) up to 3, at x >= 0."""
    angle = op.Mul(x, np.pi)
    product = op.Mul(op.Sin(angle), op.Sin(op.Div(angle, 3.0)))
    square = op.Div(op.Mul(angle, angle), 3.0)
    tiny = op.Less(square, 1e-6)
    value = op.Where(tiny, 1.0, op.Div(product, op.Where(tiny, 1.0, square)))
    return op.Where(op.Less(x, 3.0), value, 0.0)


_FILTERS: "dict[str, Callable[[Emitter, Value], Value] | None]" = {
    "nearest": None,
    "bilinear": _bilinear,
    "bicubic": _bicubic,
    "lanczos": _lanczos,
}
"""The weight of a pixel at a distance, by `onnxcam.card.INTERPOLATIONS`; None: only the nearest counts."""
