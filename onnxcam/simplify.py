"""Algebra on the nodes that were emitted: the same numbers from less work."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir

from onnxcam.emit import Emitter
from onnxcam.vjp.quant import by_arithmetic
from onnxcam.vjp.shapes import axes_of, constant_array, dims, is_constant


def simplify(op: Emitter) -> None:
    """Apply each identity wherever it fits; `Emitter.remove_dead` then removes what is no longer read."""
    for emitted in list(op.nodes):
        waiting = [emitted]
        while waiting:
            first = len(op.nodes)
            _replace(op, waiting.pop())
            waiting += op.nodes[first:]  # which may fit another one


def _replace(op: Emitter, node: ir.Node) -> None:
    """Apply the first identity that fits."""
    for identity in IDENTITIES:
        with op.before(node):
            better = identity(op, node)
            if better is not None and node.outputs[0].is_graph_output():  # of a branch
                better = op.Identity(better)
        if better is not None:
            node.outputs[0].replace_all_uses_with(better, replace_graph_outputs=True)
            return


def _one_hot_times_weights(op: Emitter, node: ir.Node) -> ir.Value | None:
    """A one-hot row times a weight matrix is one of its rows: ``Gather``, without reading the others."""
    if node.op_type not in ("MatMul", "Gemm"):
        return None
    rows, weights = node.inputs[:2]
    one_hot = rows.producer() if rows is not None else None
    if one_hot is None or one_hot.op_type != "OneHot" or weights is None or _rank(weights) != 2:
        return None
    index, _, values = one_hot.inputs
    assert index is not None and values is not None
    attributes = _attributes(node)
    if len(node.inputs) > 2 or attributes.get("transA") or one_hot.attributes or _rank(index) != 1:
        return None
    transposed = bool(attributes.get("transB"))
    turn = weights.producer()
    if turn is not None and turn.op_type == "Transpose" and turn.inputs[0] is not None:
        perm = turn.attributes.get("perm")
        transposed ^= perm is None or list(perm.as_ints()) == [1, 0]
        weights = turn.inputs[0]
    lit = constant_array(values)
    if not is_constant(weights) or lit is None or lit.tolist() != [0, 1]:
        return None
    found = _rows(op, weights, index, int(transposed))
    if transposed:
        found = op.Transpose(found, perm=[1, 0])
    alpha = attributes.get("alpha", 1.0)
    return found if alpha == 1.0 else op.Mul(found, alpha)


def _rows(op: Emitter, weights: ir.Value, index: ir.Value, axis: int) -> ir.Value:
    """Take a matrix's rows along `axis`; of stored weights no others are made floating-point numbers."""
    node = weights.producer()
    if node is None or node.op_type != "DequantizeLinear" or "block_size" in node.attributes:
        return op.Gather(weights, index, axis=axis)
    along = node.attributes["axis"].as_int() % 2 if "axis" in node.attributes else 1
    stored, scale, zero = (*node.inputs, None)[:3]
    assert stored is not None and scale is not None
    if _rank(scale) == 1 and dims(scale) != [1] and along == axis:
        scale, zero = (None if v is None else op.Gather(v, index, axis=0) for v in (scale, zero))
    return by_arithmetic(op, op.Gather(stored, index, axis=axis), scale, zero, along, 0)


def _rows_of_all_sums(op: Emitter, node: ir.Node) -> ir.Value | None:
    """Rows [N*K,C] of a matrix that are then viewed as [N,K,C,1,...] are taken for [N,K] at once."""
    rows, shape = _operands("Reshape", node.outputs[0])
    images, *rest = _operands("Concat", shape)
    index = _operands("Shape", images)[0]
    sizes = constant_array(rest[0]) if len(rest) == 1 and rest[0] is not None else None
    if index is None or images is None or _rank(index) != 2 or dims(images) != [2]:
        return None
    if sizes is None or not sizes.size or (sizes[1:] != 1).any():
        return None
    view, known = _operands("Reshape", rows)
    while view is not None and known is not None and is_constant(known):
        rows = view
        view, known = _operands("Reshape", rows)
    weights, line = _operands("Gather", rows)
    if weights is None or _operands("Reshape", line)[0] is not index:
        return None
    attributes = rows.producer().attributes  # type: ignore[union-attr]
    if ("axis" in attributes and attributes["axis"].as_int()) or dims(weights)[1:] != [sizes[0]]:
        return None
    found = op.Gather(weights, index, axis=0)
    return op.Unsqueeze(found, [*range(3, 2 + len(sizes))]) if len(sizes) > 1 else found


