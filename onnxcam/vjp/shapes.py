"""Bringing a gradient to the shape of the value it belongs to.

Where a size is known it is written into the graph as a constant. The size of the leading (batch)
axis is left open wherever the operator allows that, so that a gradient that reads nothing of the
picture serves any number of rows.
"""

import math
from collections.abc import Iterable, Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir import Value

from onnxcam.emit import Emitter
from onnxcam.errors import OnnxcamError


def rank(x: Value) -> int:
    """Return the number of dimensions of `x`.

    Raises:
        OnnxcamError: the graph does not say.
    """
    if x.shape is None:
        raise OnnxcamError(f"the number of dimensions of value {x.name!r} is unknown{_reason(x)}")
    return len(x.shape)


def gated(op: Emitter, dy: Value, passes: Value) -> Value:
    """Return `dy` where the bool `passes` holds, and 0 elsewhere.

    It is a product: onnxruntime 1.32 takes six times as long for a Where. So what is not finite in `dy` stays
    so even where nothing passes.
    """
    return op.Mul(dy, op.CastLike(passes, dy))


ROWS = "cam_rows"
"""Name of the leading dimension of a gradient that has a row for each image and class."""

STEEP = 2.0**100
"""Slope of what stands for a step; a power of two, so that its products are exact."""


def step(op: Emitter, y: Value, bound: float, rises: bool = True) -> Value:
    """Return 1 where ``y > bound``, or ``y < bound`` if it falls, and 0 elsewhere, in the type of `y`.

    It is a HardSigmoid so steep that only numbers nearer than 1e-30 to a bound of 0 come out between, and no
    float32 does at other bounds: onnxruntime leaves that in its blocked layout of convolutions, which it does
    not for a comparison. float16 has no such slope, and what converts to it later is safe with `portable`.
    OpenVINO takes a beta of 0 for a missing one; a number below zero that no sum notices stands for it.
    """
    exact = float(np.float32(bound)) == bound and abs(bound) < 2.0**20
    if op.portable or not exact or y.dtype not in (ir.DataType.FLOAT, ir.DataType.DOUBLE):
        return op.CastLike(op.Greater(y, bound) if rises else op.Less(y, bound), y)
    slope = STEEP if rises else -STEEP
    return op.HardSigmoid(y, alpha=slope, beta=-slope * bound or -(2.0**-120))


def complement(op: Emitter, y: Value) -> Value:
    """Return 1 - y, for `y` from 0 to 1; onnxruntime leaves a HardSigmoid in its layout of convolutions."""
    return op.HardSigmoid(y, alpha=-1.0, beta=1.0)


def _reason(x: Value) -> str:
    """Say with which value the shapes began to be unknown, and what to do."""
    first: Value | None = x
    while first is not None:
        x, node = first, first.producer()
        first = next((v for v in node.inputs if v is not None and v.shape is None), None) if node else None
    node = x.producer()
    where = f", which node {node.name!r} ({node.op_type}) computes" if node else ""
    return f": nothing tells the shape of {x.name!r}{where}. Declare it in the model (its value_info)"


def dims(x: Value) -> list[int | str | None]:
    """Return the dimensions of `x`: an int, a symbol's name, or None where nothing is known."""
    rank(x)
    assert x.shape is not None
    return [d if isinstance(d, int) else d.value for d in x.shape]


def axes_of(axes: Iterable[int], ndim: int) -> list[int]:
    """Return `axes` as sorted non-negative numbers."""
    return sorted(axis % ndim if ndim else 0 for axis in axes)


def constant_ints(x: Value | None, what: str) -> list[int] | None:
    """Return the integers in the constant `x`, or None if the optional input is absent.

    Raises:
        OnnxcamError: `x` is computed while the model runs; `what` says what it is.
    """
    if x is None:
        return None
    tensor = constant_array(x)
    if tensor is None:
        raise OnnxcamError(f"{what} ({x.name!r}) is computed while the model runs, not a constant")
    return [int(v) for v in np.atleast_1d(tensor)]


def constant_array(x: Value) -> np.ndarray | None:
    """Return the array that `x` always holds, or None if `x` is computed or can be overridden."""
    tensor = ir.convenience.get_const_tensor(x)
    return None if tensor is None or x.is_graph_input() else tensor.numpy()


_REPRESENTING = frozenset([
    "Cast", "CastLike", "Concat", "DequantizeLinear", "Div", "Identity", "Mod", "Mul", "QuantizeLinear",
    "Reshape", "Slice", "Sub", "Transpose", "Unsqueeze",
])  # fmt: skip
"""Operators that bring weights from the form in which a file keeps them to the one that is computed with."""


