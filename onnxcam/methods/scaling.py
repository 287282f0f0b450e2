"""Maps at the size of the picture, and scaled to be shown."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from onnx_ir import Value

from onnxcam.emit import Emitter
from onnxcam.methods.algebra import known_sizes

Size: TypeAlias = "list[int] | Value"
"""Height and width: numbers, or an int64 value [2]."""

_Places: TypeAlias = "tuple[int, NDArray[np.floating]]"
"""How many values a side has, and places along it, counted from the first value."""


_ROUNDING = 2.0**-18
"""A map that varies by less, relative to its size, may be a flat one that was interpolated."""


def resized(
    op: Emitter, maps: Value, size: Size, mode: str = "linear", centres: str = "half_pixel", **options: Any
) -> Value:
    """Resize maps [N,K,h,w] to a size; `centres` is the coordinate transformation, `options` are Resize's.

    A small map is multiplied by a matrix on each side, which takes onnxruntime half the time of a Resize.
    """
    plane = _enlarged(maps, size) if (mode, centres) == ("linear", "half_pixel") else None
    if plane:
        return _spread(op, maps, [(side[0], _centres(*side)) for side in plane])
    outer = [] if maps.shape is None else list(maps.shape)[:2]
    axes: list[int] | None = [2, 3]
    known = [d for d in outer if isinstance(d, int)]
    if isinstance(size, list) and len(known) == 2:
        size, axes = [*known, *size], None  # OpenCV 5 takes sizes of all axes only
    return op.Resize(
        maps,
        None,
        None,
        size,
        axes=axes,
        mode=mode,
        coordinate_transformation_mode=centres,
        **options,
    )


def heatmap(op: Emitter, maps: Value, size: Size, signed: bool = False) -> Value:
    """Resize maps to the picture (bilinear, half-pixel centres) and scale each to [0,1].

    A map that is flat but for rounding, has nothing above zero or has a value that is not finite becomes
    all zeros. Of a small map a few pixels are scaled, and the others interpolated: between the centres of
    four cells the resized map is bilinear, so that its first and last pixels there are its extremes and
    give the rest.

    Args:
        op: where the nodes go.
        maps: float32 [N,K,h,w].
        size: height and width of the picture.
        signed: divide by the largest absolute value instead, to [-1,1]: zero stays zero. Then a map of
            nothing above zero is as good as any.

    Returns:
        float32 [N,K,H,W].
    """
    plane = _enlarged(maps, size)
    if plane is None:
        # A value that is not finite makes all of them so, as the products do by themselves.
        spoilt = op.ReduceSum(op.Mul(maps, 0.0), [2, 3])
        return _shown(op, op.Add(resized(op, maps, size), spoilt), signed)
    ends = [_ends(*side) for side in plane]
    few = [(cells, _centres(cells, pixels)[at]) for (cells, pixels), at in zip(plane, ends, strict=True)]
    rest = [
        (len(at), np.interp(np.arange(pixels), at, np.arange(len(at))))
        for (_, pixels), at in zip(plane, ends, strict=True)
    ]
    return _spread(op, _shown(op, _spread(op, maps, few), signed), rest)


def _shown(op: Emitter, maps: Value, signed: bool) -> Value:
    """Scale maps [N,K,h,w]; those that say nothing become zero. None or all values of each are finite."""
    largest, least = float(np.finfo(np.float32).max), float(np.finfo(np.float32).tiny)
    low, high = op.ReduceMin(maps, [2, 3]), op.ReduceMax(maps, [2, 3])
    span = op.Sub(high, low)
    if signed:
        size = op.Max(high, op.Neg(low))
        varies, scaled = op.Greater(span, op.Mul(size, _ROUNDING)), op.Div(maps, op.Max(size, least))
    else:
        varies = op.Greater(high, op.Max(op.Mul(low, 1 + _ROUNDING), least))
        scaled = op.Div(op.Sub(maps, low), op.Max(span, least))
    return op.Where(op.And(varies, op.LessOrEqual(span, largest)), scaled, 0.0)


def unit(op: Emitter, maps: Value, axes: Sequence[int] = (2, 3)) -> Value:
    """Scale each map [N,K,h,w] to [0,1] by its minimum and maximum over `axes`; a flat one becomes zero.

    One whose span is no normal number, in float32 below 1.2e-38, is scaled less.
    """
    low = op.ReduceMin(maps, list(axes), keepdims=1)
    span = op.Sub(op.ReduceMax(maps, list(axes), keepdims=1), low)
    assert maps.dtype is not None
    return op.Div(op.Sub(maps, low), op.Max(span, float(np.finfo(maps.dtype.numpy()).tiny)))


def over_largest(op: Emitter, maps: Value) -> Value:
    """Divide each map [N,K,h,w] by its largest absolute value, to [-1,1]; one of zeros stays so."""
    largest = op.ReduceMax(op.Abs(maps), [2, 3])
    return op.Div(maps, op.Where(op.Greater(largest, 0.0), largest, 1.0))


def scaled(op: Emitter, maps: Value, epsilon: float, axes: Sequence[int] = (2, 3)) -> Value:
    """Take each map's minimum over `axes` from it and divide by what is then the maximum plus `epsilon`."""
    above = op.Sub(maps, op.ReduceMin(maps, list(axes), keepdims=1))
    return op.Div(above, op.Add(op.ReduceMax(above, list(axes), keepdims=1), epsilon))


def _enlarged(maps: Value, size: Size) -> "list[tuple[int, int]] | None":
    """Cells and pixels of both sides, where `maps` are resized to at least four times their size."""
    plane = known_sizes(maps, 2)
    if not plane or not isinstance(size, list):
        return None
    sides = list(zip(plane, size, strict=True))
    return sides if all(4 * cells <= pixels for cells, pixels in sides) else None


def _spread(op: Emitter, maps: Value, places: Sequence[_Places]) -> Value:
    """Interpolate maps [N,K,h,w] linearly at places along both sides."""
    rows, columns = (_between(op, count, at, maps) for count, at in places)
    return op.MatMul(op.MatMul(rows, maps), op.Transpose(columns, perm=[1, 0]))


def _between(op: Emitter, count: int, at: "NDArray[np.floating]", like: Value) -> Value:
    """The weights [places,count] of linear interpolation between a number of values.

    They have the dtype of `like` and are computed in the graph, from a number for each place, so that they
    take no room in the file. Each place's add up to 1 exactly.
    """
    assert like.dtype is not None
    places, values = (array.astype(like.dtype.numpy()) for array in (at[:, None], np.arange(count)))
    return op.Relu(op.Sub(1.0, op.Abs(op.Sub(op.constant(places), values))))


def _centres(cells: int, pixels: int) -> "NDArray[np.floating]":
    """Where the pixels' centres are, counted in cells from the centre of the first."""
    return np.clip((np.arange(pixels) + 0.5) * cells / pixels - 0.5, 0, cells - 1)


def _ends(cells: int, pixels: int) -> "NDArray[np.integer]":
    """The first and last pixel between any two centres of neighbouring cells, and beyond the outermost."""
    changes = np.flatnonzero(np.diff(np.floor((np.arange(pixels) + 0.5) * cells / pixels - 0.5)))
    return np.unique([0, *changes, *(changes + 1), pixels - 1])
