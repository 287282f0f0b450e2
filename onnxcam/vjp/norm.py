"""Normalisation layers, as they behave at inference."""

from typing import Any

from onnx_ir import Value

from onnxcam.emit import Emitter
from onnxcam.errors import OnnxcamError
from onnxcam.vjp.registry import vjp
from onnxcam.vjp.shapes import constant_array, rank, unbroadcast


def _per_channel(op: Emitter, v: Value, x: Value) -> Value:
    """View a vector with one entry per channel (axis 1) so that it broadcasts against `x`."""
    return op.Reshape(v, [-1] + [1] * (rank(x) - 2))


def _normalised(op: Emitter, x: Value, axes: list[int], epsilon: float) -> tuple[Value, Value]:
    """Return (x - mean) / deviation and 1 / deviation along `axes`."""
    centred = op.Sub(x, op.ReduceMean(x, axes, keepdims=1))
    variance = op.ReduceMean(op.Mul(centred, centred), axes, keepdims=1)
    inverse = op.Reciprocal(op.Sqrt(op.Add(variance, epsilon)))
    return op.Mul(centred, inverse), inverse


def _through_normalised(op: Emitter, dy: Value, normal: Value, inverse: Value, axes: list[int]) -> Value:
    """Pass `dy`, the gradient of `normal`, back through `_normalised`."""
    mean = op.ReduceMean(dy, axes, keepdims=1)
    aligned = op.Mul(normal, op.ReduceMean(op.Mul(dy, normal), axes, keepdims=1))
    return op.Mul(op.Sub(op.Sub(dy, mean), aligned), inverse)


@vjp("BatchNormalization")
def batch_normalization(
    op: Emitter,
    dy: Value,
    y: Value,
    x: Value,
    scale: Value,
    bias: Value,
    mean: Value,
    variance: Value,
    *,
    epsilon: float = 1e-5,
    momentum: float = 0.9,
    training_mode: int = 0,
) -> Value:
    if training_mode:
        raise OnnxcamError("BatchNormalization is in training mode; export the model in evaluation mode")
    factor = op.Div(scale, op.Sqrt(op.Add(variance, epsilon)))
    return op.Mul(dy, _per_channel(op, op.CastLike(factor, x), x))


@vjp("LayerNormalization")
def layer_normalization(
    op: Emitter,
    dy: Value,
    y: Value,
    x: Value,
    scale: Value,
    bias: Value | None = None,
    *,
    axis: int = -1,
    epsilon: float = 1e-5,
    stash_type: int = 1,
) -> tuple[Value, Value | None, Value | None]:
    axes = list(range(axis % rank(x), rank(x)))
    normal, inverse = _normalised(op, x, axes, epsilon)
    dx = _through_normalised(op, op.Mul(dy, scale), normal, inverse, axes)
    dscale = unbroadcast(op, op.Mul(dy, normal), scale, y)
    dbias = None if bias is None else unbroadcast(op, dy, bias, y)
    return dx, dscale, dbias


@vjp("InstanceNormalization")
def instance_normalization(
    op: Emitter,
    dy: Value,
    y: Value,
    x: Value,
    scale: Value,
    bias: Value,
    *,
    epsilon: float = 1e-5,
) -> Value:
    axes = list(range(2, rank(x)))
    normal, inverse = _normalised(op, x, axes, epsilon)
    return _through_normalised(op, op.Mul(dy, _per_channel(op, scale, x)), normal, inverse, axes)


@vjp("LRN")
def lrn(
    op: Emitter,
    dy: Value,
    y: Value,
    x: Value,
    *,
    size: int,
    alpha: float = 1e-4,
    beta: float = 0.75,
    bias: float = 1.0,
) -> Value:
    """Y = x d^-beta with d = bias + alpha/size * (sum of x^2 over `size` neighbouring channels)."""

    def neighbours(v: Value, before: int) -> Value:
        padding = [0, before] + [0] * (rank(x) - 1) + [size - 1 - before] + [0] * (rank(x) - 2)
        padded = op.Pad(v, padding)
        return op.ReduceSum(
            op.Concat(
                *[op.Unsqueeze(op.Slice(padded, [i], op.Add(channels, i), [1]), [0]) for i in range(size)],
                axis=0,
            ),
            [0],
            keepdims=0,
        )

    channels: Any = op.Shape(x, start=1, end=2)
    before = (size - 1) // 2
    d = op.Add(op.Mul(neighbours(op.Mul(x, x), before), alpha / size), bias)
    across = neighbours(op.Mul(dy, op.Div(y, d)), size - 1 - before)
    return op.Sub(op.Mul(dy, op.Pow(d, -beta)), op.Mul(op.Mul(x, across), 2.0 * alpha * beta / size))


@vjp("Dropout")
def dropout(
    op: Emitter,
    dy: Value,
    y: Value,
    x: Value,
    ratio: Value | None = None,
    training_mode: Value | None = None,
    *,
    seed: int | None = None,
) -> Value:
    if training_mode is not None:
        training = constant_array(training_mode)
        if training is None or bool(training):
            raise OnnxcamError("Dropout is in training mode; export the model in evaluation mode")
    return dy
