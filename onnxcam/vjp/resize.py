"""Resampling: Resize, and GridSample with its grids."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from onnx_ir import DataType, Value

from onnxcam.emit import Emitter
from onnxcam.errors import OnnxcamError
from onnxcam.vjp.registry import vjp
from onnxcam.vjp.shapes import (
    constant_array,
    dims,
    extent,
    is_constant,
    joined,
    positions,
    rank,
    reshape_like,
    scatter_add,
    zeros_like,
)


@vjp("Resize")
def resize(
    op: Emitter,
    dy: Value,
    y: Value,
    x: Value,
    roi: Value | None = None,
    scales: Value | None = None,
    sizes: Value | None = None,
    *,
    antialias: int = 0,
    axes: list[int] | None = None,
    coordinate_transformation_mode: str = "half_pixel",
    cubic_coeff_a: float = -0.75,
    exclude_outside: int = 0,
    extrapolation_value: float = 0.0,
    keep_aspect_ratio_policy: str = "stretch",
    mode: str = "nearest",
    nearest_mode: str = "round_prefer_floor",
) -> Value:
    """Multiply by one matrix along each axis that is resized.

    The runtime gives the matrices itself, by resizing an identity matrix: it then differentiates what it
    computed, and runtimes do differ (in the size that a scale comes to, in align_corners, in the crop).
    """
    if axes is None:
        axes = list(range(rank(x)))
    crop = coordinate_transformation_mode == "tf_crop_and_resize"
    together = sizes is not None and len(axes) > 1 and keep_aspect_ratio_policy != "stretch"
    if crop and together:
        raise OnnxcamError(
            f"Resize with tf_crop_and_resize and keep_aspect_ratio_policy {keep_aspect_ratio_policy} "
            "has no gradient rule"
        )
    how = {
        "antialias": antialias,
        "coordinate_transformation_mode": coordinate_transformation_mode,
        "cubic_coeff_a": cubic_coeff_a,
        "exclude_outside": exclude_outside,
        "mode": mode,
        "nearest_mode": nearest_mode,
    }
    for i, axis in enumerate(axes):
        at = axis % rank(x)
        if not crop and not together and _is_unchanged(x, y, scales, sizes, i, at):
            continue
        size = extent(op, x, at)
        # A picture of one line for each element along the axis, with a 1 there.
        places = positions(op, x, at)
        impulses = op.Unsqueeze(op.CastLike(op.Equal(op.Unsqueeze(places, [1]), places), dy), [1, 2])
        if together:
            # The scale is that of the axes together, so the others are there too, all their lines alike.
            others = [j for j in range(len(axes)) if j != i]
            lengths = [extent(op, x, axes[j] % rank(x)) for j in others]
            picture = op.Unsqueeze(impulses, list(range(4, 4 + len(others))))
            picture = op.Expand(op.Squeeze(picture, [1]), joined(op, [size, 1, size, *lengths]))
            resized = op.Resize(
                picture,
                None,
                None,
                op.Gather(sizes, [i, *others]),
                axes=list(range(2, 3 + len(others))),
                keep_aspect_ratio_policy=keep_aspect_ratio_policy,
                **how,
            )
            for _ in others:
                resized = op.Gather(resized, np.int64(0), axis=3)
        else:
            within = None
            if crop and roi is not None:
                zeros = op.CastLike(np.zeros(3, np.float32), roi)
                ones = op.CastLike(np.ones(3, np.float32), roi)
                within = op.Concat(zeros, _entry(op, roi, i), ones, _entry(op, roi, len(axes) + i), axis=0)
            if scales is not None:
                known = constant_array(scales)
                factors = (
                    np.array([1, 1, 1, known[i]], np.float32)
                    if known is not None
                    else op.Concat(np.ones(3, np.float32), _entry(op, scales, i), axis=0)
                )
                resized = op.Resize(impulses, within, factors, **how)
            else:
                assert sizes is not None
                known = constant_array(sizes)
                length = int(known[i]) if known is not None else _entry(op, sizes, i)
                wanted = joined(op, [size, 1, 1, length])
                resized = op.Resize(impulses, within, None, wanted, **how)
        matrix = op.Reshape(resized, joined(op, [size, -1]))
        dy = _multiply(op, matrix, dy, at, rank(x))
    return dy


def _is_unchanged(x: Value, y: Value, scales: Value | None, sizes: Value | None, i: int, axis: int) -> bool:
    """Whether entry `i` of the scales or sizes surely leaves `axis` as it is."""
    if scales is not None:
        factors = constant_array(scales)
        return factors is not None and bool(factors[i] == 1.0)
    return (isinstance(dims(x)[axis], int) and dims(x)[axis] == dims(y)[axis]) or i < _copied(sizes, x)


def _copied(sizes: Value | None, x: Value) -> int:
    """How many leading entries of `sizes` are those of the shape of `x`, as exporters write them."""
    node = sizes.producer() if sizes is not None else None
    if node is None or node.op_type != "Concat" or node.inputs[0] is None:
        return 0
    part = node.inputs[0]
    shape = part.producer()
    if shape is not None and shape.op_type == "Slice" and shape.inputs[1] is not None:
        starts = constant_array(shape.inputs[1])
        if starts is None or starts.tolist() != [0] or len(shape.inputs) > 4:
            return 0
        shape = shape.inputs[0].producer() if shape.inputs[0] is not None else None
    if shape is None or shape.op_type != "Shape" or shape.inputs[0] is not x:
        return 0
    count = dims(part)[0]
    from_start = "start" not in shape.attributes or shape.attributes["start"].as_int() == 0
    return count if from_start and isinstance(count, int) else 0


def _entry(op: Emitter, values: Value, i: int) -> Value:
    return op.Slice(values, [i], [i + 1], [0])


def _multiply(op: Emitter, matrix: Value, dy: Value, axis: int, ndim: int) -> Value:
    """Multiply the `matrix` [in, out] with `dy` along `axis`, where that has size out."""
    if axis == ndim - 1:
        return op.MatMul(dy, op.Transpose(matrix, perm=[1, 0]))
    if axis == ndim - 2:
        return op.MatMul(matrix, dy)
    order = [i for i in range(ndim) if i != axis] + [axis]
    last = op.MatMul(op.Transpose(dy, perm=order), op.Transpose(matrix, perm=[1, 0]))
    return op.Transpose(last, perm=[int(i) for i in np.argsort(order)])


class _Tap(NamedTuple):
    """One of the elements along an axis that a sample is made of, each field [N, samples].

    Attributes:
        place: its position, int64, inside the axis.
        weight: its share; None stands for 1.
        slope: the derivative of the weight by the coordinate.
    """

    place: Value
    weight: Value | None
    slope: Value | None


@vjp("GridSample")
def grid_sample(
    op: Emitter,
    dy: Value,
    y: Value,
    x: Value,
    grid: Value,
    *,
    align_corners: int = 0,
    mode: str = "linear",
    padding_mode: str = "zeros",
) -> tuple[Value, Value | None]:
    """Each sample is a weighted sum of the elements around its coordinate (Jaderberg et al. 2015, eq. 5-7).

    At the border, where clipping bends, the gradient of the grid is 0, as in torch.
    """
    mode = mode.removeprefix("bi")
    n = rank(x) - 2
    points = op.Reshape(grid, [0, -1, n])
    sizes = [op.Shape(x, start=2 + i, end=3 + i) for i in range(n)]
    taps, bends = [], []
    for i in range(n):
        # The last entry of a grid point belongs to the first spatial axis.
        point = op.Gather(points, np.int64(n - 1 - i), axis=2)
        found, bend = _taps(op, point, sizes[i], mode, padding_mode, bool(align_corners))
        taps.append(found)
        bends.append(bend)
    shares = op.Reshape(dy, [0, 0, -1])
    pixels = op.Reshape(x, [0, 0, -1])
    dx = zeros_like(op, pixels)
    moves: list[Value | None] = [None] * n
    through_grid = mode != "nearest" and not is_constant(grid)
    for corner in itertools.product(*taps):
        place = corner[0].place
        for tap, size in zip(corner[1:], sizes[1:], strict=True):
            place = op.Add(op.Mul(place, size), tap.place)
        places = op.Expand(op.Unsqueeze(place, [1]), op.Shape(shares))
        weight = _product(op, [tap.weight for tap in corner])
        update = shares if weight is None else op.Mul(shares, op.CastLike(op.Unsqueeze(weight, [1]), dy))
        dx = scatter_add(op, "ScatterElements", dx, places, update, axis=2)
        if not through_grid:
            continue
        seen = op.ReduceSum(op.Mul(op.GatherElements(pixels, places, axis=2), shares), [1], keepdims=0)
        for i, tap in enumerate(corner):
            rest = [other.weight for j, other in enumerate(corner) if j != i]
            move = _product(op, [op.CastLike(seen, grid), tap.slope, *rest])
            assert move is not None
            moves[i] = move if moves[i] is None else op.Add(moves[i], move)
    dx = reshape_like(op, dx, x)
    if not through_grid:
        return dx, None
    parts = [op.Unsqueeze(op.Mul(move, bend), [2]) for move, bend in zip(moves, bends, strict=True)]
    return dx, reshape_like(op, op.Concat(*reversed(parts), axis=2), grid)


def _product(op: Emitter, factors: Sequence[Value | None]) -> Value | None:
    product = None
    for factor in factors:
        if factor is not None:
            product = factor if product is None else op.Mul(product, factor)
    return product


def _taps(
    op: Emitter, point: Value, size: Value, mode: str, padding_mode: str, align_corners: bool
) -> tuple[list[_Tap], Value]:
    """Return the taps along one axis, and the derivative of the coordinate by the grid's `point`."""
    length = op.CastLike(size, point)
    last = op.Sub(length, 1.0)
    span = last if align_corners else length
    low = 0.0 if align_corners else -0.5
    bend = op.Mul(span, 0.5)
    where = op.Add(op.Mul(op.Add(point, 1.0), bend), low)
    # Keys' cubic reaches over the border: there the elements are padded, not the coordinate.
    if padding_mode == "reflection" and mode != "cubic":
        where, fold = _reflected(op, where, low, span)
        bend = op.Mul(bend, fold)
    if padding_mode != "zeros" and mode != "cubic":
        inside = op.And(op.Greater(where, 0.0), op.Less(where, last))
        bend = op.Where(inside, bend, 0.0)
        where = op.Min(op.Max(where, 0.0), last)

    def tap(at: Value, weight: Value | None, slope: Value | None) -> _Tap:
        if padding_mode == "zeros":
            inside = op.And(op.GreaterOrEqual(at, 0.0), op.LessOrEqual(at, last))
            weight = op.CastLike(inside, point) if weight is None else op.Where(inside, weight, 0.0)
            slope = None if slope is None else op.Where(inside, slope, 0.0)
        elif padding_mode == "reflection":
            at, _ = _reflected(op, at, low, span)
        return _Tap(op.Cast(op.Min(op.Max(at, 0.0), last), to=DataType.INT64), weight, slope)

    if mode == "nearest":
        return [tap(op.Round(where), None, None)], bend
    first = op.Floor(where)
    t = op.Sub(where, first)
    if mode == "linear":
        one = op.CastLike(np.float32(1.0), point)
        return [tap(first, op.Sub(1.0, t), op.Neg(one)), tap(op.Add(first, 1.0), t, one)], bend
    taps = []
    for k in range(-1, 3):
        distance = op.Sub(t, float(k)) if k <= 0 else op.Sub(float(k), t)
        weight, slope = _cubic(op, distance, near=k in (0, 1))
        taps.append(tap(op.Add(first, float(k)), weight, slope if k <= 0 else op.Neg(slope)))
    return taps, bend


