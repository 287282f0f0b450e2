"""Arithmetic and elementary functions, element by element, with broadcasting."""

import math

from onnx_ir import Value

from onnxcam.emit import Emitter
from onnxcam.vjp.registry import vjp
from onnxcam.vjp.shapes import constant_array, gated, is_constant, unbroadcast

Pair = tuple[Value | None, Value | None]


@vjp("Identity")
def identity(op: Emitter, dy: Value, y: Value, x: Value) -> Value:
    return dy


@vjp("Cast")
def cast(
    op: Emitter, dy: Value, y: Value, x: Value, *, to: int, saturate: int = 1, round_mode: str = "up"
) -> Value:
    return _as_type_of(op, dy, x)


@vjp("CastLike")
def cast_like(
    op: Emitter, dy: Value, y: Value, x: Value, like: Value, *, saturate: int = 1, round_mode: str = "up"
) -> Value:
    return _as_type_of(op, dy, x)


def _as_type_of(op: Emitter, dy: Value, x: Value) -> Value:
    if x.dtype is not None and x.dtype.is_integer():
        return dy  # x is a quantised value, whose gradient is a floating-point one
    return op.CastLike(dy, x) if x.dtype is None else op.Cast(dy, to=x.dtype)


@vjp("Neg")
def neg(op: Emitter, dy: Value, y: Value, x: Value) -> Value:
    return op.Neg(dy)


@vjp("Abs")
def abs_(op: Emitter, dy: Value, y: Value, x: Value) -> Value:
    """0 at 0, as in torch."""
    return op.Mul(dy, op.Sign(x))


@vjp("Ceil", "Floor", "Round", "Sign")
def step(op: Emitter, dy: Value, y: Value, x: Value) -> None:
    """Piecewise constant."""


@vjp("Reciprocal")
def reciprocal(op: Emitter, dy: Value, y: Value, x: Value) -> Value:
    return op.Neg(op.Mul(op.Mul(dy, y), y))


@vjp("Sqrt")
def sqrt(op: Emitter, dy: Value, y: Value, x: Value) -> Value:
    return op.Div(dy, op.Mul(y, 2.0))


@vjp("Exp")
def exp(op: Emitter, dy: Value, y: Value, x: Value) -> Value:
    return op.Mul(dy, y)


@vjp("Log")
def log(op: Emitter, dy: Value, y: Value, x: Value) -> Value:
    return op.Div(dy, x)


@vjp("Erf")
def erf(op: Emitter, dy: Value, y: Value, x: Value) -> Value:
    return op.Mul(dy, op.Mul(op.Exp(op.Neg(op.Mul(x, x))), 2.0 / math.sqrt(math.pi)))


@vjp("Sin")
def sin(op: Emitter, dy: Value, y: Value, x: Value) -> Value:
    return op.Mul(dy, op.Cos(x))


@vjp("Cos")
def cos(op: Emitter, dy: Value, y: Value, x: Value) -> Value:
    return op.Neg(op.Mul(dy, op.Sin(x)))


@vjp("Tan")
def tan(op: Emitter, dy: Value, y: Value, x: Value) -> Value:
    return op.Mul(dy, op.Add(op.Mul(y, y), 1.0))


@vjp("Asin")
def asin(op: Emitter, dy: Value, y: Value, x: Value) -> Value:
    return op.Div(dy, op.Sqrt(_one_minus_square(op, x)))


@vjp("Acos")
def acos(op: Emitter, dy: Value, y: Value, x: Value) -> Value:
    return op.Neg(op.Div(dy, op.Sqrt(_one_minus_square(op, x))))


@vjp("Atan")
def atan(op: Emitter, dy: Value, y: Value, x: Value) -> Value:
    return op.Div(dy, op.Add(op.Mul(x, x), 1.0))


@vjp("Sinh")
def sinh(op: Emitter, dy: Value, y: Value, x: Value) -> Value:
    return op.Mul(dy, op.Cosh(x))


@vjp("Cosh")
def cosh(op: Emitter, dy: Value, y: Value, x: Value) -> Value:
    return op.Mul(dy, op.Sinh(x))


@vjp("Asinh")
def asinh(op: Emitter, dy: Value, y: Value, x: Value) -> Value:
    return op.Div(dy, op.Cosh(y))


@vjp("Acosh")
def acosh(op: Emitter, dy: Value, y: Value, x: Value) -> Value:
    return op.Div(dy, op.Sinh(y))


