"""Quantisation, with the straight-through estimator (Bengio et al. 2013, arXiv:1308.3432).

The gradient of a quantised value is a float32 value, whatever its own type: the gradient with respect
to the number that it stores.

onnxruntime computes an operator between DequantizeLinear and QuantizeLinear on stored numbers, as long as
nothing else reads what it makes. So no rule reads that.
"""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir import DataType, Value

from onnxcam.emit import Emitter
from onnxcam.vjp.registry import vjp
from onnxcam.vjp.shapes import (
    add_at,
    constant_array,
    dims,
    gated,
    is_constant,
    positions,
    rank,
    reshape_like,
    unbroadcast,
)

_HEAVY = ("Conv", "ConvTranspose", "Einsum", "Gemm", "MatMul")
_JOINED = ("Clip", "Relu")
"""Activations that onnxruntime computes together with the operator before them."""

_KEEPING = (
    "AveragePool", "Flatten", "Gather", "GlobalAveragePool", "GlobalMaxPool", "Identity", "MaxPool",
    "ReduceMax", "ReduceMean", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze",
)  # fmt: skip
"""Operators that make nothing greater or less than all that they read."""


def dequantised(value: Value) -> Value | None:
    """Return the stored numbers of which `value` is the floating-point view; None: it is no such view."""
    node = value.producer()
    return node.inputs[0] if node is not None and node.op_type == "DequantizeLinear" else None


def unit(x: Value) -> list[ir.Node]:
    """Return the nodes that make `x` of nothing but dequantised numbers and constants, in order."""
    nodes = [node] if (node := x.producer()) is not None else []
    while nodes and nodes[-1].op_type in _JOINED and nodes[-1].inputs[0] is not None:
        before = nodes[-1].inputs[0].producer()
        if before is None or before.op_type == "DequantizeLinear":
            break
        nodes.append(before)
    data = [v for v in nodes[-1].inputs if v is not None and not is_constant(v)] if nodes else []
    return nodes[::-1] if data and all(dequantised(v) is not None for v in data) else []


def is_heavy(nodes: Sequence[ir.Node]) -> bool:
    """Whether it costs a convolution or a matrix product to run the nodes of a `unit` again."""
    return nodes[0].op_type in _HEAVY


def copied(op: Emitter, nodes: Sequence[ir.Node]) -> Value:
    """Emit the nodes of a `unit` again and return what the last of them computes."""
    copies: dict[Value, Value] = {}
    for node in nodes:
        copies.update(zip(node.outputs, op.copy(node, copies), strict=True))
    return copies[nodes[-1].outputs[0]]


def by_arithmetic(
    op: Emitter, x: Value, scale: Value | None, zero: Value | None, axis: int, block_size: int
) -> Value:
    """Emit DequantizeLinear as Cast, Sub and Mul.

    onnxruntime moves a DequantizeLinear over other nodes and has crashed on that where a Scan is near
    (1.32). This it leaves alone, and works it out beforehand for weights.
    """
    assert scale is not None
    along = axis % max(rank(x), 1)
    wide, step = op.Cast(x, to=DataType.FLOAT), _spread(op, scale, x, along, block_size)
    shift = None if zero is None else constant_array(zero)
    if zero is not None and (shift is None or shift.astype(np.float32).any()):
        wide = op.Sub(wide, _spread(op, zero, x, along, block_size))
    return _as(op, op.Mul(wide, step), scale.dtype)


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


def as_stored(op: Emitter, dy: Value, x: Value, scale: Value, axis: int, block_size: int) -> Value:
    """Return the gradient of `x` from that of the numbers it is stored as, where nothing is clamped."""
    step = _spread(op, scale, x, axis % max(rank(x), 1), block_size)
    return _as(op, _divided(op, _as(op, dy, DataType.FLOAT), step), x.dtype)


def _within_ends(op: Emitter, y: Value) -> Value:
    """Whether the stored numbers `y` lie between the ends of their range."""
    assert y.dtype is not None
    low, high = int(y.dtype.min), int(y.dtype.max)
    if y.dtype.bitwidth == 8:
        return op.Equal(y, op.Clip(y, low + 1, high - 1))
    stored = op.Cast(y, to=DataType.FLOAT)
    return op.And(op.Greater(stored, float(low)), op.Less(stored, float(high)))