def _reflected(op: Emitter, where: Value, low: float, span: Value) -> tuple[Value, Value]:
    """Reflect at `low` and `low` + `span` until all lies between; return that and its derivative, 1 or -1."""
    beyond = op.Sub(where, low)
    turn = op.Mod(op.Abs(beyond), op.Max(op.Mul(span, 2.0), 1.0), fmod=1)
    folded = op.Add(op.Sub(span, op.Abs(op.Sub(turn, span))), low)
    sign = op.Where(op.Less(beyond, 0.0), op.CastLike(np.float32(-1.0), where), 1.0)
    return folded, op.Where(op.Less(turn, span), sign, op.Neg(sign))


def _cubic(op: Emitter, d: Value, near: bool) -> tuple[Value, Value]:
    """The weight at distance `d` (`near`: up to 1, else to 2) and its derivative by `d`; Keys 1981, eq. 4."""
    a = -0.75
    coefficients = [a + 2, -(a + 3), 0.0, 1.0] if near else [a, -5 * a, 8 * a, -4 * a]
    slopes = [3 * coefficients[0], 2 * coefficients[1], coefficients[2]]
    return _polynomial(op, d, coefficients), _polynomial(op, d, slopes)


def _polynomial(op: Emitter, d: Value, coefficients: Sequence[float]) -> Value:
    result = op.Mul(d, coefficients[0])
    for coefficient in coefficients[1:-1]:
        result = op.Mul(op.Add(result, coefficient), d)
    return op.Add(result, coefficients[-1])


@vjp("AffineGrid")
def affine_grid(
    op: Emitter, dy: Value, y: Value, theta: Value, size: Value, *, align_corners: int = 0
) -> Value:
    """The grid is theta times the points of the grid that theta = identity gives."""
    n = rank(y) - 2
    identity = op.CastLike(np.eye(n, n + 1, dtype=np.float32)[None], theta)
    one_image = op.Concat(np.ones(1, np.int64), op.Slice(size, [1], [n + 2], [0]), axis=0)
    points = op.Reshape(op.AffineGrid(identity, one_image, align_corners=align_corners), [-1, n])
    points = op.Pad(points, [0, 0, 0, 1], op.CastLike(np.float32(1.0), theta))
    return op.MatMul(op.Transpose(op.Reshape(dy, [0, -1, n]), perm=[0, 2, 1]), points)
