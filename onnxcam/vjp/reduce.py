"""Reductions along axes, and running sums and products."""

from onnx_ir import Value

from onnxcam.emit import Emitter
from onnxcam.vjp.registry import vjp
from onnxcam.vjp.shapes import axes_of, constant_array, count, expand_like, rank

Axes = list[int] | Value
"""The axes of a reduction, sorted and not negative; a value if only the run can tell."""


def _reduced_axes(x: Value, axes: Value | None, noop_with_empty_axes: int) -> Axes:
    fixed = None if axes is None else constant_array(axes)
    if axes is not None and fixed is None:
        return axes
    if fixed is not None and fixed.size:
        return axes_of((int(axis) for axis in fixed.reshape(-1)), rank(x))
    return [] if noop_with_empty_axes else list(range(rank(x)))


def _kept(op: Emitter, v: Value, axes: Axes, keepdims: int) -> Value:
    """Put back, with size 1, the axes that a reduction without keepdims has dropped."""
    return v if keepdims or axes == [] else op.Unsqueeze(v, axes)


def _repeated(op: Emitter, v: Value, x: Value, axes: Axes) -> Value:
    """Repeat `v`, which has size 1 along `axes`, to the shape of `x`."""
    if isinstance(axes, Value):
        return op.Expand(v, op.Shape(x))
    return expand_like(op, v, x, axes) if axes else v


def _reduce(op: Emitter, kind: str, v: Value, axes: Axes, noop_with_empty_axes: int) -> Value:
    """Reduce `v` by operator `kind` along `axes`, which stay with size 1."""
    return op.node(kind, v, axes, keepdims=1, noop_with_empty_axes=noop_with_empty_axes)


@vjp("ReduceSum")
def reduce_sum(
    op: Emitter,
    dy: Value,
    y: Value,
    x: Value,
    axes: Value | None = None,
    *,
    keepdims: int = 1,
    noop_with_empty_axes: int = 0,
) -> Value:
    along = _reduced_axes(x, axes, noop_with_empty_axes)
    return _repeated(op, _kept(op, dy, along, keepdims), x, along)


@vjp("ReduceMean")
def reduce_mean(
    op: Emitter,
    dy: Value,
    y: Value,
    x: Value,
    axes: Value | None = None,
    *,
    keepdims: int = 1,
    noop_with_empty_axes: int = 0,
) -> Value:
    along = _reduced_axes(x, axes, noop_with_empty_axes)
    if along == []:
        return dy
    if isinstance(along, Value):
        elements: float | Value = op.CastLike(op.Div(op.Size(x), op.Size(y)), x)
    else:
        elements = count(op, x, along)
    return _repeated(op, op.Div(_kept(op, dy, along, keepdims), elements), x, along)


@vjp("ReduceMax", "ReduceMin")
def reduce_extremum(
    op: Emitter,
    dy: Value,
    y: Value,
    x: Value,
    axes: Value | None = None,
    *,
    keepdims: int = 1,
    noop_with_empty_axes: int = 0,
) -> Value:
    """Elements that tie share the gradient equally, as in torch.amax and torch.amin."""
    along = _reduced_axes(x, axes, noop_with_empty_axes)
    if along == []:
        return dy
    chosen = op.CastLike(op.Equal(x, _kept(op, y, along, keepdims)), x)
    ties = _reduce(op, "ReduceSum", chosen, along, noop_with_empty_axes)
    return op.Mul(chosen, op.Div(_kept(op, dy, along, keepdims), ties))


@vjp("ReduceL1")
def reduce_l1(
    op: Emitter,
    dy: Value,
    y: Value,
    x: Value,
    axes: Value | None = None,
    *,
    keepdims: int = 1,
    noop_with_empty_axes: int = 0,
) -> Value:
    along = _reduced_axes(x, axes, noop_with_empty_axes)
    return op.Mul(op.Sign(x), _kept(op, dy, along, keepdims))


