"""Pooling."""

import math

import numpy as np
import onnx_ir as ir
from onnx_ir import Value

from onnxcam.emit import Emitter
from onnxcam.vjp.conv import Window, planes, spread
from onnxcam.vjp.registry import vjp
from onnxcam.vjp.shapes import count, dims, expand_like, gated, rank, reshape_like, scatter_add


@vjp("GlobalAveragePool")
def global_average_pool(op: Emitter, dy: Value, y: Value, x: Value) -> Value:
    spatial = list(range(2, rank(x)))
    return expand_like(op, op.Div(dy, count(op, x, spatial)), x, spatial)


@vjp("GlobalMaxPool")
def global_max_pool(op: Emitter, dy: Value, y: Value, x: Value) -> Value:
    """Of several maxima the first takes the gradient, as in torch."""
    first = op.ArgMax(op.Reshape(x, [0, 0, -1]), axis=2, keepdims=1, select_last_index=0)
    size = _plane_size(op, x)
    places = op.Range(np.int64(0), size if isinstance(size, Value) else np.int64(size), np.int64(1))
    return reshape_like(op, gated(op, op.Reshape(dy, [0, 0, 1]), op.Equal(places, first)), x)


@vjp("GlobalLpPool")
def global_lp_pool(op: Emitter, dy: Value, y: Value, x: Value, *, p: int = 2) -> Value:
    return op.Mul(_power_slope(op, x, p), _over_power(op, dy, y, p))


def _power_slope(op: Emitter, x: Value, p: int) -> Value:
    """The derivative of |x|^p / p: sign(x) |x|^(p-1)."""
    if p == 1:
        return op.Sign(x)
    if p == 2:
        return x
    return op.Mul(op.Sign(x), op.Pow(op.Abs(x), float(p - 1)))


def _over_power(op: Emitter, dy: Value, y: Value, p: int) -> Value:
    """Return dy / y^(p-1), the rest of the gradient of a norm `y`; 0 where the norm is 0."""
    if p == 1:
        return dy
    zero = op.Equal(y, 0.0)
    return op.Where(zero, 0.0, op.Div(dy, op.Pow(op.Where(zero, 1.0, y), float(p - 1))))


@vjp("MaxPool")
def max_pool(
    op: Emitter,
    dys: tuple[Value | None, ...],
    ys: tuple[Value, ...],
    x: Value,
    *,
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    dilations: list[int] | None = None,
    kernel_shape: list[int],
    pads: list[int] | None = None,
    storage_order: int = 0,
    strides: list[int] | None = None,
) -> Value | None:
    """Of several maxima in a window the first takes the gradient, as in torch.

    The pooling is done again for its indices, so that the model's own MaxPool keeps its fast form.
    Runtimes number the indices over the batch, the sample or the plane; the remainder is the place
    in the plane for all of them.
    """
    dy = dys[0]
    if dy is None:
        return None
    _, indices = op.MaxPool(
        x,
        auto_pad=auto_pad,
        ceil_mode=ceil_mode,
        dilations=dilations,
        kernel_shape=kernel_shape,
        pads=pads,
        strides=strides,
        outputs=2,
    )
    place = op.Reshape(op.Mod(indices, _plane_size(op, x)), [0, 0, -1])
    assert dy.dtype is not None
    zero = ir.tensor(np.zeros(1, dy.dtype.numpy()))
    empty = op.ConstantOfShape(op.Shape(op.Reshape(x, [0, 0, -1])), value=zero)
    filled = scatter_add(op, "ScatterElements", empty, place, op.Reshape(dy, [0, 0, -1]), axis=2)
    return reshape_like(op, filled, x)