def _factor_of_product(op: Emitter, node: ir.Node) -> ir.Value | None:
    """What all of a matrix is multiplied with, its product is multiplied with if that is smaller.

    Only after the product is reshaped, as onnxruntime would otherwise fuse both into a slower product.
    """
    product, shape = _operands("Reshape", node.outputs[0])
    x, y = _operands("MatMul", product)
    factor = _factor(x)
    if factor is None or product is None or product.dtype not in (ir.DataType.FLOAT, ir.DataType.DOUBLE):
        return None
    before, after = dims(factor.of)[-1], dims(product)[-1]
    if not isinstance(before, int) or not isinstance(after, int) or after >= before:
        return None
    return op.node(factor.op_type, op.Reshape(op.MatMul(factor.of, y), shape), factor.number)


def _factor_of_view(op: Emitter, node: ir.Node) -> ir.Value | None:
    """What is multiplied with a number and then viewed otherwise is viewed first: the number may go on."""
    factor = _factor(node.inputs[0]) if node.op_type in ("Reshape", "Squeeze", "Unsqueeze") else None
    if factor is None:
        return None
    view = op.node(node.op_type, factor.of, *node.inputs[1:], **_attributes(node))
    view.shape = node.outputs[0].shape
    return op.node(factor.op_type, view, factor.number)


class _Factor(NamedTuple):
    """A number that a value is multiplied with or divided by."""

    op_type: str
    of: ir.Value
    number: ir.Value


def _factor(value: ir.Value | None) -> _Factor | None:
    for op_type in ("Div", "Mul"):
        x, number = _operands(op_type, value)
        if x is not None and number is not None and is_constant(number) and _rank(number) == 0:
            return _Factor(op_type, x, number)
    return None


def _mean_of_repeated(op: Emitter, node: ir.Node) -> ir.Value | None:
    """The mean over axes along which one number was repeated is that number."""
    if node.op_type != "ReduceMean" or len(node.inputs) < 2:
        return None
    repeated, axes_value = node.inputs
    expand = repeated.producer() if repeated is not None else None
    if expand is None or expand.op_type != "Expand" or axes_value is None:
        return None
    once, shape = expand.inputs
    assert once is not None and shape is not None
    axes, ndim = constant_array(axes_value), _rank(once)
    if ndim is None or axes is None or axes.size == 0:
        return None
    along = axes_of(axes.tolist(), ndim)
    if any(dims(once)[axis] != 1 for axis in along) or not _expanded_axes(shape, ndim) <= set(along):
        return None
    kept = node.attributes["keepdims"].as_int() if "keepdims" in node.attributes else 1
    return once if kept else op.Squeeze(once, along)


def _expanded_axes(shape: ir.Value, ndim: int) -> set[int]:
    """The axes along which Expand to `shape` may repeat a value of `ndim` dimensions; -1 for a new one."""
    length, sizes = dims(shape)[0], constant_array(shape)
    if not isinstance(length, int) or length > ndim:
        return {-1}
    return {ndim - length + i for i in range(length) if sizes is None or sizes[i] != 1}


def _squeezed_again(op: Emitter, node: ir.Node) -> ir.Value | None:
    """Axes that are put in and taken out again."""
    x, axes = _operands("Squeeze", node.outputs[0]) if len(node.inputs) == 2 else (None, None)
    once, added = _operands("Unsqueeze", x)
    if once is None or added is None or axes is None:
        return None
    taken, put = constant_array(axes), constant_array(added)
    return once if taken is not None and put is not None and np.array_equal(taken, put) else None


