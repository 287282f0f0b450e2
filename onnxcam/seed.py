"""From weighted sums of the scores to their gradients."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir import Value

from onnxcam.backward import ancestors, gradient, gradients, influenced, path
from onnxcam.emit import Emitter
from onnxcam.errors import OnnxcamError
from onnxcam.loops import each
from onnxcam.vjp import RULES, Rule
from onnxcam.vjp.shapes import ROWS, dims, is_constant, rank

# Operators of linear heads that treat each row alone, as long as the rows stay in front. (The gradient of
# Relu is one that reads the picture, except in the method CAM.)
_ROW_BY_ROW = frozenset([
    "Add", "AveragePool", "BatchNormalization", "Cast", "Concat", "Conv", "ConvTranspose", "DequantizeLinear",
    "Div", "Dropout", "Expand", "Flatten", "Gather", "Gemm", "GlobalAveragePool", "Identity", "MatMul",
    "Mean", "Mul", "Neg", "Pad", "QuantizeLinear", "ReduceMean", "ReduceSum", "Relu", "Reshape", "Slice",
    "Split", "Squeeze", "Sub", "Sum", "Transpose", "Unsqueeze",
])  # fmt: skip

# Operators of a head that treat each row alone too, but whose gradient reads the row.
_BENDING = frozenset([
    "Celu", "Clip", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid", "HardSwish", "LayerNormalization",
    "LeakyRelu", "Log", "LogSoftmax", "Mish", "Pow", "RMSNormalization", "Selu", "Sigmoid", "Softmax",
    "Softplus", "Softsign", "Sqrt", "Swish", "Tanh",
])  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Seeds:
    """K weighted sums of each image's scores, which are explained: what is put into the reverse walk.

    Attributes:
        items: values [N,K,...] that say what is asked for.
        weights: ``weights(*rows)`` emits the cotangent [R,...] of the scores for R rows of the items.
        valid: bool [N,K], false where what is asked for does not exist; None: it always does.
    """

    items: tuple[Value, ...]
    weights: Callable[..., Value]
    valid: Value | None = None

    def sums(self, op: Emitter, scores: Value) -> Value:
        """Return the K sums of each image's scores [N,...]: [N,K]."""
        rows = self.weights(*(_as_rows(op, item) for item in self.items))
        each = op.Concat(op.Shape(self.items[0], start=0, end=2), np.array([-1]), axis=0)
        flat = op.Reshape(op.Unsqueeze(scores, [1]), [0, 0, -1])
        # What has no weight must not count, even if it is infinite.
        w = op.Reshape(rows, each)
        return op.ReduceSum(op.Where(op.Equal(w, 0.0), 0.0, op.Mul(w, flat)), [2], keepdims=0)

    def negated(self, op: Emitter) -> "Seeds":
        """The same sums with the opposite sign."""
        return dataclasses.replace(self, weights=lambda *rows: op.Neg(self.weights(*rows)))


def gradients_of_sums(
    op: Emitter,
    scores: Value,
    seeds: Seeds,
    sources: Sequence[Value],
    function: Callable[..., Sequence[Value]],
    rules: Mapping[tuple[str, str], Rule] = RULES,
) -> list[Value]:
    """Emit what `function` makes of the gradients of K sums of each image's scores.

    Where the gradient reads nothing of the picture (a linear head) or nothing but vectors, of which a copy
    for each sum costs nothing, one walk with N*K rows gives all of them. Elsewhere a Scan goes over the K
    sums, so that the N rows of each walk match the N rows of the forward values it reads and no plane is
    ever repeated.

    Args:
        op: where the nodes go.
        scores: [N,...].
        seeds: the K sums.
        sources: values [N,...].
        function: takes the gradient of each source, [N,k,...] with k = K or 1, or None where there is
            none, and returns values [N,k,...].
        rules: the rule of each operator.

    Returns:
        What it returned, for all K: [N,K,...].

    Raises:
        OnnxcamError: no source influences the scores.
    """
    if len(sources) == 1:
        found = _all_rows_at_once(op, scores, seeds, sources[0], rules)
        if found is not None:
            return list(function(found))

    def one(*rows: Value) -> list[Value]:
        found = gradients(op, {scores: seeds.weights(*rows)}, sources, rules)
        if all(value is None for value in found):
            raise OnnxcamError(f"no gradient of the scores reaches {sources[0].name!r}")
        return list(function(*(None if value is None else op.Unsqueeze(value, [1]) for value in found)))

    items = [op.Transpose(item, perm=[1, 0, *range(2, rank(item))]) for item in seeds.items]
    results = []
    for stacked in each(op, items, one):
        # [K,N,1,...]
        order = [1, 0, *range(2, rank(stacked) - 1)]
        results.append(op.Transpose(op.Squeeze(stacked, [2]), perm=order))
    return results


def _all_rows_at_once(
    op: Emitter, scores: Value, seeds: Seeds, source: Value, rules: Mapping[tuple[str, str], Rule]
) -> Value | None:
    """Emit one walk with N*K rows if it serves them all; during it the size of the batch is hidden.

    So no rule can write that size into the graph.
    """
    between = path(scores, source)
    forward = influenced(ancestors([scores], stop=source.producer()), [source])
    batch, first = dims(scores)[0], len(op.nodes)
    _rename_rows(forward, batch, ROWS)
    try:
        if not _rows_stay_apart(between):
            return None
        seed = Value(name=op.fresh("seed"), shape=scores.shape, type=scores.type)
        found = gradient(op, scores, seed, source, rules)
        walk = op.nodes[first:]
        read = None if found is None else _vectors_read(walk, found, seed)
        if found is None or read is None:
            return None
        meetings = list(_meetings(walk, read, seed))
    finally:
        _rename_rows(forward, ROWS, batch)
        _rename_rows([value for node in op.nodes[first:] for value in node.outputs], ROWS, None)
    with op.before(walk[0]) if walk else contextlib.nullcontext():
        rows = seeds.weights(*(_as_rows(op, item) for item in seeds.items))
    repeated: dict[Value, Value] = {}
    for node, index, vector in meetings:
        if vector not in repeated:
            with op.before(node):
                repeated[vector] = _for_each_sum(op, vector, seeds.items[0])
        node.replace_input_with(index, repeated[vector])
    if found is seed:
        found = rows
    seed.replace_all_uses_with(rows)
    return _split_rows(op, found, seeds.items[0], source)


