"""Activation functions and softmax."""

import functools
import math

from onnx_ir import Value

from onnxcam.emit import Emitter
from onnxcam.vjp.registry import vjp
from onnxcam.vjp.shapes import gated, is_constant, unbroadcast


@vjp("Relu")
def relu(op: Emitter, dy: Value, y: Value, x: Value) -> Value:
    return gated(op, dy, op.Greater(y, 0.0))


@vjp("LeakyRelu")
def leaky_relu(op: Emitter, dy: Value, y: Value, x: Value, *, alpha: float = 0.01) -> Value:
    positive = op.Greater(y if alpha >= 0 else x, 0.0)
    return op.Where(positive, dy, op.Mul(dy, alpha))


@vjp("PRelu")
def prelu(op: Emitter, dy: Value, y: Value, x: Value, slope: Value) -> tuple[Value, Value | None]:
    positive = op.Greater(x, 0.0)
    dx = op.Where(positive, dy, op.Mul(dy, slope))
    if is_constant(slope):
        return dx, None
    return dx, unbroadcast(op, op.Where(positive, 0.0, op.Mul(dy, x)), slope, y)


@vjp("ThresholdedRelu")
def thresholded_relu(op: Emitter, dy: Value, y: Value, x: Value, *, alpha: float = 1.0) -> Value:
    return gated(op, dy, op.Greater(y if alpha >= 0 else x, alpha))


@vjp("Clip")
def clip(
    op: Emitter,
    dy: Value,
    y: Value,
    x: Value,
    low: Value | None = None,
    high: Value | None = None,
) -> tuple[Value, Value | None, Value | None]:
    """0 at the bounds, as in torch's ReLU6 and Hardtanh. Where the bounds cross, Y is the upper one."""
    inside: list[Value] = []
    dlow, dhigh = None, None
    if low is not None:
        inside.append(op.Greater(y, low))
        if not is_constant(low):
            clipped = op.Less(x, low)
            if high is not None:
                clipped = op.And(clipped, op.Less(low, high))
            dlow = unbroadcast(op, op.Where(clipped, dy, 0.0), low, y)
    if high is not None:
        inside.append(op.Less(y, high))
        if not is_constant(high):
            clipped = op.Greater(x, high)
            if low is not None:
                clipped = op.Or(clipped, op.Greater(low, high))
            dhigh = unbroadcast(op, op.Where(clipped, dy, 0.0), high, y)
    dx = gated(op, dy, functools.reduce(op.And, inside)) if inside else dy
    return dx, dlow, dhigh


@vjp("Shrink")
def shrink(op: Emitter, dy: Value, y: Value, x: Value, *, bias: float = 0.0, lambd: float = 0.5) -> Value:
    return gated(op, dy, op.Or(op.Less(x, -lambd), op.Greater(x, lambd)))


@vjp("Sigmoid")
def sigmoid(op: Emitter, dy: Value, y: Value, x: Value) -> Value:
    return op.Mul(dy, op.Mul(y, op.Sub(1.0, y)))


@vjp("Tanh")
def tanh(op: Emitter, dy: Value, y: Value, x: Value) -> Value:
    return op.Mul(dy, op.Sub(1.0, op.Mul(y, y)))


@vjp("HardSigmoid")
def hard_sigmoid(
    op: Emitter, dy: Value, y: Value, x: Value, *, alpha: float = 0.2, beta: float = 0.5
) -> Value:
    inside = op.And(op.Greater(y, 0.0), op.Less(y, 1.0))
    return gated(op, op.Mul(dy, alpha), inside)


@vjp("HardSwish")
def hard_swish(op: Emitter, dy: Value, y: Value, x: Value) -> Value:
    """Y = x clip(x/6 + 1/2, 0, 1): the slope is x/3 + 1/2 for -3 < x < 3."""
    bent = gated(op, op.Add(op.Div(x, 3.0), 0.5), op.And(op.Greater(x, -3.0), op.Less(x, 3.0)))
    return op.Mul(dy, op.Add(bent, op.CastLike(op.GreaterOrEqual(x, 3.0), x)))


@vjp("Elu")
def elu(op: Emitter, dy: Value, y: Value, x: Value, *, alpha: float = 1.0) -> Value:
    positive = op.Greater(y if alpha >= 0 else x, 0.0)
    return op.Where(positive, dy, op.Mul(dy, op.Add(y, alpha)))