@vjp("Atanh")
def atanh(op: Emitter, dy: Value, y: Value, x: Value) -> Value:
    return op.Div(dy, _one_minus_square(op, x))


def _one_minus_square(op: Emitter, x: Value) -> Value:
    """1 - x^2, without loss of digits where |x| is near 1."""
    return op.Mul(op.Sub(1.0, x), op.Add(x, 1.0))


@vjp("Add")
def add(op: Emitter, dy: Value, y: Value, a: Value, b: Value) -> Pair:
    return unbroadcast(op, dy, a, y), unbroadcast(op, dy, b, y)


@vjp("Sub")
def sub(op: Emitter, dy: Value, y: Value, a: Value, b: Value) -> Pair:
    return unbroadcast(op, dy, a, y), unbroadcast(op, op.Neg(dy), b, y)


@vjp("Mul")
def mul(op: Emitter, dy: Value, y: Value, a: Value, b: Value) -> Pair:
    return unbroadcast(op, op.Mul(dy, b), a, y), unbroadcast(op, op.Mul(dy, a), b, y)


@vjp("Div")
def div(op: Emitter, dy: Value, y: Value, a: Value, b: Value) -> Pair:
    da = op.Div(dy, b)
    return unbroadcast(op, da, a, y), unbroadcast(op, op.Neg(op.Mul(da, y)), b, y)


@vjp("Mod")
def mod(op: Emitter, dy: Value, y: Value, a: Value, b: Value, *, fmod: int = 0) -> Pair:
    """Y = A - q B; the quotient q is an integer, rounded toward zero (fmod) or down."""
    quotient = op.Floor(op.Add(op.Div(op.Sub(a, y), b), 0.5))
    return unbroadcast(op, dy, a, y), unbroadcast(op, op.Neg(op.Mul(dy, quotient)), b, y)


@vjp("Pow")
def pow_(op: Emitter, dy: Value, y: Value, a: Value, b: Value) -> Pair:
    """As in torch: a power of 0 has gradient 0, and so has the exponent of a base of 0."""
    if a.dtype is not None and not a.dtype.is_floating_point():
        return None, None
    fixed = constant_array(b)
    power = float(fixed.item()) if fixed is not None and fixed.size == 1 else None
    exponent = op.CastLike(b, a)
    if power == 2.0:
        da = op.Mul(dy, op.Mul(a, 2.0))
    else:
        slope = op.Mul(op.Pow(a, op.Sub(exponent, 1.0)), exponent)
        da = op.Mul(dy, slope if power else op.Where(op.Equal(exponent, 0.0), 0.0, slope))
    if is_constant(b) or (b.dtype is not None and not b.dtype.is_floating_point()):
        return unbroadcast(op, da, a, y), None
    log_a = op.Log(op.Where(op.Equal(a, 0.0), 1.0, a))
    db = op.CastLike(op.Mul(dy, op.Mul(y, log_a)), b)
    return unbroadcast(op, da, a, y), unbroadcast(op, db, b, y)


@vjp("Sum")
def sum_(op: Emitter, dy: Value, y: Value, *xs: Value) -> list[Value | None]:
    return [unbroadcast(op, dy, x, y) for x in xs]


@vjp("Mean")
def mean(op: Emitter, dy: Value, y: Value, *xs: Value) -> list[Value | None]:
    share = op.Div(dy, float(len(xs)))
    return [unbroadcast(op, share, x, y) for x in xs]


@vjp("Max", "Min")
def extremum(op: Emitter, dy: Value, y: Value, *xs: Value) -> list[Value | None]:
    """Inputs that tie share the gradient equally, as in torch.maximum and torch.minimum."""
    chosen = [op.Equal(x, y) for x in xs]
    ties = op.Sum(*[op.CastLike(mask, y) for mask in chosen])
    share = op.Div(dy, ties)
    return [unbroadcast(op, gated(op, share, mask), x, y) for x, mask in zip(xs, chosen, strict=True)]


@vjp("Where")
def where(
    op: Emitter, dy: Value, y: Value, condition: Value, a: Value, b: Value
) -> tuple[None, Value | None, Value | None]:
    da, db = op.Where(condition, dy, 0.0), op.Where(condition, 0.0, dy)
    return None, unbroadcast(op, da, a, y), unbroadcast(op, db, b, y)
