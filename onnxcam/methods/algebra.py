"""What several methods compute: sums over channels, masks, principal components."""

import numpy as np
import onnx_ir as ir
from onnx_ir import Value

from onnxcam.emit import Emitter

PLANE = [3, 4]
"""The spatial axes of [N,K,C,h,w]."""

_SQUARINGS = 10
"""The power 2^10 of a matrix leaves of its second eigenvector (l2/l1)^1024."""


def summed(op: Emitter, w: Value, a: Value) -> Value:
    """Return sum_k w_k A_k [N,K,h,w].

    Args:
        op: where the nodes go.
        w: weights [N,K,C], for which it is one product of matrices per image, or [N,K,C,h,w].
        a: [N,1,C,h,w].
    """
    if w.shape is None or len(w.shape) != 3:
        return op.ReduceSum(op.Mul(w, a), [2], keepdims=0)
    product = op.MatMul(w, op.Reshape(op.Squeeze(a, [1]), [0, 0, -1]))
    plane = known_sizes(a, 3)
    if plane:
        return op.Reshape(product, [0, 0, *plane])
    return op.Reshape(product, op.Concat(op.Shape(w, start=0, end=2), op.Shape(a, start=3), axis=0))


def total(op: Emitter, terms: Value) -> Value:
    """Add up terms [N,K,C,h,w] over the channels."""
    return op.ReduceSum(terms, [2], keepdims=0)


def largest(op: Emitter, terms: Value) -> Value:
    """Return the largest absolute value of terms [N,K,C,h,w] over the channels."""
    return op.ReduceMax(op.Abs(terms), [2], keepdims=0)


def first_component(op: Emitter, x: Value) -> Value:
    """Project each position of `x` onto the first principal direction of its channels.

    The direction v maximises the sum of (x_ij . v)^2 over the positions, |v| = 1, the mean not subtracted.
    Its sign is such that the projection's extreme of larger magnitude is positive.

    Args:
        op: where the nodes go.
        x: [N,K,C,h,w].

    Returns:
        [N,K,h,w], in float32 for a narrower `x`: powers of a matrix need its digits and its range.
    """
    x = widened(op, x)
    plane = op.Shape(x, start=3)
    lead = op.Shape(x, start=0, end=2)
    rows = op.Reshape(x, op.Concat(lead, op.Shape(x, start=2, end=3), np.array([-1]), axis=0))  # [N,K,C,P]
    turned = op.Transpose(rows, perm=[0, 1, 3, 2])
    if _fewer_positions(x):
        # The direction over positions is the projection itself, up to its length.
        along = _first_eigenvector(op, op.MatMul(turned, rows))
        direction = op.MatMul(rows, along)
        length = op.ReduceL2(direction, [2], keepdims=1)
        projection = op.Mul(along, length)
    else:
        projection = op.MatMul(turned, _first_eigenvector(op, op.MatMul(rows, turned)))
    return op.Reshape(_turned_up(op, projection), op.Concat(lead, plane, axis=0))


def first_kernel_component(op: Emitter, x: Value) -> Value:
    """Return the first component of the positions' channels by kernel PCA, of extremes as `first_component`.

    The kernel is tanh(p . q / C + 1) for positions p, q less the mean position; it is centred itself, and
    the component is sqrt(l) u, l its largest eigenvalue and u the eigenvector.

    Args:
        op: where the nodes go.
        x: [N,K,C,h,w].

    Returns:
        [N,K,h,w], in float32 for a narrower `x`: powers of a matrix need its digits and its range.
    """
    x = widened(op, x)
    plane = op.Shape(x, start=3)
    lead = op.Shape(x, start=0, end=2)
    away = op.Sub(x, op.ReduceMean(x, PLANE, keepdims=1))
    rows = op.Reshape(away, op.Concat(lead, op.Shape(x, start=2, end=3), np.array([-1]), axis=0))  # [N,K,C,P]
    channels = op.CastLike(op.Shape(x, start=2, end=3), x)
    product = op.MatMul(op.Transpose(rows, perm=[0, 1, 3, 2]), rows)
    kernel = op.Tanh(op.Add(op.Div(product, channels), 1.0))
    along = op.ReduceMean(kernel, [3], keepdims=1)
    centred = op.Add(
        op.Sub(op.Sub(kernel, along), op.Transpose(along, perm=[0, 1, 3, 2])),
        op.ReduceMean(along, [2], keepdims=1),
    )
    # This kernel has eigenvalues below zero too; shifted by its norm, the largest is the largest in size.
    shift = op.Mul(_identity(op, centred), op.Sqrt(op.ReduceSumSquare(centred, [2, 3], keepdims=1)))
    u = _first_eigenvector(op, op.Add(centred, shift))
    value = op.MatMul(op.Transpose(u, perm=[0, 1, 3, 2]), op.MatMul(centred, u))
    component = op.Mul(u, op.Sqrt(op.Relu(value)))
    return op.Reshape(_turned_up(op, component), op.Concat(lead, plane, axis=0))


def widened(op: Emitter, x: Value) -> Value:
    """Return `x` in float32 if it is narrower."""
    narrow = x.dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
    return op.Cast(x, to=ir.DataType.FLOAT) if narrow else x


def _turned_up(op: Emitter, x: Value) -> Value:
    """Change the sign of each [P,1] of [N,K,P,1] whose extreme of larger magnitude is negative."""
    low, high = (reduce(x, [2], keepdims=1) for reduce in (op.ReduceMin, op.ReduceMax))
    return op.Where(op.Greater(op.Neg(low), high), op.Neg(x), x)


def _identity(op: Emitter, g: Value) -> Value:
    """The identity matrix [m,m] in the dtype of `g` [N,K,m,m]."""
    size = g.shape[3] if g.shape is not None else None
    end = np.int64(size) if isinstance(size, int) else op.Squeeze(op.Shape(g, start=3), [0])
    places = op.Range(np.int64(0), end, np.int64(1))
    return op.Cast(op.Equal(op.Unsqueeze(places, [1]), places), to=g.dtype)


def _fewer_positions(x: Value) -> bool:
    sizes = known_sizes(x, 2)
    return len(sizes) == 3 and sizes[1] * sizes[2] < sizes[0]


def known_sizes(x: Value, first: int, end: int | None = None) -> list[int]:
    """The sizes of `x` along the axes from `first` to `end`; none of them where the graph leaves one open."""
    sizes = [] if x.shape is None else list(x.shape)[first:end]
    return [size for size in sizes if isinstance(size, int)] if all(isinstance(s, int) for s in sizes) else []


def _first_eigenvector(op: Emitter, g: Value) -> Value:
    """Return the unit eigenvector [N,K,m,1] of the largest eigenvalue of symmetric g >= 0, [N,K,m,m]."""
    for _ in range(_SQUARINGS):
        largest = op.ReduceMax(op.Abs(g), [2, 3], keepdims=1)
        g = op.Div(g, op.Where(op.Greater(largest, 0.0), largest, 1.0))
        g = op.MatMul(g, g)
    # All columns are multiples of it; the one with the largest diagonal element is the longest.
    diagonal = op.ReduceSum(op.Mul(g, _identity(op, g)), [3], keepdims=0)
    longest = op.ArgMax(diagonal, axis=2, keepdims=1)
    column = op.GatherElements(
        g, op.Expand(op.Unsqueeze(longest, [3]), op.Shape(op.ReduceMax(g, [3], keepdims=1))), axis=3
    )
    norm = op.ReduceL2(column, [2], keepdims=1)
    return op.Div(column, op.Where(op.Greater(norm, 0.0), norm, 1.0))