@vjp("Celu")
def celu(op: Emitter, dy: Value, y: Value, x: Value, *, alpha: float = 1.0) -> Value:
    return op.Where(op.Greater(y, 0.0), dy, op.Mul(dy, op.Add(op.Div(y, alpha), 1.0)))


@vjp("Selu")
def selu(
    op: Emitter,
    dy: Value,
    y: Value,
    x: Value,
    *,
    alpha: float = 1.67326319217681884765625,
    gamma: float = 1.05070102214813232421875,
) -> Value:
    positive = op.Greater(y if alpha >= 0 and gamma > 0 else x, 0.0)
    return op.Where(positive, op.Mul(dy, gamma), op.Mul(dy, op.Add(y, alpha * gamma)))


@vjp("Gelu")
def gelu(op: Emitter, dy: Value, y: Value, x: Value, *, approximate: str = "none") -> Value:
    """Hendrycks and Gimpel 2016; the tanh form is differentiated as it is written."""
    if approximate == "tanh":
        # Beyond +-10 the slope is 1 or 0 to the last digit, and x^3 may overflow float16.
        x = op.Clip(x, -10.0, 10.0)
        scale = math.sqrt(2.0 / math.pi)
        squared = op.Mul(x, x)
        t = op.Tanh(op.Mul(op.Mul(x, op.Add(op.Mul(squared, 0.044715), 1.0)), scale))
        inner = op.Mul(op.Add(op.Mul(squared, 3 * 0.044715), 1.0), scale)
        dt = op.Mul(op.Sub(1.0, op.Mul(t, t)), inner)
        slope = op.Mul(op.Add(op.Add(t, 1.0), op.Mul(x, dt)), 0.5)
    else:
        cumulative = op.Mul(op.Add(op.Erf(op.Mul(x, math.sqrt(0.5))), 1.0), 0.5)
        density = op.Mul(op.Exp(op.Mul(op.Mul(x, x), -0.5)), 1.0 / math.sqrt(2.0 * math.pi))
        slope = op.Add(cumulative, op.Mul(x, density))
    return op.Mul(dy, slope)


@vjp("Swish")
def swish(op: Emitter, dy: Value, y: Value, x: Value, *, alpha: float = 1.0) -> Value:
    """Y = x s with s = sigmoid(alpha x): the slope is s + alpha y (1 - s)."""
    s = op.Sigmoid(op.Mul(x, alpha))
    return op.Mul(dy, op.Add(s, op.Mul(op.Mul(y, op.Sub(1.0, s)), alpha)))


@vjp("SwiGLU")
def swiglu(
    op: Emitter, dy: Value, y: Value, a: Value, b: Value, *, alpha: float = 1.0
) -> tuple[Value, Value]:
    """Y = swish(a) b."""
    gate = op.Mul(a, op.Sigmoid(op.Mul(a, alpha)))
    return swish(op, op.Mul(dy, b), gate, a, alpha=alpha), op.Mul(dy, gate)


@vjp("Softplus")
def softplus(op: Emitter, dy: Value, y: Value, x: Value) -> Value:
    return op.Mul(dy, op.Sigmoid(x))


@vjp("Softsign")
def softsign(op: Emitter, dy: Value, y: Value, x: Value) -> Value:
    """Y = x / (1 + |x|): the slope is (1 - |y|)^2."""
    rest = op.Sub(1.0, op.Abs(y))
    return op.Mul(dy, op.Mul(rest, rest))


@vjp("Mish")
def mish(op: Emitter, dy: Value, y: Value, x: Value) -> Value:
    t = op.Tanh(op.Softplus(x))
    inner = op.Mul(op.Mul(x, op.Sigmoid(x)), op.Sub(1.0, op.Mul(t, t)))
    return op.Mul(dy, op.Add(t, inner))


@vjp("Softmax")
def softmax(op: Emitter, dy: Value, y: Value, x: Value, *, axis: int = -1) -> Value:
    weighted = op.Mul(dy, y)
    return op.Sub(weighted, op.Mul(y, op.ReduceSum(weighted, [axis], keepdims=1)))


@vjp("LogSoftmax")
def log_softmax(op: Emitter, dy: Value, y: Value, x: Value, *, axis: int = -1) -> Value:
    return op.Sub(dy, op.Mul(op.Exp(y), op.ReduceSum(dy, [axis], keepdims=1)))


@vjp("Hardmax")
def hardmax(op: Emitter, dy: Value, y: Value, x: Value, *, axis: int = -1) -> None:
    """Piecewise constant."""