def _divided(op: Emitter, dy: Value, step: Value) -> Value:
    """Return ``dy / step``, without a second step over what was just multiplied by it."""
    node = dy.producer()
    if node is not None and node.op_type == "Mul" and node.inputs[1] is step and node in op.nodes:
        assert node.inputs[0] is not None
        return node.inputs[0]
    return op.Div(dy, step)


def _fits(x: Value, y: Value, scale: Value, zero: Value | None) -> bool:
    """Whether nothing of `x` can lie outside of the range of `y`, its quantised form."""
    within, room = _range(x), _numbers(y, scale, zero)
    if within is None or room is None or y.dtype is None or not y.dtype.is_integer():
        return False
    half = (room[1] - room[0]) / (float(y.dtype.max) - float(y.dtype.min)) / 2
    return room[0] - half <= within[0] and within[1] <= room[1] + half


def _range(x: Value) -> tuple[float, float] | None:
    """Return the least and the greatest number that `x` can hold, if dequantised numbers bound it."""
    node = x.producer()
    if node is None or not node.inputs or node.inputs[0] is None:
        return None
    if node.op_type == "DequantizeLinear":
        return _numbers(*node.inputs)  # type: ignore[arg-type]
    if node.op_type in ("Sigmoid", "HardSigmoid", "Softmax"):
        return 0.0, 1.0
    if node.op_type not in (*_KEEPING, "Relu", "Concat"):
        return None
    parts = [
        _range(v) for v in (node.inputs if node.op_type == "Concat" else node.inputs[:1]) if v is not None
    ]
    known = [part for part in parts if part is not None]
    if len(known) < len(parts):
        return None
    low, high = min(part[0] for part in known), max(part[1] for part in known)
    return (max(low, 0.0), max(high, 0.0)) if node.op_type == "Relu" else (low, high)


def _numbers(stored: Value, scale: Value, zero: Value | None = None) -> tuple[float, float] | None:
    """Return the least and the greatest number that `stored` can stand for."""
    step, middle = constant_array(scale), None if zero is None else constant_array(zero)
    if step is None or step.size != 1 or (zero is not None and middle is None) or stored.dtype is None:
        return None
    shift = 0.0 if middle is None else float(middle.reshape(()))
    low, high = float(stored.dtype.min), float(stored.dtype.max)
    return (low - shift) * float(step.reshape(())), (high - shift) * float(step.reshape(()))


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

    After a convolution or a matrix product on stored numbers only the result tells: there the two ends of
    the range count as clamped. (A Relu that quantisation made part of the range is such a clamp.) With the
    rule of `dequantize_linear`, the gradient of the scale is that of Esser et al. 2020 (arXiv:1902.08153),
    eq. 3.
    """
    assert y.dtype is not None
    along = axis % max(rank(x), 1)
    step = _spread(op, scale, x, along, block_size)
    low, high = float(y.dtype.min), float(y.dtype.max)
    slope = _divided(op, _as(op, dy, DataType.FLOAT), step)
    if is_constant(scale):
        if _fits(x, y, scale, zero_point):
            return as_stored(op, dy, x, scale, axis, block_size), None
        nodes = unit(x)
        if nodes and is_heavy(nodes):
            return _as(op, gated(op, slope, _within_ends(op, y)), x.dtype), None
        x = copied(op, nodes) if nodes else x
    ratio = op.Div(_as(op, x, DataType.FLOAT), step)
    stored = op.Round(ratio) if y.dtype.is_integer() else ratio
    if zero_point is not None:
        stored = op.Add(stored, _spread(op, zero_point, x, along, block_size))
    inside = op.And(op.GreaterOrEqual(stored, low), op.LessOrEqual(stored, high))
    slope = gated(op, slope, inside)
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


@vjp("DynamicQuantizeLinear")
def dynamic_quantize_linear(
    op: Emitter, dys: tuple[Value | None, ...], ys: tuple[Value, ...], x: Value
) -> Value | None:
    """The range is that of the values, so nothing is clamped; scale and zero point count as given."""
    return None if dys[0] is None else op.Div(dys[0], ys[1])