@vjp("ReduceL2")
def reduce_l2(
    op: Emitter,
    dy: Value,
    y: Value,
    x: Value,
    axes: Value | None = None,
    *,
    keepdims: int = 1,
    noop_with_empty_axes: int = 0,
) -> Value:
    """The slope is x / y; 0 where the norm is 0, as in torch."""
    along = _reduced_axes(x, axes, noop_with_empty_axes)
    positive = op.Greater(y, 0.0)
    share = op.Where(positive, op.Div(dy, op.Where(positive, y, 1.0)), 0.0)
    return op.Mul(x, _kept(op, share, along, keepdims))


@vjp("ReduceSumSquare")
def reduce_sum_square(
    op: Emitter,
    dy: Value,
    y: Value,
    x: Value,
    axes: Value | None = None,
    *,
    keepdims: int = 1,
    noop_with_empty_axes: int = 0,
) -> Value:
    along = _reduced_axes(x, axes, noop_with_empty_axes)
    return op.Mul(x, _kept(op, op.Mul(dy, 2.0), along, keepdims))


@vjp("ReduceLogSum")
def reduce_log_sum(
    op: Emitter,
    dy: Value,
    y: Value,
    x: Value,
    axes: Value | None = None,
    *,
    keepdims: int = 1,
    noop_with_empty_axes: int = 0,
) -> Value:
    along = _reduced_axes(x, axes, noop_with_empty_axes)
    return _repeated(op, _kept(op, op.Div(dy, op.Exp(y)), along, keepdims), x, along)


@vjp("ReduceLogSumExp")
def reduce_log_sum_exp(
    op: Emitter,
    dy: Value,
    y: Value,
    x: Value,
    axes: Value | None = None,
    *,
    keepdims: int = 1,
    noop_with_empty_axes: int = 0,
) -> Value:
    along = _reduced_axes(x, axes, noop_with_empty_axes)
    softmax = op.Exp(op.Sub(x, _kept(op, y, along, keepdims)))
    return op.Mul(softmax, _kept(op, dy, along, keepdims))


@vjp("ReduceProd")
def reduce_prod(
    op: Emitter,
    dy: Value,
    y: Value,
    x: Value,
    axes: Value | None = None,
    *,
    keepdims: int = 1,
    noop_with_empty_axes: int = 0,
) -> Value:
    """The product of the other elements, also where some are zero."""
    along = _reduced_axes(x, axes, noop_with_empty_axes)
    if along == []:
        return dy
    zero = op.Equal(x, 0.0)
    nonzero = op.Where(zero, 1.0, x)
    zeros = op.CastLike(zero, x)
    other_zeros = op.Sub(_reduce(op, "ReduceSum", zeros, along, noop_with_empty_axes), zeros)
    others = op.Div(_reduce(op, "ReduceProd", nonzero, along, noop_with_empty_axes), nonzero)
    product = op.Where(op.Equal(other_zeros, 0.0), others, 0.0)
    return op.Mul(product, _kept(op, dy, along, keepdims))


@vjp("CumSum")
def cum_sum(
    op: Emitter, dy: Value, y: Value, x: Value, axis: Value, *, exclusive: int = 0, reverse: int = 0
) -> Value:
    return op.CumSum(dy, axis, exclusive=exclusive, reverse=1 - reverse)


@vjp("CumProd")
def cum_prod(
    op: Emitter, dy: Value, y: Value, x: Value, axis: Value, *, exclusive: int = 0, reverse: int = 0
) -> Value:
    """Running sums of dy y from the other end, divided by x. Behind a zero there is no gradient; at the
    first zero it is that sum with 1 in the place of the zero.
    """

    def later(v: Value) -> Value:
        return op.CumSum(v, axis, exclusive=exclusive, reverse=1 - reverse)

    zero = op.Equal(x, 0.0)
    zeros = op.CumSum(op.CastLike(zero, x), axis, reverse=reverse)
    first = op.And(zero, op.Equal(zeros, 1.0))
    without_first = op.CumProd(op.Where(first, 1.0, x), axis, exclusive=exclusive, reverse=reverse)
    before = op.Div(later(op.Mul(dy, y)), op.Where(zero, 1.0, x))
    at_first = op.Where(first, later(op.Mul(dy, without_first)), 0.0)
    return op.Where(op.Equal(zeros, 0.0), before, at_first)
