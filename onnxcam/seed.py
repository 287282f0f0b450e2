"""From the classes that a user asks for to the gradients of their scores."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir import Value

from onnxcam.backward import gradient, influenced, path
from onnxcam.emit import Emitter
from onnxcam.vjp import RULES, Rule
from onnxcam.vjp.shapes import dims, is_constant

ROWS = "cam_rows"
"""Name of the leading dimension of a gradient that has a row for each image and class."""

# Operators of linear heads that treat each row alone, as long as the rows stay in front. (The gradient of
# Relu is one that reads the picture, except in the method CAM.)
_ROW_BY_ROW = frozenset([
    "Add", "AveragePool", "BatchNormalization", "Cast", "Concat", "Conv", "ConvTranspose", "Div", "Dropout",
    "Expand", "Flatten", "Gather", "Gemm", "GlobalAveragePool", "Identity", "MatMul", "Mean", "Mul", "Neg",
    "Pad", "ReduceMean", "ReduceSum", "Relu", "Reshape", "Slice", "Split", "Squeeze", "Sub", "Sum",
    "Transpose", "Unsqueeze",
])  # fmt: skip


def resolve_classes(op: Emitter, scores: Value, classes: Value) -> tuple[Value, Value]:
    """Turn a request for classes into class indices that are safe to use.

    Args:
        op: where the nodes go.
        scores: [N,M].
        classes: int64 [N,K] or [1,K]: a class index, or -1 for the best class of the image, -2 for the
            second, and so on.

    Returns:
        The class indices, int64 [N,K] within 0..M-1, and a mask [N,K] that is false where the request
        was outside -M..M-1.
    """
    count = op.Shape(scores, start=1, end=2)
    images = op.Shape(scores, start=0, end=1)
    asked = op.Expand(classes, op.Concat(images, np.array([1]), axis=0))
    last = op.Sub(count, 1)
    place = op.Min(op.Max(op.Sub(-1, asked), 0), last)
    deepest = op.Reshape(op.Add(op.ReduceMax(place, keepdims=0), 1), [1])
    _, ranked = op.TopK(scores, deepest, outputs=2)
    by_rank = op.GatherElements(ranked, place, axis=1)
    index = op.Where(op.Less(asked, 0), by_rank, op.Min(asked, last))
    valid = op.And(op.Less(asked, count), op.GreaterOrEqual(asked, op.Neg(count)))
    return index, valid


def class_gradients(
    op: Emitter,
    scores: Value,
    index: Value,
    source: Value,
    rules: Mapping[tuple[str, str], Rule] = RULES,
) -> Value | None:
    """Emit the gradient of the scores of K classes of each image with respect to `source`.

    Where the gradient depends on nothing but the class (a linear head), one walk with N*K rows gives
    all of them. Elsewhere a Scan goes over the K classes, so that the N rows of each walk match the N
    rows of the forward values it reads and none of these is ever repeated. During the walk the size of
    the batch is hidden, so that no rule can write it into the graph.

    Args:
        op: where the nodes go.
        scores: [N,M].
        index: class indices, int64 [N,K].
        source: [N,...].
        rules: the rule of each operator.

    Returns:
        [N,K,...], or None if `source` does not influence `scores`.
    """
    between, forward = path(scores, source), influenced(op.graph, [source])
    batch, first = dims(scores)[0], len(op.nodes)
    _rename_rows(forward, batch, ROWS)
    seed = Value(name=op.fresh("seed"), shape=scores.shape, type=scores.type)
    found = gradient(op, scores, seed, source, rules)
    walk = op.nodes[first:]
    alone = found is not None and _serves_any_rows(between, walk, found, seed)
    _rename_rows(forward, ROWS, batch)
    if found is None:
        return None
    if alone:
        with op.before(walk[0]):
            seed.replace_all_uses_with(_one_hot(op, op.Reshape(index, [-1]), scores))
        return _split_rows(op, found, index, source)
    _rename_rows((value for node in walk for value in node.outputs), ROWS, batch)
    return _scan(op, walk, found, seed, scores, index)


def _rename_rows(values: Iterable[Value], old: int | str | None, new: int | str | None) -> None:
    """Replace the leading dimension `old` of the shapes of `values`."""
    for value in values:
        if value.shape is not None and len(value.shape) and dims(value)[0] == old:
            value.shape = ir.Shape([new, *dims(value)[1:]])


def _one_hot(op: Emitter, index: Value, scores: Value) -> Value:
    assert scores.dtype is not None
    count = dims(scores)[1]
    depth = np.int64(count) if isinstance(count, int) else op.Squeeze(op.Shape(scores, start=1, end=2), [0])
    return op.OneHot(index, depth, np.array([0, 1], scores.dtype.numpy()))


def _serves_any_rows(between: Sequence[ir.Node], walk: Sequence[ir.Node], found: Value, seed: Value) -> bool:
    """Whether the walk reads only the seed and constants, and keeps its rows apart along axis 0."""
    for node in between:
        if node.op_type not in _ROW_BY_ROW or node.domain:
            return False
        if any(value.shape is None or not value.shape or dims(value)[0] != ROWS for value in node.outputs):
            return False
        perm = node.attributes.get("perm")
        if node.op_type == "Transpose" and (perm is None or perm.as_ints()[0] != 0):
            return False
    own = {seed} | {value for node in walk for value in node.outputs}
    live = {found}
    for node in reversed(walk):
        if not live.intersection(node.outputs):
            continue
        # Sizes other than the batch are the same for every row.
        if node.op_type == "Shape" and "start" in node.attributes and node.attributes["start"].as_int() > 0:
            continue
        for value in node.inputs:
            if value is not None and value not in own and not is_constant(value):
                return False
            if value is not None:
                live.add(value)
    return True


def _split_rows(op: Emitter, found: Value, index: Value, source: Value) -> Value:
    """View [N*K,...] as [N,K,...]; what was repeated over the plane is viewed first and repeated last."""
    node = found.producer()
    assert node is not None
    rows = op.Shape(index)
    if node.op_type == "Expand" and node in op.nodes:
        uniform, shape = node.inputs
        assert uniform is not None and shape is not None
        channels = op.Shape(uniform, start=1)
        split = op.Reshape(uniform, op.Concat(rows, channels, axis=0))
        if uniform.shape is not None:
            split.shape = ir.Shape([None, None, *dims(uniform)[1:]])
        return op.Expand(split, shape)
    return op.Reshape(found, op.Concat(rows, op.Shape(source, start=1), axis=0))


def _scan(
    op: Emitter, walk: Sequence[ir.Node], found: Value, seed: Value, scores: Value, index: Value
) -> Value:
    """Move the walk into the body of a Scan over the classes and return its results, stacked on axis 1."""
    classes = Value(
        name=op.fresh("classes"), shape=ir.Shape([dims(scores)[0]]), type=ir.TensorType(ir.DataType.INT64)
    )
    body = ir.Graph([classes], [], nodes=[], name=op.fresh("gradient_of_one_class"))
    outer = op.graph
    with op.body(body):
        seed.replace_all_uses_with(_one_hot(op, classes, scores))
        for node in walk:
            if node.graph is outer:  # the body of a Scan moves with the Scan
                outer.remove(node)
                body.append(node)
        if found is seed or found.producer() not in walk:
            found = op.Identity(found)
    body.outputs.append(found)
    stacked = op.Scan(op.Transpose(index, perm=[1, 0]), body=body, num_scan_inputs=1)
    stacked.type = found.type
    if found.shape is not None:
        stacked.shape = ir.Shape([None, *found.shape])
    order = list(range(1 + len(found.shape or [0] * 4)))
    return op.Transpose(stacked, perm=[1, 0, *order[2:]])
