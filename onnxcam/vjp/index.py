"""Picking elements by position, and putting elements at positions."""

from collections.abc import Callable

import numpy as np
from onnx_ir import DataType, Value

from onnxcam.emit import Emitter
from onnxcam.errors import OnnxcamError
from onnxcam.vjp.registry import vjp
from onnxcam.vjp.shapes import (
    add_at,
    constant_array,
    constant_ints,
    dims,
    extent,
    joined,
    pad_along,
    positions,
    rank,
    reshape_like,
    scatter_add,
    zeros_like,
)

_FIRST, _LAST = np.iinfo(np.int64).min, np.iinfo(np.int64).max
_OPEN_END = np.iinfo(np.int32).max
"""Exporters write this or more for the end of an axis."""


@vjp("Gather")
def gather(op: Emitter, dy: Value, y: Value, x: Value, indices: Value, *, axis: int = 0) -> Value:
    at = axis % rank(x)
    fixed = constant_array(indices)
    if rank(indices) == 0:
        dy = op.Unsqueeze(dy, [at])
    elif rank(indices) > 1:
        inner = [extent(op, x, i) for i in range(at + 1, rank(x))]
        dy = op.Reshape(dy, joined(op, [0] * at + [-1] + inner))
    if fixed is None or fixed.size != 1:
        return add_at(op, dy, x, op.Reshape(indices, [-1]), at)
    place = int(fixed.reshape(()))
    known = dims(x)[at]  # whatever is gathered along does not have a row for each gradient
    size = known if isinstance(known, int) else extent(op, x, at)
    before = place if place >= 0 else op.Add(size, place) if isinstance(size, Value) else size + place
    after = (
        -1 - place if place < 0 else op.Sub(size, place + 1) if isinstance(size, Value) else size - place - 1
    )
    return pad_along(op, dy, joined(op, [before, after]), [at])


@vjp("Slice")
def slice_(
    op: Emitter,
    dy: Value,
    y: Value,
    x: Value,
    starts: Value,
    ends: Value,
    axes: Value | None = None,
    steps: Value | None = None,
) -> Value:
    """Zeros come back around and between what was kept."""
    given = constant_ints(axes, "the axes of a Slice")
    along = list(range(_length(starts))) if given is None else [axis % rank(x) for axis in given]
    before: list[int | Value] = []
    after: list[int | Value] = []
    padded = []
    for i, axis in enumerate(along):
        start, end, step = _bound(op, starts, i), _bound(op, ends, i), _bound(op, steps, i)
        if start == 0 and step == 1 and isinstance(end, int) and end >= _OPEN_END:
            continue
        if isinstance(step, Value):
            kept = op.Slice(positions(op, x, axis), _vector(start), _vector(end), [0], step)
            dy = add_at(op, dy, x, kept, axis)
            continue
        if step < 0:
            dy = op.Slice(dy, [_LAST], [_FIRST], [axis], [-1])
        if abs(step) > 1:
            dy = _spaced(op, dy, axis, abs(step))
        low, high = _margins(op, x, axis, start, end, step)
        if low != 0 or high != 0:
            before.append(low)
            after.append(high)
            padded.append(axis)
    return pad_along(op, dy, joined(op, before + after), padded) if padded else dy


def _bound(op: Emitter, bounds: Value | None, index: int) -> int | Value:
    """One start, end or step: a number, or an int64 vector of one if only the run can tell."""
    if bounds is None:
        return 1
    known = constant_array(bounds)
    if known is not None:
        return int(known[index])
    return op.Cast(op.Slice(bounds, [index], [index + 1], [0]), to=DataType.INT64)


def _vector(bound: int | Value) -> list[int] | Value:
    return [bound] if isinstance(bound, int) else bound


def _length(vector: Value) -> int:
    length = dims(vector)[0]
    if not isinstance(length, int):
        raise OnnxcamError(f"the number of axes of a Slice (starts {vector.name!r}) is unknown")
    return length


