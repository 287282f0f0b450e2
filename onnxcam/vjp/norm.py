"""Normalisation layers, as they behave at inference."""

from onnx_ir import DataType, Value

from onnxcam.emit import Emitter
from onnxcam.errors import OnnxcamError
from onnxcam.vjp.registry import vjp
from onnxcam.vjp.shapes import (
    axes_of,
    constant_array,
    extent,
    is_constant,
    joined,
    rank,
    reshape_like,
    unbroadcast,
)

Triple = tuple[Value, Value | None, Value | None]


def _wide(op: Emitter, x: Value) -> Value:
    """Return `x` in float32 if it has half precision, in which sums of squares overflow."""
    half = x.dtype is not None and x.dtype.bitwidth < 32
    return op.Cast(x, to=DataType.FLOAT) if half else x


def _as(op: Emitter, v: Value, x: Value) -> Value:
    """Return `v` in the dtype of `x`."""
    return v if v.dtype == x.dtype else op.CastLike(v, x)


def _per_channel(op: Emitter, v: Value, x: Value) -> Value:
    """View a vector with one entry per channel (axis 1) so that it broadcasts against `x`."""
    return op.Reshape(v, [-1] + [1] * (rank(x) - 2))


def _channel_sum(op: Emitter, v: Value, parameter: Value) -> Value | None:
    """The gradient of a vector with one entry per channel (axis 1); `v` is what each element adds to it."""
    if is_constant(parameter):
        return None
    return _as(op, op.ReduceSum(v, [0, *range(2, rank(v))], keepdims=0), parameter)


def _normalised(op: Emitter, x: Value, axes: list[int], epsilon: float) -> tuple[Value, Value]:
    """Return (x - mean) / deviation and 1 / deviation along `axes`."""
    centred = op.Sub(x, op.ReduceMean(x, axes, keepdims=1))
    return _scaled(op, centred, axes, epsilon)


def _scaled(op: Emitter, x: Value, axes: list[int], epsilon: float) -> tuple[Value, Value]:
    """Return x / sqrt(mean(x^2) + epsilon) and the divisor's reciprocal, the mean being along `axes`."""
    square = op.ReduceMean(op.Mul(x, x), axes, keepdims=1)
    inverse = op.Reciprocal(op.Sqrt(op.Add(square, epsilon)))
    return op.Mul(x, inverse), inverse


def _through_scaled(op: Emitter, dy: Value, normal: Value, inverse: Value, axes: list[int]) -> Value:
    """Pass `dy`, the gradient of `normal`, back through `_scaled`."""
    aligned = op.Mul(normal, op.ReduceMean(op.Mul(dy, normal), axes, keepdims=1))
    return op.Mul(op.Sub(dy, aligned), inverse)


def _through_normalised(op: Emitter, dy: Value, normal: Value, inverse: Value, axes: list[int]) -> Value:
    """Pass `dy`, the gradient of `normal`, back through `_normalised`."""
    centred = op.Sub(dy, op.ReduceMean(dy, axes, keepdims=1))
    return _through_scaled(op, centred, normal, inverse, axes)


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
) -> tuple[Value | None, ...]:
    if training_mode:
        raise OnnxcamError("BatchNormalization is in training mode; export the model in evaluation mode")
    inverse = op.Reciprocal(op.Sqrt(op.Add(_wide(op, variance), epsilon)))
    factor = op.Mul(_as(op, scale, inverse), inverse)
    dx = op.Mul(dy, _per_channel(op, _as(op, factor, dy), dy))
    if all(is_constant(v) for v in (scale, bias, mean, variance)):
        return dx, None, None, None, None
    wide = _as(op, dy, inverse)
    centred = op.Sub(_as(op, x, inverse), _per_channel(op, _as(op, mean, inverse), x))
    normal = op.Mul(centred, _per_channel(op, inverse, x))
    scaled = op.Mul(wide, _per_channel(op, factor, x))
    through_variance = op.Mul(op.Mul(scaled, normal), _per_channel(op, op.Mul(inverse, -0.5), x))
    return (
        dx,
        _channel_sum(op, op.Mul(wide, normal), scale),
        _channel_sum(op, wide, bias),
        _channel_sum(op, op.Neg(scaled), mean),
        _channel_sum(op, through_variance, variance),
    )


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
) -> Triple:
    axes = list(range(axis % rank(x), rank(x)))
    normal, inverse = _normalised(op, _wide(op, x), axes, epsilon)
    wide = _as(op, dy, normal)
    dx = _through_normalised(op, op.Mul(wide, _as(op, scale, normal)), normal, inverse, axes)
    dscale = None if is_constant(scale) else unbroadcast(op, op.Mul(wide, normal), scale, y)
    dbias = None if bias is None or is_constant(bias) else unbroadcast(op, dy, bias, y)
    return _as(op, dx, x), None if dscale is None else _as(op, dscale, scale), dbias


