"""Activation functions and softmax."""

import math

from onnx_ir import Value

from onnxcam.emit import Emitter
from onnxcam.vjp.registry import vjp
from onnxcam.vjp.shapes import complement, constant_array, gated, is_constant, step, unbroadcast


@vjp("Relu")
def relu(op: Emitter, dy: Value, y: Value, x: Value) -> Value:
    return op.Mul(dy, step(op, y, 0.0))


@vjp("LeakyRelu")
def leaky_relu(op: Emitter, dy: Value, y: Value, x: Value, *, alpha: float = 0.01) -> Value:
    if 0 <= alpha <= 1:
        return op.Mul(dy, op.Clip(step(op, y, 0.0), alpha, 1.0))
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
    return op.Mul(dy, step(op, y if alpha >= 0 else x, alpha))


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
    dx = dy
    dlow, dhigh = None, None
    if low is not None:
        dx = op.Mul(dx, _step(op, y, low))
        if not is_constant(low):
            clipped = op.Less(x, low)
            if high is not None:
                clipped = op.And(clipped, op.Less(low, high))
            dlow = unbroadcast(op, op.Where(clipped, dy, 0.0), low, y)
    if high is not None:
        dx = op.Mul(dx, _step(op, y, high, rises=False))
        if not is_constant(high):
            clipped = op.Greater(x, high)
            if low is not None:
                clipped = op.Or(clipped, op.Greater(low, high))
            dhigh = unbroadcast(op, op.Where(clipped, dy, 0.0), high, y)
    return dx, dlow, dhigh


def _step(op: Emitter, y: Value, bound: Value, rises: bool = True) -> Value:
    fixed = constant_array(bound)
    if fixed is not None and fixed.size == 1:
        return step(op, y, float(fixed.item()), rises)
    return op.CastLike(op.Greater(y, bound) if rises else op.Less(y, bound), y)


@vjp("Shrink")
def shrink(op: Emitter, dy: Value, y: Value, x: Value, *, bias: float = 0.0, lambd: float = 0.5) -> Value:
    return gated(op, dy, op.Or(op.Less(x, -lambd), op.Greater(x, lambd)))


@vjp("Sigmoid")
def sigmoid(op: Emitter, dy: Value, y: Value, x: Value) -> Value:
    return op.Mul(dy, op.Mul(y, complement(op, y)))


@vjp("Tanh")
def tanh(op: Emitter, dy: Value, y: Value, x: Value) -> Value:
    return op.Mul(dy, complement(op, op.Mul(y, y)))


@vjp("HardSigmoid")
def hard_sigmoid(
    op: Emitter, dy: Value, y: Value, x: Value, *, alpha: float = 0.2, beta: float = 0.5
) -> Value:
    return op.Mul(op.Mul(op.Mul(dy, alpha), step(op, y, 0.0)), step(op, y, 1.0, rises=False))


@vjp("HardSwish")
def hard_swish(op: Emitter, dy: Value, y: Value, x: Value) -> Value:
    """Y = x clip(x/6 + 1/2, 0, 1): the slope is x/3 + 1/2 for -3 < x < 3."""
    below = step(op, x, 3.0, rises=False)
    bent = op.Mul(op.Mul(op.Add(op.Div(x, 3.0), 0.5), step(op, x, -3.0)), below)
    return op.Mul(dy, op.Add(bent, complement(op, below)))


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
        dt = op.Mul(complement(op, op.Mul(t, t)), inner)
        slope = op.Mul(op.Add(op.Add(t, 1.0), op.Mul(x, dt)), 0.5)
    else:
        t = op.Mul(x, math.sqrt(0.5))
        cumulative = op.HardSigmoid(op.Erf(t), alpha=0.5, beta=0.5)
        # x times the density: t exp(-t^2) / sqrt(pi)
        spread = op.Mul(t, op.Exp(op.Sub(-0.5 * math.log(math.pi), op.Mul(t, t))))
        slope = op.Add(cumulative, spread)
    return op.Mul(dy, slope)


@vjp("Swish")
def swish(op: Emitter, dy: Value, y: Value, x: Value, *, alpha: float = 1.0) -> Value:
    """Y = x s with s = sigmoid(alpha x): the slope is s + alpha y (1 - s)."""
    s = op.Sigmoid(op.Mul(x, alpha))
    return op.Mul(dy, op.Add(s, op.Mul(op.Mul(y, complement(op, s)), alpha)))


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
    inner = op.Mul(op.Mul(x, op.Sigmoid(x)), complement(op, op.Mul(t, t)))
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