_MOST_REPRESENTING = 64
"""So many are looked through at the most: weights need 13, and what is longer is a chain of activations."""


def is_constant(x: Value) -> bool:
    """Whether `x` is a weight, in whatever form, or another constant, which no gradient needs to reach."""
    waiting, seen = [x], set[Value]()
    while waiting:
        value = waiting.pop()
        node = value.producer()
        if value.is_initializer() or value in seen or (node is not None and node.op_type == "Constant"):
            continue
        if node is None or node.op_type not in _REPRESENTING or len(seen) == _MOST_REPRESENTING:
            return False
        seen.add(value)
        waiting.extend(v for v in node.inputs if v is not None)
    return True


def zeros_like(op: Emitter, x: Value) -> Value:
    """Emit zeros of the shape and dtype of `x`."""
    return op.ConstantOfShape(op.Shape(x), value=ir.tensor(np.zeros(1, x.dtype.numpy())))  # type: ignore[union-attr]


def extent(op: Emitter, x: Value, axis: int) -> int | Value:
    """Return the size of `x` along `axis` (not negative): a number, or an int64 vector of one.

    That of the leading axis is never a number: a gradient may have more rows than the value it belongs to.
    """
    size = dims(x)[axis]
    return size if axis > 0 and isinstance(size, int) else op.Shape(x, start=axis, end=axis + 1)


def joined(op: Emitter, parts: Sequence[int | Value]) -> list[int] | Value:
    """Join numbers and int64 vectors to one shape: a list if all of them are numbers."""
    if all(isinstance(part, int) for part in parts):
        return list(parts)  # type: ignore[arg-type]
    vectors: list[Value | np.ndarray] = []
    for part in parts:
        if isinstance(part, Value):
            vectors.append(part)
        elif vectors and isinstance(vectors[-1], np.ndarray):
            vectors[-1] = np.append(vectors[-1], part)
        else:
            vectors.append(np.array([part], np.int64))
    if len(vectors) == 1:
        return vectors[0]  # type: ignore[return-value]
    return op.Concat(*vectors, axis=0)


def pad_along(
    op: Emitter,
    x: Value,
    pads: Sequence[int] | np.ndarray | Value,
    axes: Sequence[int],
    fill: float | None = None,
) -> Value:
    """Pad `x` along `axes`; `pads` holds what comes before each of them, then after each; `fill`: not zeros.

    All axes are written out: between two Transposes onnxruntime 1.32 fails over a Pad that names its axes.
    """
    places = [axis % rank(x) for axis in axes]
    places += [rank(x) + place for place in places]
    every = np.zeros(2 * rank(x), np.int64)
    if isinstance(pads, Value):
        return op.Pad(x, op.ScatterElements(every, np.array(places), pads, axis=0), fill)
    every[places] = pads
    return op.Pad(x, every, fill)


def zeros_along(op: Emitter, dy: Value, axis: int, length: int | Value) -> Value:
    """Emit zeros of the dtype and shape of `dy`, but of size `length` along `axis` (not negative)."""
    shape = joined(op, [length if i == axis else extent(op, dy, i) for i in range(rank(dy))])
    return op.ConstantOfShape(shape, value=ir.tensor(np.zeros(1, dy.dtype.numpy())))  # type: ignore[union-attr]


def positions(op: Emitter, x: Value, axis: int) -> Value:
    """Emit 0, 1, 2, ... up to the size of `x` along `axis` (not negative)."""
    size = extent(op, x, axis)
    end = op.Squeeze(size, [0]) if isinstance(size, Value) else np.int64(size)
    return op.Range(np.int64(0), end, np.int64(1))


def add_at(op: Emitter, dy: Value, x: Value, places: Value, axis: int) -> Value:
    """Add `dy` onto zeros, at the `places` [n] along `axis`.

    Args:
        dy: it has size n along `axis`.
        x: the result has the size of `x` along `axis`, and that of `dy` along the other axes.
        places: positions, negative ones counted from the end.
        axis: not negative.
    """
    empty = zeros_along(op, dy, axis, extent(op, x, axis))
    line = op.Reshape(places, [-1 if i == axis else 1 for i in range(rank(x))])
    return scatter_add(op, "ScatterElements", empty, op.Expand(line, op.Shape(dy)), dy, axis=axis)


def scatter_add(op: Emitter, op_type: str, x: Value, places: Value, dy: Value, **attributes: int) -> Value:
    """Add `dy` to `x` by ScatterElements or ScatterND; halves in float32, as onnxruntime adds no others."""
    dtype = dy.dtype
    if dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16):
        wide = op.node(
            op_type,
            op.Cast(x, to=ir.DataType.FLOAT),
            places,
            op.Cast(dy, to=ir.DataType.FLOAT),
            reduction="add",
            **attributes,
        )
        return op.Cast(wide, to=dtype)
    return op.node(op_type, x, places, dy, reduction="add", **attributes)


