"""Picking elements by position."""

import numpy as np
from onnx_ir import Value

from onnxcam.emit import Emitter
from onnxcam.vjp.registry import vjp
from onnxcam.vjp.shapes import constant_array, constant_ints, dims, rank


def _put_back(op: Emitter, dy: Value, x: Value, places: Value, axis: int) -> Value:
    """Add `dy` onto zeros, at the `places` [n] along `axis`.

    Args:
        dy: it has size n along `axis`.
        x: the result has the size of `x` along `axis`, and that of `dy` along the other axes.
        places: positions, negative ones counted from the end.
        axis: not negative.
    """
    shape = op.Shape(dy)
    length = op.Shape(x, start=axis, end=axis + 1)
    parts = [op.Slice(shape, [0], [axis], [0]), length, op.Slice(shape, [axis + 1], [rank(x)], [0])]
    empty = op.Expand(op.CastLike(np.zeros(1, np.float32), x), op.Concat(*parts, axis=0))
    indices = op.Expand(op.Reshape(places, [-1 if i == axis else 1 for i in range(rank(x))]), shape)
    return op.ScatterElements(empty, indices, dy, axis=axis, reduction="add")


@vjp("Gather")
def gather(op: Emitter, dy: Value, y: Value, x: Value, indices: Value, *, axis: int = 0) -> Value:
    at = axis % rank(x)
    flat = op.Reshape(indices, [-1])
    size = dims(x)[at]
    fixed = constant_array(indices)
    if fixed is not None and fixed.size == 1 and isinstance(size, int):
        one = dy if rank(indices) == 1 else op.Unsqueeze(dy, [at]) if rank(indices) == 0 else None
        if one is not None:
            place = int(fixed.reshape(())) % size
            return op.Pad(one, [place, size - 1 - place], None, [at])
    wide = [d for i, d in enumerate(dims(x)) if i != at]
    wide.insert(at, -1)
    if rank(indices) == 1:
        rows = dy
    elif sum(not isinstance(d, int) for d in wide) == 0 and 0 not in wide:
        rows = op.Reshape(dy, wide)  # type: ignore[arg-type]
    else:
        shape = op.Shape(x)
        rows = op.Reshape(
            dy,
            op.Concat(
                op.Slice(shape, [0], [at], [0]),
                np.array([-1]),
                op.Slice(shape, [at + 1], [rank(x)], [0]),
                axis=0,
            ),
        )
    return _put_back(op, rows, x, flat, at)


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
    """Zeros come back around what was kept; axes with a step other than 1 are put back one by one."""
    begin = constant_ints(starts, "the start of a Slice")
    end = constant_ints(ends, "the end of a Slice")
    assert begin is not None and end is not None
    along = constant_ints(axes, "the axes of a Slice") or list(range(len(begin)))
    step = constant_ints(steps, "the steps of a Slice") or [1] * len(begin)
    along = [axis % rank(x) for axis in along]
    sizes = dims(x)
    simple = [i for i in range(len(along)) if step[i] == 1 and isinstance(sizes[along[i]], int)]
    for i in range(len(along)):
        if i in simple:
            continue
        places = op.Slice(
            op.Range(
                np.int64(0), op.Squeeze(op.Shape(x, start=along[i], end=along[i] + 1), [0]), np.int64(1)
            ),
            [begin[i]],
            [end[i]],
            [0],
            [step[i]],
        )
        dy = _put_back(op, dy, x, places, along[i])
    if simple:
        before, after = [], []
        for i in simple:
            size = sizes[along[i]]
            first, last, _ = slice(begin[i], end[i]).indices(size)  # type: ignore[arg-type]
            before.append(first)
            after.append(size - max(last, first))  # type: ignore[operator]
        dy = op.Pad(dy, before + after, None, [along[i] for i in simple])
    return dy