def _spaced(op: Emitter, dy: Value, axis: int, step: int) -> Value:
    """Put step - 1 zeros between the elements along `axis`."""
    apart = pad_along(op, op.Unsqueeze(dy, [axis + 1]), [0, step - 1], [axis + 1])
    sizes = [extent(op, dy, i) for i in range(rank(dy))]
    size = sizes[axis]
    sizes[axis] = op.Mul(size, step) if isinstance(size, Value) else size * step
    return op.Slice(op.Reshape(apart, joined(op, sizes), allowzero=1), [0], [1 - step], [axis])


def _margins(
    op: Emitter, x: Value, axis: int, start: int | Value, end: int | Value, step: int
) -> tuple[int | Value, int | Value]:
    """How many elements of `x` lie before the first and behind the last that a Slice keeps."""
    size = dims(x)[axis]
    if isinstance(size, int) and isinstance(start, int) and isinstance(end, int):
        kept = range(size)[start:end:step]
        return min(kept, default=0), size - 1 - max(kept, default=-1)
    places = op.Slice(positions(op, x, axis), _vector(start), _vector(end), [0], [step])
    lowest = op.Slice(places, [0], [1], [0]) if step > 0 else op.Slice(places, [-1], [_LAST], [0])
    low = op.ReduceSum(lowest, [0], keepdims=1)  # 0 where nothing is kept
    span = op.Max(op.Add(op.Mul(op.Sub(op.Shape(places), 1), abs(step)), 1), 0)
    return low, op.Sub(op.Sub(op.Shape(x, start=axis, end=axis + 1), low), span)


@vjp("GatherElements")
def gather_elements(op: Emitter, dy: Value, y: Value, x: Value, indices: Value, *, axis: int = 0) -> Value:
    return scatter_add(op, "ScatterElements", zeros_like(op, x), indices, dy, axis=axis % rank(x))


@vjp("GatherND")
def gather_nd(op: Emitter, dy: Value, y: Value, x: Value, indices: Value, *, batch_dims: int = 0) -> Value:
    """ScatterND, which knows no batch: the batch coordinates are put before the indices."""
    if batch_dims:
        last = rank(indices) - 1
        one_each = op.Concat(op.Shape(indices, end=last), np.array([1]), axis=0)
        coordinates = [
            op.Expand(
                op.Reshape(positions(op, x, i), [-1 if j == i else 1 for j in range(last + 1)]), one_each
            )
            for i in range(batch_dims)
        ]
        indices = op.Concat(*coordinates, indices, axis=last)
    return scatter_add(op, "ScatterND", zeros_like(op, x), indices, dy)


@vjp("ScatterElements")
def scatter_elements(
    op: Emitter,
    dy: Value,
    y: Value,
    x: Value,
    indices: Value,
    updates: Value,
    *,
    axis: int = 0,
    reduction: str = "none",
) -> tuple[Value, None, Value]:
    """As for `_scatter`."""
    at = axis % rank(x)

    def put(target: Value, values: Value, reduction: str) -> Value:
        return op.ScatterElements(target, indices, values, axis=at, reduction=reduction)

    def pick(source: Value) -> Value:
        return op.GatherElements(source, indices, axis=at)

    return _scatter(op, dy, y, x, updates, reduction, put, pick)


@vjp("ScatterND")
def scatter_nd(
    op: Emitter,
    dy: Value,
    y: Value,
    x: Value,
    indices: Value,
    updates: Value,
    *,
    reduction: str = "none",
) -> tuple[Value, None, Value]:
    """As for `_scatter`."""

    def put(target: Value, values: Value, reduction: str) -> Value:
        return op.ScatterND(target, indices, values, reduction=reduction)

    def pick(source: Value) -> Value:
        return op.GatherND(source, indices)

    return _scatter(op, dy, y, x, updates, reduction, put, pick)


