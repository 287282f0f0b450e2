"""Algebra on the nodes that were emitted: the same numbers from less work."""

import onnx_ir as ir

from onnxcam.emit import Emitter
from onnxcam.vjp.quant import by_arithmetic
from onnxcam.vjp.shapes import axes_of, constant_array, dims, is_constant


def simplify(op: Emitter) -> None:
    """Apply each identity wherever it fits; `Emitter.remove_dead` then removes what is no longer read."""
    for node in list(op.nodes):
        for identity in (_one_hot_times_weights, _mean_of_repeated):
            with op.before(node):
                better = identity(op, node)
            if better is not None:
                node.outputs[0].replace_all_uses_with(better)
                break


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
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
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


def _rank(value: ir.Value) -> int | None:
    return None if value.shape is None else len(value.shape)
