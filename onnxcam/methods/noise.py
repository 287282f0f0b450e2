"""Normal noise that is the same in every runtime: computed from the position, not drawn."""

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
from onnx_ir import Value

from onnxcam.emit import Emitter

_PRIME = 2**31 - 1
_MULTIPLIERS = (742938285, 950706376, 1226874159)
"""Of good multiplicative generators modulo that prime: Fishman and Moore 1986, table 5."""

_HALF = 2**15


def normal_noise(op: Emitter, shape: "list[int] | Value", dtype: ir.DataType) -> Callable[[Value], Value]:
    """Emit fields of independent standard normal numbers.

    The hash of a position and of a field's number is a few rounds of x -> (a x + b)^5 modulo 2^31 - 1, each
    a permutation (5 does not divide 2^31 - 2). Its upper 16 bits give the radius and its lower 15 bits the
    angle of Box and Muller 1958; so no number is beyond +-4.86. All of it is exact int64 arithmetic up to
    the last step.

    Args:
        op: where the nodes go; what does not depend on the field's number goes there at once.
        shape: of a field.
        dtype: of the numbers; they are computed in float32 for a narrower one.

    Returns:
        ``field(number)`` emits the field with that number, an int64 scalar: [1,*shape].
    """
    size = int(np.prod(shape)) if isinstance(shape, list) else op.ReduceProd(shape, keepdims=0)
    whole = [1, *shape] if isinstance(shape, list) else op.Concat(np.array([1]), shape, axis=0)
    places = op.Range(np.int64(0), size if isinstance(size, Value) else np.int64(size), np.int64(1))
    first, second, third = _MULTIPLIERS
    by_place = _fifth_power(op, _affine(op, places, first, 1))

    def field(number: Value) -> Value:
        key = op.Mod(op.Mul(op.Add(number, 1), second), _PRIME)
        mixed = _fifth_power(op, op.Mod(op.Add(by_place, key), _PRIME))
        bits = _fifth_power(op, _affine(op, mixed, third, 1))
        wide = ir.DataType.DOUBLE if dtype == ir.DataType.DOUBLE else ir.DataType.FLOAT
        upper, lower = (op.Cast(half(bits, _HALF), to=wide) for half in (op.Div, op.Mod))
        radius = op.Sqrt(op.Mul(op.Log(op.Div(op.Add(upper, 0.5), float(2 * _HALF))), -2.0))
        angle = op.Mul(op.Add(lower, 0.5), 2 * np.pi / _HALF)
        return op.Reshape(op.Cast(op.Mul(radius, op.Cos(angle)), to=dtype), whole)

    return field


def _affine(op: Emitter, x: Value, a: int, b: int) -> Value:
    return op.Mod(op.Add(op.Mul(x, a), b), _PRIME)


def _fifth_power(op: Emitter, x: Value) -> Value:
    square = op.Mod(op.Mul(x, x), _PRIME)
    return op.Mod(op.Mul(op.Mod(op.Mul(square, square), _PRIME), x), _PRIME)