def reshape_like(op: Emitter, dy: Value, x: Value) -> Value:
    """Reshape `dy` to the shape of `x`, of which not even the number of dimensions need be known."""
    sizes = None if x.shape is None else dims(x)
    if sizes is None or 0 in sizes:
        return op.Reshape(dy, op.Shape(x), allowzero=1)
    if not sizes:
        return op.Reshape(dy, [])
    return op.Reshape(dy, joined(op, [-1, *(extent(op, x, axis) for axis in range(1, len(sizes)))]))


def expand_like(op: Emitter, dy: Value, x: Value, axes: Sequence[int]) -> Value:
    """Repeat `dy`, which has size 1 along `axes` (sorted, not negative), to the shape of `x`."""
    sizes = dims(x)
    if all(isinstance(sizes[axis], int) for axis in axes):
        return op.Expand(dy, [sizes[i] if i in axes else 1 for i in range(len(sizes))])
    first = axes[0]
    return op.Expand(dy, op.Shape(x, start=first))


def count(op: Emitter, x: Value, axes: Sequence[int]) -> float | Value:
    """Return how many elements of `x` lie along `axes`: a number, or a scalar of the dtype of `x`."""
    sizes = [dims(x)[axis] for axis in axes]
    if all(isinstance(size, int) for size in sizes):
        return float(math.prod(sizes))  # type: ignore[arg-type]
    lengths = op.Concat(*[op.Shape(x, start=axis, end=axis + 1) for axis in axes], axis=0)
    # Cast, not CastLike: the elements of x are not read, so that the result is the same for every row.
    return op.Cast(op.ReduceProd(lengths, keepdims=0), to=x.dtype)


def unbroadcast(op: Emitter, dy: Value | None, x: Value, y: Value) -> Value | None:
    """Sum `dy`, which has the shape of `y`, over the axes along which `x` was broadcast to `y`."""
    if dy is None:
        return None
    if y.shape is None or x.shape is None:
        return unbroadcast_at_run_time(op, dy, x, None)
    wide, narrow = dims(y), dims(x)
    lead = len(wide) - len(narrow)
    pairs = list(zip(narrow, wide[lead:], strict=True))
    if any(_may_broadcast(n, w) for n, w in pairs):
        return unbroadcast_at_run_time(op, dy, x, lead)
    inner = [lead + i for i, (n, w) in enumerate(pairs) if n == 1 and w != 1]
    plane = list(range(2, len(wide)))
    if plane and inner == plane and lead == 0 and all(isinstance(wide[i], int) for i in plane):
        # A mean: onnxruntime finds it in its layout of convolutions, and no other sum.
        return op.Mul(op.GlobalAveragePool(dy), float(math.prod(wide[i] for i in plane)))  # type: ignore[misc]
    if inner:
        dy = op.ReduceSum(dy, inner, keepdims=1)
    return op.ReduceSum(dy, list(range(lead)), keepdims=0) if lead else dy


def _may_broadcast(narrow: int | str | None, wide: int | str | None) -> bool:
    """Whether only the run can tell if a dimension of size `narrow` was repeated to `wide`."""
    if isinstance(narrow, int):
        return False
    return narrow is None or narrow != wide


def unbroadcast_at_run_time(op: Emitter, dy: Value, x: Value, lead: int | None = 0) -> Value:
    """Sum `dy` over the axes along which `x` turns out to have been broadcast.

    Args:
        op: where the nodes go.
        dy: the gradient of the broadcast value.
        x: the value that was broadcast.
        lead: how many more axes `dy` has than `x`; None: only the run can tell.
    """
    shape = op.Shape(x)
    padded = shape
    if lead is None:
        count = op.Sub(op.Shape(op.Shape(dy)), op.Shape(shape) if x.shape is None else rank(x))
        padded = op.Concat(op.ConstantOfShape(count, value=ir.tensor([1])), shape, axis=0)
    elif lead:
        padded = op.Concat(np.ones(lead, np.int64), shape, axis=0)
    repeated = op.And(op.Equal(padded, 1), op.Not(op.Equal(op.Shape(dy), 1)))
    axes = op.Squeeze(op.NonZero(repeated), [0])
    summed = op.ReduceSum(dy, axes, keepdims=1, noop_with_empty_axes=1)
    if dy.shape is not None:  # which inference forgets where the axes are not constant
        summed.shape = ir.Shape([None] * rank(dy))
    return op.Reshape(summed, shape)