def _as_rows(op: Emitter, item: Value) -> Value:
    """View [N,K,...] as [N*K,...]."""
    if rank(item) == 2:
        return op.Reshape(item, [-1])
    return op.Reshape(item, op.Concat(np.array([-1]), op.Shape(item, start=2), axis=0))


def _rename_rows(values: Iterable[Value], old: int | str | None, new: int | str | None) -> None:
    """Replace the leading dimension `old` of the shapes of `values`."""
    for value in values:
        if value.shape is not None and len(value.shape) and dims(value)[0] == old:
            value.shape = ir.Shape([new, *dims(value)[1:]])


def _rows_stay_apart(between: Sequence[ir.Node]) -> bool:
    """Whether the nodes treat each row alone and keep it along axis 0."""
    for node in between:
        if node.op_type not in _ROW_BY_ROW | _BENDING or node.domain:
            return False
        if any(value.shape is None or not value.shape or dims(value)[0] != ROWS for value in node.outputs):
            return False
        perm = node.attributes.get("perm")
        if node.op_type == "Transpose" and (perm is None or perm.as_ints()[0] != 0):
            return False
        axis = node.attributes["axis"].as_int() if "axis" in node.attributes else -1
        if node.op_type in _BENDING and axis % rank(node.outputs[0]) == 0:
            return False
        if _multiplies_by_image(node):
            return False
    return True


def _vectors_read(walk: Sequence[ir.Node], found: Value, seed: Value) -> list[Value] | None:
    """Return what `found` takes besides the seed and constants; None if that is more than vectors."""
    own = {seed} | {value for node in walk for value in node.outputs}
    live, read = {found}, dict[Value, None]()
    for node in reversed(walk):
        if not live.intersection(node.outputs):
            continue
        # Sizes other than the batch are the same for every row.
        if node.op_type == "Shape" and "start" in node.attributes and node.attributes["start"].as_int() > 0:
            continue
        for value in node.inputs:
            if value is None:
                continue
            if value not in own and not is_constant(value):
                if not _is_vector(value):
                    return None
                read[value] = None
            live.add(value)
    return list(read)


def _meetings(
    walk: Sequence[ir.Node], read: Sequence[Value], seed: Value
) -> Iterator[tuple[ir.Node, int, Value]]:
    """Yield where the walk of the seed reads a vector of the image: the node, the input's number, the vector.

    What follows from such vectors alone, a slope, is one itself and computed once for all sums.
    """
    of_sums, of_images = {seed}, set(read)
    for node in walk:
        own, summed = (values.intersection(node.inputs) for values in (of_images, of_sums))
        if own and not summed and all(map(_is_vector, node.outputs)):
            of_images.update(node.outputs)
        elif own or summed:
            of_sums.update(node.outputs)
            for index, value in enumerate(node.inputs):
                if value in own:
                    yield node, index, value


def _is_vector(value: Value) -> bool:
    """Whether `value` has a row for each image that extends along one axis at most."""
    rows, *rest = dims(value) if value.shape is not None and len(value.shape) else [None]
    return rows == ROWS and all(isinstance(d, int) for d in rest) and sum(d != 1 for d in rest) <= 1


def _for_each_sum(op: Emitter, value: Value, index: Value) -> Value:
    """Repeat the rows of `value` [N,...] for the K sums of each image: [N*K,...]."""
    rest = dims(value)[1:]
    whole = op.Concat(op.Shape(index, start=0, end=2), np.array(rest, np.int64), axis=0)
    return op.Reshape(op.Expand(op.Unsqueeze(value, [1]), whole), [-1, *rest])


def _multiplies_by_image(node: ir.Node) -> bool:
    """Whether a weight of `node`, which its gradient reads, has an entry for each image."""
    if node.op_type not in ("Mul", "Div"):
        return False
    weights = [v for v in node.inputs if v is not None and is_constant(v)]
    return any(len(dims(v)) == len(dims(node.outputs[0])) and dims(v)[0] != 1 for v in weights)


def _split_rows(op: Emitter, found: Value, index: Value, source: Value) -> Value:
    """View [N*K,...] as [N,K,...]; what was repeated over the plane is viewed first and repeated last."""
    node = found.producer()
    assert node is not None
    rows = op.Shape(index, start=0, end=2)
    if node.op_type == "Expand" and node in op.nodes:
        uniform, shape = node.inputs
        assert uniform is not None and shape is not None
        known = None if uniform.shape is None else dims(uniform)[1:]
        fixed = known is not None and all(isinstance(size, int) for size in known)
        channels = np.array(known, np.int64) if fixed else op.Shape(uniform, start=1)
        split = op.Reshape(uniform, op.Concat(rows, channels, axis=0))
        if uniform.shape is not None:
            split.shape = ir.Shape([None, None, *dims(uniform)[1:]])
        return op.Expand(split, shape)
    return op.Reshape(found, op.Concat(rows, op.Shape(source, start=1), axis=0))