@vjp("RMSNormalization")
def rms_normalization(
    op: Emitter,
    dy: Value,
    y: Value,
    x: Value,
    scale: Value,
    *,
    axis: int = -1,
    epsilon: float = 1e-5,
    stash_type: int = 1,
) -> tuple[Value, Value | None]:
    axes = list(range(axis % rank(x), rank(x)))
    normal, inverse = _scaled(op, _wide(op, x), axes, epsilon)
    wide = _as(op, dy, normal)
    dx = _through_scaled(op, op.Mul(wide, _as(op, scale, normal)), normal, inverse, axes)
    dscale = None if is_constant(scale) else unbroadcast(op, op.Mul(wide, normal), scale, y)
    return _as(op, dx, x), None if dscale is None else _as(op, dscale, scale)


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
) -> Triple:
    axes = list(range(2, rank(x)))
    normal, inverse = _normalised(op, _wide(op, x), axes, epsilon)
    wide = _as(op, dy, normal)
    scaled = op.Mul(wide, _per_channel(op, _as(op, scale, normal), x))
    dx = _through_normalised(op, scaled, normal, inverse, axes)
    dscale = _channel_sum(op, op.Mul(wide, normal), scale)
    return _as(op, dx, x), dscale, _channel_sum(op, wide, bias)


@vjp("GroupNormalization")
def group_normalization(
    op: Emitter,
    dy: Value,
    y: Value,
    x: Value,
    scale: Value,
    bias: Value,
    *,
    epsilon: float = 1e-5,
    num_groups: int,
    stash_type: int = 1,
) -> Triple:
    """In opset 18 scale and bias have an entry per group, since 21 one per channel.

    Seen as [groups, entries per group, 1, ...] both broadcast against the picture in groups.
    """
    n = rank(x) - 2
    pictured = _in_groups(op, _wide(op, x), num_groups)
    axes = list(range(2, rank(pictured)))
    normal, inverse = _normalised(op, pictured, axes, epsilon)
    wide = _in_groups(op, _as(op, dy, normal), num_groups)

    def grouped(v: Value) -> Value:
        return op.Reshape(_as(op, v, normal), [num_groups, -1] + [1] * n)

    def summed(v: Value, parameter: Value) -> Value | None:
        if is_constant(parameter):
            return None
        total = unbroadcast(op, v, grouped(parameter), normal)
        assert total is not None
        return _as(op, op.Reshape(total, [-1]), parameter)

    dx = _through_normalised(op, op.Mul(wide, grouped(scale)), normal, inverse, axes)
    dscale = summed(op.Mul(wide, normal), scale)
    return _as(op, reshape_like(op, dx, x), x), dscale, summed(wide, bias)


def _in_groups(op: Emitter, v: Value, groups: int) -> Value:
    """View [N, C, *spatial] as [N, groups, C/groups, *spatial]."""
    spatial = (extent(op, v, axis) for axis in range(2, rank(v)))
    return op.Reshape(v, joined(op, [0, groups, -1, *spatial]))


@vjp("MeanVarianceNormalization")
def mean_variance_normalization(
    op: Emitter, dy: Value, y: Value, x: Value, *, axes: list[int] | None = None
) -> Value:
    """Y = (x - mean) / (deviation + 1e-9), along the axes [0, 2, 3] by default."""
    along = axes_of(axes or [0, 2, 3], rank(x))
    wide, slope, normal = _wide(op, x), _wide(op, dy), _wide(op, y)
    centred = op.Sub(wide, op.ReduceMean(wide, along, keepdims=1))
    deviation = op.Sqrt(op.ReduceMean(op.Mul(centred, centred), along, keepdims=1))
    aligned = op.Div(op.ReduceMean(op.Mul(slope, normal), along, keepdims=1), op.Max(deviation, 1e-9))
    direct = op.Sub(slope, op.ReduceMean(slope, along, keepdims=1))
    dx = op.Sub(op.Div(direct, op.Add(deviation, 1e-9)), op.Mul(normal, aligned))
    return _as(op, dx, x)


@vjp("LpNormalization")
def lp_normalization(op: Emitter, dy: Value, y: Value, x: Value, *, axis: int = -1, p: int = 2) -> Value:
    """Y = x / |x|_p with p 1 or 2; where the norm is 0, so is the gradient."""
    norm = (op.ReduceL1 if p == 1 else op.ReduceL2)(x, [axis], keepdims=1)
    along = op.ReduceSum(op.Mul(dy, y), [axis], keepdims=1)
    direct = op.Sub(dy, op.Mul(op.Sign(x) if p == 1 else y, along))
    zero = op.Equal(norm, 0.0)
    return op.Where(zero, 0.0, op.Div(direct, op.Where(zero, 1.0, norm)))


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
        return op.Sum(*[op.Slice(padded, [i], op.Add(channels, i), [1]) for i in range(size)])

    channels = op.Shape(x, start=1, end=2)
    before = (size - 1) // 2
    wide, slope = _wide(op, x), _wide(op, dy)
    d = op.Add(op.Mul(neighbours(op.Mul(wide, wide), before), alpha / size), bias)
    across = neighbours(op.Mul(slope, op.Div(_wide(op, y), d)), size - 1 - before)
    dx = op.Sub(op.Mul(slope, op.Pow(d, -beta)), op.Mul(op.Mul(wide, across), 2.0 * alpha * beta / size))
    return _as(op, dx, x)


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
