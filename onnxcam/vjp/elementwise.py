"""Arithmetic and elementary functions, element by element, with broadcasting."""

import math

from onnx_ir import DataType, Value

from onnxcam.emit import Emitter
from onnxcam.vjp.registry import vjp
from onnxcam.vjp.shapes import unbroadcast

Pair = tuple[Value | None, Value | None]


@vjp("Identity")
def identity(op: Emitter, dy: Value, y: Value, x: Value) -> Value:
    return dy


@vjp("Cast")
def cast(op: Emitter, dy: Value, y: Value, x: Value, *, to: int, saturate: int = 1) -> Value:
    return op.Cast(dy, to=int(x.dtype or DataType.FLOAT))


@vjp("CastLike")
def cast_like(op: Emitter, dy: Value, y: Value, x: Value, like: Value, *, saturate: int = 1) -> Value:
    return op.Cast(dy, to=int(x.dtype or DataType.FLOAT))


@vjp("Neg")
def neg(op: Emitter, dy: Value, y: Value, x: Value) -> Value:
    return op.Neg(dy)


@vjp("Abs")
def abs_(op: Emitter, dy: Value, y: Value, x: Value) -> Value:
    return op.Mul(dy, op.Sign(x))


@vjp("Reciprocal")
def reciprocal(op: Emitter, dy: Value, y: Value, x: Value) -> Value:
    return op.Neg(op.Mul(dy, op.Mul(y, y)))


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


@vjp("Pow")
def pow_(op: Emitter, dy: Value, y: Value, a: Value, b: Value) -> Pair:
    exponent = op.CastLike(b, a)
    da = op.Mul(dy, op.Mul(exponent, op.Pow(a, op.Sub(exponent, 1.0))))
    # y log(a) has the limit 0 where the base is 0.
    log_a = op.Log(op.Where(op.Greater(a, 0.0), a, 1.0))
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
    chosen = [op.CastLike(op.Equal(x, y), y) for x in xs]
    ties = chosen[0]
    for mask in chosen[1:]:
        ties = op.Add(ties, mask)
    share = op.Div(dy, ties)
    return [unbroadcast(op, op.Mul(share, mask), x, y) for x, mask in zip(xs, chosen, strict=True)]


@vjp("Where")
def where(
    op: Emitter, dy: Value, y: Value, condition: Value, a: Value, b: Value
) -> tuple[None, Value | None, Value | None]:
    da, db = op.Where(condition, dy, 0.0), op.Where(condition, 0.0, dy)
    return None, unbroadcast(op, da, a, y), unbroadcast(op, db, b, y)
