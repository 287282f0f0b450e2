"""Reductions along axes."""

from onnx_ir import Value

from onnxcam.emit import Emitter
from onnxcam.vjp.registry import vjp
from onnxcam.vjp.shapes import axes_of, constant_ints, count, expand_like, rank


def _reduced_axes(x: Value, axes: Value | None, noop_with_empty_axes: int) -> list[int]:
    given = constant_ints(axes, "the axes of a reduction")
    if given:
        return axes_of(given, rank(x))
    return [] if noop_with_empty_axes else list(range(rank(x)))


def _kept(op: Emitter, v: Value, axes: list[int], keepdims: int) -> Value:
    """Put back, with size 1, the axes that a reduction without keepdims has dropped."""
    return v if keepdims or not axes else op.Unsqueeze(v, axes)


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
    return expand_like(op, _kept(op, dy, along, keepdims), x, along) if along else dy


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
    if not along:
        return dy
    share = op.Div(_kept(op, dy, along, keepdims), count(op, x, along))
    return expand_like(op, share, x, along)


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
    if not along:
        return dy
    chosen = op.CastLike(op.Equal(x, _kept(op, y, along, keepdims)), x)
    ties = op.ReduceSum(chosen, along, keepdims=1)
    return op.Mul(chosen, op.Div(_kept(op, dy, along, keepdims), ties))