def first_in_window(
    op: Emitter,
    dys: tuple[Value | None, ...],
    ys: tuple[Value, ...],
    x: Value,
    *,
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    dilations: list[int] | None = None,
    kernel_shape: list[int],
    pads: list[int] | None = None,
    storage_order: int = 0,
    strides: list[int] | None = None,
) -> Value | None:
    """The gradient of MaxPool without its Indices, which some runtimes lack and others number wrongly.

    A convolution with one kernel for each place in a window lays the window out along the channels; there
    ArgMax finds the first maximum, and the transposed convolution brings its gradient back.
    """
    dy = dys[0]
    if dy is None:
        return None
    assert x.dtype is not None
    window = Window.of(op, x, ys[0], kernel_shape, strides, dilations, pads, auto_pad)
    places = math.prod(kernel_shape)
    kernel = op.constant(np.eye(places, dtype=x.dtype.numpy()).reshape(places, 1, *kernel_shape))
    surrounded = _surrounded(op, x, ys[0], window)
    laid_out = op.Conv(
        planes(op, surrounded, surrounded),
        kernel,
        kernel_shape=window.kernel,
        strides=window.strides,
        dilations=window.dilations,
        pads=[0] * 2 * len(window.kernel),
    )
    first = op.ArgMax(laid_out, axis=1, keepdims=0, select_last_index=0)
    chosen = op.OneHot(first, np.int64(places), np.array([0, 1], x.dtype.numpy()), axis=1)
    shares = op.Mul(chosen, planes(op, dy, ys[0]))
    return reshape_like(op, spread(op, shares, kernel, x, ys[0], window), x)


def _surrounded(op: Emitter, x: Value, y: Value, window: Window) -> Value:
    """Pad `x` up to the end of the last window with the lowest number (times 0, -inf would be none)."""
    sizes, outs, begin = dims(x)[2:], dims(y)[2:], window.begin
    assert x.dtype is not None
    lowest = np.array(x.dtype.min, x.dtype.numpy())
    if isinstance(begin, list) and all(isinstance(d, int) for d in [*sizes, *outs]):
        spans = zip(sizes, outs, window.strides, window.extents(), begin, strict=True)
        end = [max((out - 1) * step + extent - first - size, 0) for size, out, step, extent, first in spans]  # type: ignore[operator]
        return op.Pad(x, [0, 0, *begin, 0, 0, *end], lowest) if any(begin + end) else x
    before = op.constant(np.array(begin)) if isinstance(begin, list) else begin
    reach = op.Add(op.Mul(op.Sub(op.Shape(y, start=2), 1), window.strides), window.extents())
    after = op.Max(op.Sub(op.Sub(reach, before), op.Shape(x, start=2)), 0)
    none = np.zeros(2, np.int64)
    return op.Pad(x, op.Concat(none, before, none, after, axis=0), lowest)


def _plane_size(op: Emitter, x: Value) -> int | Value:
    """How many elements of `x` belong to one channel of one image."""
    sizes = dims(x)[2:]
    if all(isinstance(d, int) for d in sizes):
        return math.prod(sizes)  # type: ignore[arg-type]
    return op.ReduceProd(op.Shape(x, start=2), keepdims=0)


@vjp("MaxUnpool")
def max_unpool(
    op: Emitter,
    dy: Value,
    y: Value,
    x: Value,
    indices: Value,
    output_shape: Value | None = None,
    *,
    kernel_shape: list[int],
    pads: list[int] | None = None,
    strides: list[int] | None = None,
) -> Value:
    """Take the elements back from where they went; see `max_pool` on indices."""
    place = op.Reshape(op.Mod(indices, _plane_size(op, y)), [0, 0, -1])
    return reshape_like(op, op.GatherElements(op.Reshape(dy, [0, 0, -1]), place, axis=2), x)