def _repeated_in_passing(op: Emitter, node: ir.Node) -> ir.Value | None:
    """Add and Mul repeat a smaller operand by themselves."""
    if node.op_type not in ("Add", "Mul") or node.outputs[0].shape is None:
        return None
    whole = dims(node.outputs[0])
    for repeated, other in itertools.permutations(node.inputs):
        once = _operands("Expand", repeated)[0]
        rank = None if once is None else _rank(once)
        if rank is None or other is None or _rank(other) is None or None in whole:
            continue
        if dims(other) == whole and rank <= len(whole):
            return op.node(node.op_type, once, other)
    return None


def _slope_of_swish(op: Emitter, node: ir.Node) -> ir.Value | None:
    """Of Y = x s with s = Sigmoid(x): dy s + dy x s (1 - s) is dy (s + Y (1 - s)), which leaves out x."""
    if node.op_type != "Add":
        return None
    for direct, bent in itertools.permutations(node.inputs):
        dy, s = _operands("Mul", direct)
        x = _operands("Sigmoid", s)[0]
        through, slope = _operands("Mul", bent)
        same, rest = _operands("Mul", slope)
        if x is None or s is None or same is not s or _operands("Mul", through) != (dy, x):
            continue
        product = next((use.node for use in s.uses() if set(use.node.inputs) == {x, s}), None)
        if product is not None and product.op_type == "Mul" and _is_complement(rest, s):
            return op.Mul(dy, op.Add(s, op.Mul(product.outputs[0], rest)))
    return None


def _operands(op_type: str, value: ir.Value | None) -> Sequence[ir.Value | None]:
    """What the `op_type` node that makes `value` reads; None and None where another one makes it."""
    node = None if value is None else value.producer()
    return (None, None) if node is None or node.op_type != op_type or node.domain else node.inputs


def _is_complement(value: ir.Value | None, s: ir.Value) -> bool:
    """Whether `value` is 1 - s, as `onnxcam.vjp.shapes.complement` writes it."""
    node = None if value is None else value.producer()
    if node is None or node.op_type != "HardSigmoid" or node.inputs[0] is not s:
        return False
    return _attributes(node) == {"alpha": -1, "beta": 1}


def _sum_of_parts(op: Emitter, node: ir.Node) -> ir.Value | None:
    """The sum of parts, each padded with zeros to where it belongs in the whole, is the parts joined."""
    if node.op_type != "Add" or node.outputs[0].shape is None:
        return None
    parts = list(map(_part, _terms(node.outputs[0])))
    axes = {None if part is None else part.axis for part in parts}
    axis = axes.pop()
    if axis is None or axes:
        return None
    ordered = sorted(filter(None, parts), key=lambda part: part.start)
    ends = [0, *(part.end for part in ordered)]
    if [part.start for part in ordered] != ends[:-1] or ends[-1] != dims(node.outputs[0])[axis]:
        return None
    return op.Concat(*(part.value for part in ordered), axis=axis)


def _terms(value: ir.Value | None) -> Iterator[ir.Value | None]:
    """What `value` is the sum of."""
    inputs = _operands("Add", value)
    if inputs[0] is None:
        yield value
    else:
        for term in inputs:
            yield from _terms(term)


class _Part(NamedTuple):
    """A value that lies from `start` to `end` along `axis`, with nothing but zeros around it."""

    value: ir.Value
    axis: int
    start: int
    end: int
    pads: ir.Value

    def lies_like(self, other: "_Part") -> bool:
        """Whether `other` is padded in the same way."""
        return self[1:4] == other[1:4]


