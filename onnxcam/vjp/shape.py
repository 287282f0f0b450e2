"""Operators that only move or regroup elements."""

import numpy as np
from onnx_ir import Value

from onnxcam.emit import Emitter
from onnxcam.errors import OnnxcamError
from onnxcam.vjp.registry import vjp
from onnxcam.vjp.shapes import constant_ints, dims, rank, reshape_like, unbroadcast, zeros_like


@vjp("Reshape")
def reshape(op: Emitter, dy: Value, y: Value, x: Value, shape: Value, *, allowzero: int = 0) -> Value:
    return reshape_like(op, dy, x)


@vjp("Flatten")
def flatten(op: Emitter, dy: Value, y: Value, x: Value, *, axis: int = 1) -> Value:
    return reshape_like(op, dy, x)


@vjp("Squeeze", "Unsqueeze")
def squeeze(op: Emitter, dy: Value, y: Value, x: Value, axes: Value | None = None) -> Value:
    return reshape_like(op, dy, x)


@vjp("Transpose")
def transpose(op: Emitter, dy: Value, y: Value, x: Value, *, perm: list[int] | None = None) -> Value:
    order = perm if perm is not None else list(reversed(range(rank(x))))
    return op.Transpose(dy, perm=[int(i) for i in np.argsort(order)])


@vjp("Expand")
def expand(op: Emitter, dy: Value, y: Value, x: Value, shape: Value) -> Value | None:
    return unbroadcast(op, dy, x, y)


@vjp("Concat")
def concat(op: Emitter, dy: Value, y: Value, *xs: Value, axis: int) -> list[Value]:
    if len(xs) == 1:
        return [dy]
    at = axis % rank(y)
    sizes = [dims(x)[at] for x in xs]
    if all(isinstance(size, int) for size in sizes):
        lengths = op.constant(np.array(sizes, np.int64))
    else:
        lengths = op.Concat(*[op.Shape(x, start=at, end=at + 1) for x in xs], axis=0)
    return list(op.Split(dy, lengths, axis=at, outputs=len(xs)))


@vjp("Split")
def split(
    op: Emitter,
    dys: tuple[Value | None, ...],
    ys: tuple[Value, ...],
    x: Value,
    sizes: Value | None = None,
    *,
    axis: int = 0,
    num_outputs: int | None = None,
) -> Value:
    return op.Concat(
        *[zeros_like(op, y) if dy is None else dy for dy, y in zip(dys, ys, strict=True)], axis=axis
    )


@vjp("Pad")
def pad(
    op: Emitter,
    dy: Value,
    y: Value,
    x: Value,
    pads: Value,
    value: Value | None = None,
    axes: Value | None = None,
    *,
    mode: str = "constant",
) -> Value:
    """Cut off what was added; a negative pad cut x, and zeros come back there."""
    if mode != "constant":
        raise OnnxcamError(f"Pad with mode {mode} has no gradient rule")
    where = constant_ints(axes, "the axes of a Pad")
    along = list(range(rank(x))) if where is None else [axis % rank(x) for axis in where]
    n = len(along)
    back = op.Neg(pads)
    if any(amount < 0 for amount in constant_ints(pads, "the padding of a Pad") or []):
        return op.Pad(dy, back, None, along)
    begin = op.Slice(pads, [0], [n], [0])
    return op.Slice(dy, begin, op.Add(begin, op.Gather(op.Shape(x), along)), along)
