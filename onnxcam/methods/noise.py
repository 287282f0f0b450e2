"""Normal noise that is the same in every runtime: computed from the position, not drawn."""

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
from onnx_ir import Value

from onnxcam.emit import Emitter

_PRIME = 46337
"""The largest below 2^15.5, so that no product of two remainders needs more than 31 bits: several runtimes
compute int64 in 32."""

_NUMBER, _BLOCK, _RADIUS, _ANGLE = 37871, 42381, 23832, 45010
"""Multipliers; drawn at random, and kept as the noise has the moments and correlations that it should."""


def normal_noise(op: Emitter, shape: "list[int] | Value", dtype: ir.DataType) -> Callable[[Value], Value]:
    """Emit fields of independent standard normal numbers.

    The hash of a position and of a field's number is a few rounds of x -> (a x + b)^5 modulo 46337, each a
    permutation (5 does not divide 46336). One hash gives the radius and another the angle of Box and Muller
    1958; so no number is beyond +-4.79. All of it is exact arithmetic of integers up to the last step.

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
    within, block = op.Mod(places, _PRIME), op.Div(places, _PRIME)
    hashed = [_fifth_power(op, _affine(op, within, multiplier, 1)) for multiplier in (_RADIUS, _ANGLE)]

    def field(number: Value) -> Value:
        key = _fifth_power(op, _affine(op, op.Mod(number, _PRIME), _NUMBER, 1))
        shift = _fifth_power(op, _affine(op, block, _BLOCK, key))
        wide = ir.DataType.DOUBLE if dtype == ir.DataType.DOUBLE else ir.DataType.FLOAT
        uniform = []
        for by_place, multiplier in zip(hashed, (_RADIUS, _ANGLE), strict=True):
            mixed = _fifth_power(op, op.Mod(op.Add(by_place, shift), _PRIME))
            last = _fifth_power(op, _affine(op, mixed, multiplier, key))
            uniform.append(op.Div(op.Add(op.Cast(last, to=wide), 0.5), float(_PRIME)))
        radius = op.Sqrt(op.Mul(op.Log(uniform[0]), -2.0))
        angle = op.Mul(uniform[1], 2 * np.pi)
        return op.Reshape(op.Cast(op.Mul(radius, op.Cos(angle)), to=dtype), whole)

    return field


def _affine(op: Emitter, x: Value, a: int, b: int | Value) -> Value:
    return op.Mod(op.Add(op.Mul(x, a), b), _PRIME)


def _fifth_power(op: Emitter, x: Value) -> Value:
    square = op.Mod(op.Mul(x, x), _PRIME)
    return op.Mod(op.Mul(op.Mod(op.Mul(square, square), _PRIME), x), _PRIME)
