"""Quantisation, with the straight-through estimator (Bengio et al. 2013, arXiv:1308.3432).

The gradient of a quantised value is a float32 value, whatever its own type: the gradient with respect
to the number that it stores.
"""

from onnx_ir import DataType, Value

from onnxcam.emit import Emitter
from onnxcam.vjp.registry import vjp
from onnxcam.vjp.shapes import add_at, dims, is_constant, positions, rank, reshape_like, unbroadcast


def _as(op: Emitter, v: Value, dtype: DataType | None) -> Value:
    return v if v.dtype == dtype else op.Cast(v, to=int(dtype or DataType.FLOAT))


def _blocks(op: Emitter, x: Value, axis: int, block_size: int) -> Value:
    """The number of the block that each position along `axis` belongs to."""
    return op.Div(positions(op, x, axis), block_size)


def _spread(op: Emitter, v: Value, x: Value, axis: int, block_size: int) -> Value:
    """Bring a scale or a zero point to float32, and to a shape that broadcasts against `x`."""
    wide = _as(op, v, DataType.FLOAT)
    if block_size:
        return op.Gather(wide, _blocks(op, x, axis, block_size), axis=axis)
    if rank(v) == 0 or dims(v) == [1]:
        return wide
    return op.Reshape(wide, [-1] + [1] * (rank(x) - 1 - axis))


def _gathered(op: Emitter, v: Value, scale: Value, x: Value, axis: int, block_size: int) -> Value:
    """Sum `v`, shaped like `x`, into the shape of `scale`, and give it the dtype of `scale`."""
    if block_size:
        total = add_at(op, v, scale, _blocks(op, x, axis, block_size), axis)
    else:
        summed = unbroadcast(op, v, _spread(op, scale, x, axis, 0), x)
        assert summed is not None
        total = reshape_like(op, summed, scale)
    return _as(op, total, scale.dtype)


@vjp("QuantizeLinear")
def quantize_linear(
    op: Emitter,
    dy: Value,
    y: Value,
    x: Value,
    scale: Value,
    zero_point: Value | None = None,
    *,
    axis: int = 1,
    block_size: int = 0,
    output_dtype: int = 0,
    precision: int = 0,
    saturate: int = 1,
) -> tuple[Value, Value | None]:
    """Rounding counts as the identity; what was clamped to the range has no gradient.

    With that of `dequantize_linear`, the gradient of the scale is that of Esser et al. 2020
    (arXiv:1902.08153), eq. 3.
    """
    along = axis % max(rank(x), 1)
    step = _spread(op, scale, x, along, block_size)
    ratio = op.Div(_as(op, x, DataType.FLOAT), step)
    assert y.dtype is not None
    stored = op.Round(ratio) if y.dtype.is_integer() else ratio
    if zero_point is not None:
        stored = op.Add(stored, _spread(op, zero_point, x, along, block_size))
    low, high = float(y.dtype.min), float(y.dtype.max)
    inside = op.And(op.GreaterOrEqual(stored, low), op.LessOrEqual(stored, high))
    slope = op.Where(inside, op.Div(_as(op, dy, DataType.FLOAT), step), 0.0)
    dscale = None
    if not is_constant(scale):
        dscale = _gathered(op, op.Neg(op.Mul(slope, ratio)), scale, x, along, block_size)
    return _as(op, slope, x.dtype), dscale


@vjp("DequantizeLinear")
def dequantize_linear(
    op: Emitter,
    dy: Value,
    y: Value,
    x: Value,
    scale: Value,
    zero_point: Value | None = None,
    *,
    axis: int = 1,
    block_size: int = 0,
    output_dtype: int = 0,
) -> tuple[Value, Value | None]:
    along = axis % max(rank(x), 1)
    wide = _as(op, dy, DataType.FLOAT)
    dx = op.Mul(wide, _spread(op, scale, x, along, block_size))
    if is_constant(scale):
        return dx, None
    stored = _as(op, x, DataType.FLOAT)
    if zero_point is not None:
        stored = op.Sub(stored, _spread(op, zero_point, x, along, block_size))
    return dx, _gathered(op, op.Mul(wide, stored), scale, x, along, block_size)
