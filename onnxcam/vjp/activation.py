"""Activation functions and softmax."""

import math

from onnx_ir import Value

from onnxcam.emit import Emitter
from onnxcam.vjp.registry import vjp
from onnxcam.vjp.shapes import unbroadcast


@vjp("Relu")
def relu(op: Emitter, dy: Value, y: Value, x: Value) -> Value:
    return op.Where(op.Greater(y, 0.0), dy, 0.0)


@vjp("LeakyRelu")
def leaky_relu(op: Emitter, dy: Value, y: Value, x: Value, *, alpha: float = 0.01) -> Value:
    return op.Where(op.Greater(x, 0.0), dy, op.Mul(dy, alpha))


@vjp("PRelu")
def prelu(op: Emitter, dy: Value, y: Value, x: Value, slope: Value) -> tuple[Value | None, Value | None]:
    positive = op.Greater(x, 0.0)
    dslope = op.Where(positive, 0.0, op.Mul(dy, x))
    return op.Where(positive, dy, op.Mul(dy, slope)), unbroadcast(op, dslope, slope, y)


@vjp("Clip")
def clip(
    op: Emitter,
    dy: Value,
    y: Value,
    x: Value,
    low: Value | None = None,
    high: Value | None = None,
) -> Value:
    if low is not None:
        dy = op.Where(op.Greater(y, low), dy, 0.0)
    if high is not None:
        dy = op.Where(op.Less(y, high), dy, 0.0)
    return dy


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
    return op.Where(inside, op.Mul(dy, alpha), 0.0)


@vjp("HardSwish")
def hard_swish(op: Emitter, dy: Value, y: Value, x: Value) -> Value:
    """Y = x clip(x/6 + 1/2, 0, 1): the slope is x/3 + 1/2 for -3 < x < 3."""
    inside = op.Mul(dy, op.Add(op.Div(x, 3.0), 0.5))
    return op.Where(op.Greater(x, -3.0), op.Where(op.Less(x, 3.0), inside, dy), 0.0)


@vjp("Elu")
def elu(op: Emitter, dy: Value, y: Value, x: Value, *, alpha: float = 1.0) -> Value:
    return op.Where(op.Greater(x, 0.0), dy, op.Mul(dy, op.Add(y, alpha)))


@vjp("Gelu")
def gelu(op: Emitter, dy: Value, y: Value, x: Value, *, approximate: str = "none") -> Value:
    """Hendrycks and Gimpel 2016; the tanh form is differentiated as it is written."""
    if approximate == "tanh":
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


@vjp("Softplus")
def softplus(op: Emitter, dy: Value, y: Value, x: Value) -> Value:
    return op.Mul(dy, op.Sigmoid(x))


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