def _scatter(
    op: Emitter,
    dy: Value,
    y: Value,
    x: Value,
    updates: Value,
    reduction: str,
    put: Callable[[Value, Value, str], Value],
    pick: Callable[[Value], Value],
) -> tuple[Value, None, Value]:
    """The gradients of ``y = put(x, updates, reduction)``; ``pick`` reads at the same places.

    Without a reduction no two updates may go to one place. For max and min, elements that tie share the
    gradient equally, as in torch.scatter_reduce.
    """
    if reduction == "none":
        return put(dy, zeros_like(op, updates), "none"), None, pick(dy)
    if reduction == "add":
        return dy, None, pick(dy)
    if reduction == "mul":
        # The product of all other factors, also where some are zero.
        zero = op.Equal(updates, 0.0)
        nonzero = op.Where(zero, 1.0, updates)
        zeros = op.CastLike(zero, x)
        other_zeros = op.Sub(pick(put(zeros_like(op, x), zeros, "add")), zeros)
        others = op.Div(pick(op.Mul(dy, put(x, nonzero, "mul"))), nonzero)
        return put(dy, updates, "mul"), None, op.Where(op.Equal(other_zeros, 0.0), others, 0.0)
    original = op.CastLike(op.Equal(x, y), x)
    updated = op.CastLike(op.Equal(updates, pick(y)), x)
    share = op.Div(dy, put(original, updated, "add"))
    return op.Mul(share, original), None, op.Mul(pick(share), updated)


@vjp("TensorScatter")
def tensor_scatter(
    op: Emitter,
    dy: Value,
    y: Value,
    cache: Value,
    update: Value,
    begin: Value | None = None,
    *,
    axis: int = -2,
    mode: str = "linear",
) -> tuple[Value, Value]:
    at = axis % rank(cache)
    dcache = op.TensorScatter(dy, zeros_like(op, update), begin, axis=axis, mode=mode)
    along = op.Reshape(positions(op, update, at), [-1 if i == at else 1 for i in range(rank(cache))])
    if begin is not None:
        along = op.Add(along, op.Reshape(begin, [-1] + [1] * (rank(cache) - 1)))
    if mode == "circular":
        along = op.Mod(along, op.Shape(cache, start=at, end=at + 1))
    return dcache, op.GatherElements(dy, op.Expand(along, op.Shape(update)), axis=at)


@vjp("Compress")
def compress(
    op: Emitter, dy: Value, y: Value, x: Value, condition: Value, *, axis: int | None = None
) -> Value:
    kept = op.Squeeze(op.NonZero(condition), [0])
    if axis is not None:
        return add_at(op, dy, x, kept, axis % rank(x))
    flat = op.Reshape(x, [-1])
    return reshape_like(op, add_at(op, dy, flat, kept, 0), x)


@vjp("TopK")
def top_k(
    op: Emitter,
    dys: tuple[Value | None, ...],
    ys: tuple[Value, ...],
    x: Value,
    k: Value,
    *,
    axis: int = -1,
    largest: int = 1,
    sorted: int = 1,
) -> Value:
    """The gradient of each value goes to the element it was; elements that tie do not share it."""
    return op.ScatterElements(zeros_like(op, x), ys[1], dys[0], axis=axis % rank(x))


@vjp("OneHot")
def one_hot(
    op: Emitter, dy: Value, y: Value, indices: Value, depth: Value, values: Value, *, axis: int = -1
) -> tuple[None, None, Value]:
    hot = op.OneHot(indices, depth, np.array([0, 1], y.dtype.numpy()), axis=axis)  # type: ignore[union-attr]
    on = op.ReduceSum(op.Mul(dy, hot), keepdims=0)
    off = op.ReduceSum(op.Mul(dy, op.Sub(1.0, hot)), keepdims=0)
    return None, None, op.Concat(op.Reshape(off, [1]), op.Reshape(on, [1]), axis=0)