@vjp("AveragePool")
def average_pool(
    op: Emitter,
    dy: Value,
    y: Value,
    x: Value,
    *,
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    count_include_pad: int = 0,
    dilations: list[int] | None = None,
    kernel_shape: list[int],
    pads: list[int] | None = None,
    strides: list[int] | None = None,
) -> Value:
    window = Window.of(op, x, y, kernel_shape, strides, dilations, pads, auto_pad)
    padded = not isinstance(window.begin, list) or not isinstance(window.end, list)
    padded = padded or any(window.begin + window.end)
    plain = not ceil_mode and (count_include_pad or not padded)
    if plain and dims(y)[2:] == [1] * len(kernel_shape) and dims(x)[2:] == window.extents() == kernel_shape:
        return expand_like(op, op.Div(dy, float(math.prod(kernel_shape))), x, list(range(2, rank(x))))
    if plain:
        return _spread_planes(op, dy, x, y, window, 1.0 / math.prod(kernel_shape))
    return _spread_planes(op, op.Div(dy, _members(op, x, y, window, count_include_pad)), x, y, window)


@vjp("LpPool")
def lp_pool(
    op: Emitter,
    dy: Value,
    y: Value,
    x: Value,
    *,
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    dilations: list[int] | None = None,
    kernel_shape: list[int],
    p: int = 2,
    pads: list[int] | None = None,
    strides: list[int] | None = None,
) -> Value:
    window = Window.of(op, x, y, kernel_shape, strides, dilations, pads, auto_pad)
    share = _spread_planes(op, _over_power(op, dy, y, p), x, y, window)
    return op.Mul(_power_slope(op, x, p), share)


def _spread_planes(op: Emitter, dy: Value, x: Value, y: Value, window: Window, weight: float = 1.0) -> Value:
    """Add up, for each element of `x`, the `dy` of the windows that cover it, times `weight`."""
    kernel = op.constant(np.full((1, 1, *window.kernel), weight, x.dtype.numpy()))  # type: ignore[union-attr]
    # Channels are pooled alike, so they join the batch and one small kernel serves them all.
    return reshape_like(op, spread(op, planes(op, dy, y), kernel, x, y, window), x)


def _members(op: Emitter, x: Value, y: Value, window: Window, count_include_pad: int) -> Value:
    """How many elements each window averages, shaped to broadcast against `y`."""
    n = len(window.kernel)
    product: Value | None = None
    for i in range(n):
        length, out = dims(x)[2 + i], dims(y)[2 + i]
        begin, end = window.begin, window.end
        taps = np.arange(window.kernel[i]) * window.dilations[i]
        if (
            isinstance(length, int)
            and isinstance(out, int)
            and isinstance(begin, list)
            and isinstance(end, list)
        ):
            first, last = (-begin[i], end[i]) if count_include_pad else (0, 0)
            places = np.arange(out)[:, None] * window.strides[i] + taps - begin[i]
            inside = ((places >= first) & (places < length + last)).sum(1)
            along = op.constant(inside.astype(x.dtype.numpy()))  # type: ignore[union-attr]
        else:
            before, after = _entry(op, begin, i), _entry(op, end, i)
            size = op.Add(op.Shape(x, start=2 + i, end=3 + i), after if count_include_pad else 0)
            outs = op.Squeeze(op.Shape(y, start=2 + i, end=3 + i), [0])
            starts = op.Mul(op.Range(np.int64(0), outs, np.int64(1)), window.strides[i])
            places = op.Sub(op.Add(op.Unsqueeze(starts, [1]), taps), before)
            lowest = op.Neg(before) if count_include_pad else 0
            within = op.And(op.GreaterOrEqual(places, lowest), op.Less(places, size))
            along = op.ReduceSum(op.Cast(within, to=x.dtype), [1], keepdims=0)
        shaped = op.Reshape(along, [-1] + [1] * (n - 1 - i))
        product = shaped if product is None else op.Mul(product, shaped)
    assert product is not None
    return product


def _entry(op: Emitter, padding: "list[int] | Value", i: int) -> Value:
    """Return entry `i` as an int64 value [1]."""
    if isinstance(padding, list):
        return op.constant(np.array([padding[i]], np.int64))
    return op.Slice(padding, [i], [i + 1], [0])
