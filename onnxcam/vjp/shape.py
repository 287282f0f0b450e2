"""Operators that only move or regroup elements."""

import numpy as np
from onnx_ir import Value

from onnxcam.emit import Emitter
from onnxcam.vjp.registry import vjp
from onnxcam.vjp.shapes import (
    add_at,
    constant_array,
    constant_ints,
    dims,
    extent,
    is_constant,
    joined,
    pad_along,
    positions,
    rank,
    reshape_like,
    unbroadcast,
    zeros_along,
)

_OPEN_END = np.iinfo(np.int64).max


@vjp("Reshape")
def reshape(op: Emitter, dy: Value, y: Value, x: Value, shape: Value, *, allowzero: int = 0) -> Value:
    return reshape_like(op, dy, x)


@vjp("Flatten")
def flatten(op: Emitter, dy: Value, y: Value, x: Value, *, axis: int = 1) -> Value:
    return reshape_like(op, dy, x)


@vjp("Squeeze")
def squeeze(op: Emitter, dy: Value, y: Value, x: Value, axes: Value | None = None) -> Value:
    return reshape_like(op, dy, x) if axes is None else op.Unsqueeze(dy, axes)


@vjp("Unsqueeze")
def unsqueeze(op: Emitter, dy: Value, y: Value, x: Value, axes: Value) -> Value:
    return op.Squeeze(dy, axes)


@vjp("Transpose")
def transpose(op: Emitter, dy: Value, y: Value, x: Value, *, perm: list[int] | None = None) -> Value:
    order = perm if perm is not None else list(reversed(range(rank(x))))
    return op.Transpose(dy, perm=[int(i) for i in np.argsort(order)])


@vjp("Expand")
def expand(op: Emitter, dy: Value, y: Value, x: Value, shape: Value) -> Value | None:
    return unbroadcast(op, dy, x, y)


@vjp("Tile")
def tile(op: Emitter, dy: Value, y: Value, x: Value, repeats: Value) -> Value:
    """Sum over the copies: view each axis of size r n as [r, n]."""
    known = constant_array(repeats)
    n = rank(x)
    times: list[int | Value]
    if known is not None:
        times = [int(r) for r in known]
    else:
        times = [op.Slice(repeats, [i], [i + 1], [0]) for i in range(n)]
    split: list[int | Value] = []
    copies = []
    for i in range(n):
        if times[i] != 1:
            copies.append(len(split))
            split.append(times[i])
        split.append(extent(op, x, i) if i or times[i] != 1 else -1)
    return op.ReduceSum(op.Reshape(dy, joined(op, split)), copies, keepdims=0) if copies else dy


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
    at = axis % rank(x)
    some = next(dy for dy in dys if dy is not None)
    parts = []
    for index, dy in enumerate(dys):
        if dy is None and sizes is not None:
            length = _element(op, sizes, index)
            dy = zeros_along(op, some, at, length)
        elif dy is None:
            dy = zeros_along(op, some, at, _even_share(op, x, at, index, num_outputs or len(ys)))
        parts.append(dy)
    return op.Concat(*parts, axis=at)


def _element(op: Emitter, vector: Value, index: int) -> int | Value:
    known = constant_array(vector)
    return int(known[index]) if known is not None else op.Slice(vector, [index], [index + 1], [0])


def _even_share(op: Emitter, x: Value, axis: int, index: int, parts: int) -> int | Value:
    """The size of one part of an axis split into equal parts, the last of which may be smaller."""
    size = dims(x)[axis]
    if isinstance(size, int):
        share = -(-size // parts)
        return max(min(share, size - index * share), 0)
    whole = op.Shape(x, start=axis, end=axis + 1)
    part = op.Div(op.Add(whole, parts - 1), parts)
    return op.Max(op.Min(part, op.Sub(whole, op.Mul(part, index))), 0)


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
    """Cut off what was added, or add it to the elements that were copied there; zeros come back where
    a negative pad cut.
    """
    amounts = constant_array(pads)
    if mode == "constant" and (amounts is None or (axes is not None and constant_array(axes) is None)):
        begin, end = op.Split(pads, axis=0, num_outputs=2, outputs=2)
        lengths = op.Shape(dy) if axes is None else op.Gather(op.Shape(dy), axes)
        kept = op.Slice(dy, op.Max(begin, 0), op.Sub(lengths, op.Max(end, 0)), axes)
        named = constant_ints(axes, "the axes of a Pad") if axes is None or is_constant(axes) else None
        back = op.Max(op.Neg(pads), 0)
        return op.Pad(kept, back, None, axes) if named is None else pad_along(op, kept, back, named)
    where = constant_ints(axes, "the axes of a Pad")
    along = list(range(rank(x))) if where is None else [axis % rank(x) for axis in where]
    n = len(along)
    if mode == "constant":
        assert amounts is not None
        added = [i for i in range(n) if amounts[i] > 0 or amounts[i + n] > 0]
        if added:
            begin = [max(int(amounts[i]), 0) for i in added]
            end = [-max(int(amounts[i + n]), 0) or _OPEN_END for i in added]
            dy = op.Slice(dy, begin, end, [along[i] for i in added])
        return pad_along(op, dy, np.maximum(-amounts, 0), along) if (amounts < 0).any() else dy
    for i in range(n):
        if amounts is None or amounts[i] or amounts[i + n]:
            both = joined(op, [_element(op, pads, i), _element(op, pads, i + n)])
            sources = op.Pad(positions(op, x, along[i]), both, mode=mode)
            dy = add_at(op, dy, x, sources, along[i])
    return dy


@vjp("CenterCropPad")
def center_crop_pad(
    op: Emitter, dy: Value, y: Value, x: Value, shape: Value, *, axes: list[int] | None = None
) -> Value:
    """Cropping and padding by the same amount begin at the same place, so each undoes the other."""
    along = [axis % rank(x) for axis in axes] if axes is not None else list(range(rank(x)))
    return op.CenterCropPad(dy, joined(op, [extent(op, x, axis) for axis in along]), axes=along)


@vjp("DepthToSpace")
def depth_to_space(op: Emitter, dy: Value, y: Value, x: Value, *, blocksize: int, mode: str = "DCR") -> Value:
    """SpaceToDepth, whose channels are [block, depth]: CRD counts them as [depth, block]."""
    blocks = op.SpaceToDepth(dy, blocksize=blocksize)
    if mode == "DCR":
        return blocks
    height, width = extent(op, x, 2), extent(op, x, 3)
    apart = op.Reshape(blocks, joined(op, [0, blocksize**2, -1, height, width]))
    return reshape_like(op, op.Transpose(apart, perm=[0, 2, 1, 3, 4]), x)


@vjp("SpaceToDepth")
def space_to_depth(op: Emitter, dy: Value, y: Value, x: Value, *, blocksize: int, mode: str = "DCR") -> Value:
    return op.DepthToSpace(dy, blocksize=blocksize, mode=mode)


@vjp("Trilu")
def trilu(op: Emitter, dy: Value, y: Value, x: Value, k: Value | None = None, *, upper: int = 1) -> Value:
    return op.Trilu(dy, k, upper=upper)


@vjp("ReverseSequence")
def reverse_sequence(
    op: Emitter,
    dy: Value,
    y: Value,
    x: Value,
    lengths: Value,
    *,
    batch_axis: int = 1,
    time_axis: int = 0,
) -> Value:
    return op.ReverseSequence(dy, lengths, batch_axis=batch_axis, time_axis=time_axis)