def _part(value: ir.Value | None) -> _Part | None:
    """Return what was padded with zeros along one axis to make `value`."""
    x, sizes, *fill = _operands("Pad", value)
    pads = None if sizes is None else constant_array(sizes)
    if value is None or x is None or sizes is None or pads is None or any(fill):
        return None
    if value.producer().attributes:  # type: ignore[union-attr]
        return None  # another mode
    before, after = pads.reshape(2, -1).tolist()
    padded = [axis for axis, both in enumerate(zip(before, after, strict=True)) if any(both)]
    if len(padded) != 1 or len(before) != _rank(x) or min(before + after) < 0:
        return None
    length = dims(x)[padded[0]]
    if not isinstance(length, int):
        return None
    return _Part(x, padded[0], before[padded[0]], before[padded[0]] + length, sizes)


def _work_for_a_part(op: Emitter, node: ir.Node) -> ir.Value | None:
    """Of what is zero but for a small part, such as the one token that a head reads, only that is computed.

    Products, sums of what lies alike, and all that takes each entry of the axis for itself.
    """
    y = node.outputs[0]
    if node.op_type not in ("Add", "MatMul", "Mul", "ReduceMean", "ReduceSum", "Sub") or y.shape is None:
        return None
    parts = [_small_part(value, y) for value in (*node.inputs, None)[:2]]
    part = parts[0] or parts[1]
    if part is None:
        return None
    found = None
    others = [value for value, own in zip((*node.inputs, None), parts, strict=False) if own is None]
    match node.op_type:
        case "Add" | "Sub" if parts[0] and parts[1] and parts[0].lies_like(parts[1]):
            found = op.node(node.op_type, parts[0].value, parts[1].value)
        case "Mul" if parts[0] and parts[1]:
            found = op.Mul(parts[0].value, parts[1].value) if parts[0].lies_like(parts[1]) else None
        case "Mul":
            other = _at_part(op, others[0], part, len(y.shape))
            found = None if other is None else op.Mul(part.value, other)
        case "MatMul" if parts[0] and part.axis < len(y.shape) - 1 and others[0] is not None:
            found = op.MatMul(part.value, others[0]) if _rank(others[0]) == 2 else None
        case "ReduceMean" | "ReduceSum" if parts[0] and others and others[0] is not None:
            axes = constant_array(others[0])
            kept = "keepdims" not in node.attributes or node.attributes["keepdims"].as_int()
            if (
                axes is not None
                and axes.size
                and kept
                and part.axis not in axes_of(axes.tolist(), len(y.shape))
            ):
                found = op.node(node.op_type, part.value, others[0], keepdims=1)
    return None if found is None else op.Pad(found, part.pads)


def _small_part(value: ir.Value | None, y: ir.Value) -> _Part | None:
    """Return what was padded to `value`, if it was a quarter at most of `y` along the axis."""
    part = None if value is None or _rank(value) != _rank(y) else _part(value)
    if part is None:
        return None
    whole = dims(y)[part.axis]
    return part if isinstance(whole, int) and 4 * (part.end - part.start) <= whole else None


def _at_part(op: Emitter, other: ir.Value | None, part: _Part, ndim: int) -> ir.Value | None:
    """Cut from `other`, which broadcasts against `ndim` axes, what meets the part."""
    rank = None if other is None else _rank(other)
    if other is None or rank is None:
        return None
    axis = part.axis - (ndim - rank)
    if axis < 0 or dims(other)[axis] == 1:
        return other
    known = isinstance(dims(other)[axis], int)
    return op.Slice(other, [part.start], [part.end], [axis]) if known else None


def _attributes(node: ir.Node) -> dict[str, Any]:
    return {name: attribute.value for name, attribute in node.attributes.items()}


def _rank(value: ir.Value) -> int | None:
    return None if value.shape is None else len(value.shape)


IDENTITIES = (
    _one_hot_times_weights,
    _factor_of_product,
    _factor_of_view,
    _mean_of_repeated,
    _repeated_in_passing,
    _rows_of_all_sums,
    _slope_of_swish,
    _squeezed_again,
    _sum_of_parts,
    _work_for_a_part,
)
