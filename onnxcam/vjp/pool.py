"""Pooling."""

import math

import numpy as np
from onnx_ir import Value

from onnxcam.emit import Emitter
from onnxcam.vjp.conv import Window, spread
from onnxcam.vjp.registry import vjp
from onnxcam.vjp.shapes import count, dims, expand_like, rank, reshape_like, zeros_like


@vjp("GlobalAveragePool")
def global_average_pool(op: Emitter, dy: Value, y: Value, x: Value) -> Value:
    spatial = list(range(2, rank(x)))
    return expand_like(op, op.Div(dy, count(op, x, spatial)), x, spatial)


@vjp("GlobalMaxPool")
def global_max_pool(op: Emitter, dy: Value, y: Value, x: Value) -> Value:
    """Of several maxima the first takes the gradient, as in torch."""
    flat = op.Reshape(x, [0, 0, -1])
    first = op.ArgMax(flat, axis=2, keepdims=0, select_last_index=0)
    chosen = op.OneHot(first, op.Shape(flat, start=2), op.CastLike(np.array([0.0, 1.0], np.float32), x))
    return reshape_like(op, op.Mul(chosen, op.Reshape(dy, [0, 0, 1])), x)


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
) -> Value:
    """Of several maxima in a window the first takes the gradient, as in torch.

    The pooling is done again for its indices, so that the model's own MaxPool keeps its fast form.
    Runtimes number the indices over the batch, the sample or the plane; the remainder is the place
    in the plane for all of them.
    """
    window = Window.of(x, ys[0], kernel_shape, strides, dilations, pads, auto_pad)
    _, indices = op.MaxPool(
        x,
        kernel_shape=window.kernel,
        strides=window.strides,
        dilations=window.dilations,
        pads=window.begin + window.end,
        ceil_mode=ceil_mode,
        outputs=2,
    )
    sizes = dims(x)[2:]
    if all(isinstance(d, int) for d in sizes):
        plane = math.prod(sizes)  # type: ignore[arg-type]
    else:
        plane = op.ReduceProd(op.Shape(x, start=2), keepdims=0)
    place = op.Reshape(op.Mod(indices, plane), [0, 0, -1])
    empty = zeros_like(op, op.Reshape(x, [0, 0, -1]))
    filled = op.ScatterElements(empty, place, op.Reshape(dys[0], [0, 0, -1]), axis=2, reduction="add")
    return reshape_like(op, filled, x)


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
    window = Window.of(x, y, kernel_shape, strides, dilations, pads, auto_pad)
    plain = not ceil_mode and (count_include_pad or not any(window.begin + window.end))
    members = float(math.prod(kernel_shape)) if plain else _members(op, x, y, window, count_include_pad)
    kernel = np.ones((1, 1, *kernel_shape), x.dtype.numpy())  # type: ignore[union-attr]
    # Channels are pooled alike, so they join the batch and one small kernel serves them all.
    outs = dims(y)[2:]
    if all(isinstance(d, int) for d in outs):
        planes = op.Reshape(op.Div(dy, members), [-1, 1, *outs])  # type: ignore[list-item]
    else:
        planes = op.Reshape(op.Div(dy, members), op.Concat(np.array([-1, 1]), op.Shape(dy, start=2), axis=0))
    return reshape_like(op, spread(op, planes, op.constant(kernel), x, y, window), x)


def _members(op: Emitter, x: Value, y: Value, window: Window, count_include_pad: int) -> Value:
    """How many elements each window averages, shaped to broadcast against `y`."""
    n = len(window.kernel)
    product: Value | None = None
    for i in range(n):
        length, out = dims(x)[2 + i], dims(y)[2 + i]
        first, last = (-window.begin[i], window.end[i]) if count_include_pad else (0, 0)
        taps = np.arange(window.kernel[i]) * window.dilations[i] - window.begin[i]
        if isinstance(length, int) and isinstance(out, int):
            places = np.arange(out)[:, None] * window.strides[i] + taps
            inside = ((places >= first) & (places < length + last)).sum(1)
            along = op.constant(inside.astype(x.dtype.numpy()))  # type: ignore[union-attr]
        else:
            size = op.Squeeze(op.Shape(x, start=2 + i, end=3 + i), [0])
            outs = op.Squeeze(op.Shape(y, start=2 + i, end=3 + i), [0])
            starts = op.Mul(op.Range(np.int64(0), outs, np.int64(1)), window.strides[i])
            places = op.Add(op.Unsqueeze(starts, [1]), taps)
            within = op.And(op.GreaterOrEqual(places, first), op.Less(places, op.Add(size, last)))
            along = op.ReduceSum(op.CastLike(within, x), [1], keepdims=0)
        shaped = op.Reshape(along, [-1] + [1] * (n - 1 - i))
        product = shaped if product is None else op.Mul(product, shaped)
    assert product is not None
    return product
