"""What a graph's arithmetic on sizes comes to, and the shapes that follow from it.

onnx infers shapes in one pass and loses a size on its way through a division or a comparison, and with it
the shape of all that follows. Here such vectors are followed element by element: each is a number, the
name of a dimension that only the run knows, or None where nothing is known.
"""

import math
import operator
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import onnx
import onnx.reference
import onnx_ir as ir

from onnxcam import ceiled, contrib

SMALL = 1024
"""Constants of up to this many elements are worked out beforehand, larger ones left to the runtime."""

Size: TypeAlias = "int | str | None"
Known: TypeAlias = "Mapping[ir.Value | None, np.ndarray]"
"""Integer values of which something is known: arrays of `Size`."""


def settle(graph: ir.Graph) -> None:
    """Write onto the values of `graph` what onnx's inference, which went before, could not know.

    Integers that come to constants become a value's ``const_value``; the nodes stay as they are. Only
    integers, because arithmetic on sizes is exact whoever computes it.
    """
    known: dict[ir.Value | None, np.ndarray] = {}
    better: set[ir.Value | None] = set()
    opset = graph.opset_imports[""]
    for node in graph.all_nodes():
        # onnx follows no symbol through a Reshape, whatever its target.
        told = node.op_type == "Reshape" or any(value in better or value in known for value in node.inputs)
        if told and _is_open(node):
            better.update(_refined(node, known, opset))
        value = node.outputs[0] if len(node.outputs) == 1 else None
        if value is None or node.domain or node.op_type == "Constant" or value.const_value is not None:
            continue
        found = _elements(node, known, opset)
        if found is None or found.size > SMALL or all(size is None for size in found.flat):
            continue
        known[value] = found
        if all(isinstance(size, int) for size in found.flat):
            assert value.dtype is not None
            value.const_value = ir.tensor(found.astype(value.dtype.numpy()), name=value.name)


# The shapes of values


def _is_open(node: ir.Node) -> bool:
    shapes = [_sizes(value) for value in node.outputs]
    return any(sizes is None or not all(isinstance(size, int) for size in sizes) for sizes in shapes)


def _refined(node: ir.Node, known: Known, opset: int) -> list[ir.Value]:
    """Infer the shapes of the node's outputs again and return those of which more is known now."""
    found = _inferred(node, opset)
    asked = None if node.domain else _asked(node, known)
    better = []
    for value in node.outputs:
        for sizes in (found.get(value.name or ""), asked):
            if sizes is not None and sharpen(value, sizes):
                better.append(value)
    return better


def sharpen(value: ir.Value, sizes: Sequence[Size]) -> bool:
    """Write `sizes` onto `value` where they say more than its shape does; return whether they do."""
    if value.shape is None:
        value.shape = ir.Shape(sizes)
        return True
    before = _sizes(value)
    assert before is not None
    if value.is_graph_output() or len(before) != len(sizes):
        return False
    after = [
        old if isinstance(old, int) or new is None else new for old, new in zip(before, sizes, strict=True)
    ]
    if after == before:
        return False
    value.shape = ir.Shape(after)
    return True


def _sizes(value: ir.Value | None) -> list[Size] | None:
    if value is None or value.shape is None:
        return None
    return [d if isinstance(d, int) else d.value for d in value.shape]


def _asked(node: ir.Node, known: Known) -> list[Size] | None:
    """Return the shape that the inputs of the node ask for, where something is known of that."""
    before = _sizes(node.inputs[0]) if node.inputs else None
    if node.op_type == "Split":
        return None if before is None else [None] * len(before)
    at = {"Reshape": 1, "Expand": 1, "ConstantOfShape": 0, "Pad": 1, "Resize": 3, "Slice": 1}.get(
        node.op_type
    )
    wanted = _known(node.inputs[at], known) if at is not None and len(node.inputs) > at else None
    if wanted is None:
        return None
    asked: list[Size] = wanted.tolist()
    match node.op_type:
        case "Reshape":
            allow_zero = node.attributes.get("allowzero")
            return _reshaped(before, asked, allow_zero is not None and bool(allow_zero.as_int()))
        case "Expand":
            return None if before is None else _broadcast(before, asked)
        case "Pad":
            return None if before is None or len(node.inputs) > 3 else _padded(before, asked)
        case "Slice":
            axes = (
                _known(node.inputs[3], known) if len(node.inputs) > 3 else np.arange(len(asked), dtype=object)
            )
            return None if before is None or axes is None else _without(before, axes.tolist())
        case _:
            return None if "axes" in node.attributes else asked


def _reshaped(before: list[Size] | None, asked: list[Size], allow_zero: bool) -> list[Size]:
    """0 stands for the size before, -1 for what is left."""
    sizes = list(asked)
    for i, size in enumerate(asked):
        if size == 0 and not allow_zero:
            sizes[i] = before[i] if before is not None and i < len(before) else None
    if -1 in sizes:
        at = sizes.index(-1)
        sizes[at] = None if before is None else _quotient(before, sizes[:at] + sizes[at + 1 :])
    return sizes


def _quotient(whole: Sequence[Size], part: Sequence[Size]) -> Size:
    """The product of `whole` over that of `part`, if it is a number or one named dimension."""
    if None in whole or None in part or 0 in whole or 0 in part:
        return None
    names = Counter(size for size in whole if isinstance(size, str))
    names.subtract(size for size in part if isinstance(size, str))
    number, rest = divmod(
        math.prod(size for size in whole if isinstance(size, int)),
        math.prod(size for size in part if isinstance(size, int)),
    )
    left = [name for name, count in names.items() for _ in range(count)]
    if rest or min(names.values(), default=0) < 0 or len(left) > 1 or (left and number != 1):
        return None
    return left[0] if left else number


def _without(before: list[Size], axes: Sequence[Size]) -> list[Size] | None:
    """The sizes, but None along `axes`."""
    if None in axes:
        return None
    places = [axis % len(before) for axis in axes]  # type: ignore[operator]
    return [None if i in places else size for i, size in enumerate(before)]


def _padded(before: list[Size], pads: list[Size]) -> list[Size]:
    add = _arithmetic(operator.add, 0, True)
    both = zip(pads[: len(before)], pads[len(before) :], strict=True)
    return [add(size, add(begin, end)) for size, (begin, end) in zip(before, both, strict=True)]


def _broadcast(a: list[Size], b: list[Size]) -> list[Size]:
    longest = max(len(a), len(b))
    pairs = zip([1] * (longest - len(a)) + a, [1] * (longest - len(b)) + b, strict=True)
    return [_wider(x, y) for x, y in pairs]


def _wider(a: Size, b: Size) -> Size:
    if a == 1 or a == b:
        return b
    if b == 1 or isinstance(a, int):
        return a
    return b if isinstance(b, int) else None


def _inferred(node: ir.Node, opset: int) -> dict[str, list[Size] | None]:
    """Infer the node's outputs by onnx, from what is known of its inputs by now."""
    if any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values()):
        return {}
    types: dict[str, onnx.TypeProto] = {}
    data: dict[str, onnx.TensorProto] = {}
    for value in node.inputs:
        if value is None:
            continue
        assert value.name is not None
        if value.type is None:
            return {}
        types[value.name] = ir.serde.serialize_value(value).type
        tensor = _constant(value)
        if tensor is not None:
            data[value.name] = ir.serde.serialize_tensor(tensor)
    if ceiled.is_ceiled(node):
        opset = max(opset, ceiled.CORRECTED)
    imports = [onnx.helper.make_opsetid("", opset)]
    for plain in contrib.stand_ins(ir.serde.serialize_node(node)):
        if plain.domain or not all(name in types for name in plain.input if name):
            return {}
        try:
            schema = onnx.defs.get_schema(plain.op_type, opset)
            found = onnx.shape_inference.infer_node_outputs(schema, plain, types, data, opset_imports=imports)
        except (onnx.shape_inference.InferenceError, onnx.defs.SchemaError):
            return {}
        types |= found
    shapes = {
        value.name or "": ir.serde.deserialize_type_proto_for_shape(types[value.name])
        for value in node.outputs
        if value.name in types
    }
    return {
        name: None if shape is None else [d if isinstance(d, int) else d.value for d in shape]
        for name, shape in shapes.items()
    }


# The elements of integer values


def _constant(value: ir.Value) -> ir.TensorProtocol | None:
    """The small tensor that `value` always holds."""
    tensor = None if value.is_graph_input() else ir.convenience.get_const_tensor(value)
    return None if tensor is None or tensor.size > SMALL else tensor


def _known(value: ir.Value | None, known: Known) -> np.ndarray | None:
    if value is None:
        return None
    if value in known:
        return known[value]
    if value.dtype is None or value.dtype.is_floating_point():
        return None
    tensor = _constant(value)
    if tensor is not None:
        return tensor.numpy().astype(object)
    sizes = _sizes(value)
    if sizes is None or not all(isinstance(size, int) for size in sizes):
        return None
    return None if math.prod(sizes) > SMALL else np.full(sizes, None)  # type: ignore[arg-type]


def _elements(node: ir.Node, known: Known, opset: int) -> np.ndarray | None:
    """Return what is known of the integers that the node computes."""
    if node.op_type == "Shape":
        sizes = _sizes(node.inputs[0])
        ends = (node.attributes[k].as_int() if k in node.attributes else None for k in ("start", "end"))
        return None if sizes is None else np.array(sizes[slice(*ends)], object)
    given = [value for value in node.inputs if value is not None]
    if given and all(_constant(value) is not None for value in given):
        return _computed(node, opset)
    arrays = [_known(value, known) for value in given]
    dtype = node.outputs[0].dtype
    rule = _RULES.get(node.op_type)
    if rule is None or dtype is None or dtype.is_floating_point() or len(given) < len(node.inputs):
        return None
    if any(array is None for array in arrays):
        return None
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    try:
        return np.asarray(rule(*arrays, **attributes), object)
    except (TypeError, ValueError, IndexError):  # a size that is not known stands where a number must
        return None


def _computed(node: ir.Node, opset: int) -> np.ndarray | None:
    """Evaluate a node that reads nothing but small constants."""
    if any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values()):
        return None
    feeds = {value.name or "": _constant(value).numpy() for value in node.inputs if value is not None}  # type: ignore[union-attr]
    try:
        evaluator = onnx.reference.ReferenceEvaluator(ir.to_proto(node), opsets={"": opset})
        (result,) = evaluator.run(None, feeds)
    except Exception:  # what the reference cannot evaluate stays a computed value
        return None
    array = np.asarray(result)
    return array.astype(object) if array.dtype.kind in "iub" else None


def _elementwise(function: Callable[[Size, Size], Size]) -> Callable[..., Any]:
    return lambda a, b: np.frompyfunc(function, 2, 1)(a, b)


def _arithmetic(
    function: Callable[[int, int], int], neutral: int, commutes: bool
) -> Callable[[Size, Size], Size]:
    def apply(a: Size, b: Size) -> Size:
        if isinstance(a, int) and isinstance(b, int):
            return function(a, b)
        if b == neutral:
            return a
        return b if commutes and a == neutral else None

    return apply


def _divided(a: int, b: int) -> int:
    """ONNX divides towards zero."""
    quotient = abs(a) // abs(b)
    return quotient if (a < 0) == (b < 0) else -quotient


def _equal(a: Size, b: Size) -> Size:
    """A size is never negative."""
    if (isinstance(a, int) and isinstance(b, int)) or (a == b and a is not None):
        return a == b
    return False if any(isinstance(size, int) and size < 0 for size in (a, b)) else None


def _ints(sizes: np.ndarray) -> np.ndarray:
    """Raise a TypeError where a size is not a number."""
    return np.array([operator.index(size) for size in sizes.flat], np.int64).reshape(sizes.shape)


def _gathered(x: np.ndarray, indices: np.ndarray, axis: int = 0) -> Any:
    return np.take(x, _ints(indices), axis)


def _sliced(
    x: np.ndarray,
    starts: np.ndarray,
    ends: np.ndarray,
    axes: np.ndarray | None = None,
    steps: np.ndarray | None = None,
) -> np.ndarray:
    index = [slice(None)] * x.ndim
    along = range(len(starts)) if axes is None else _ints(axes)
    strides = np.ones(len(starts), np.int64) if steps is None else _ints(steps)
    for axis, start, end, step in zip(along, _ints(starts), _ints(ends), strides, strict=True):
        # Before the first element, for a step backwards, numpy says None.
        index[axis] = slice(start, None if step < 0 and end < -x.shape[axis] else end, step)
    return x[tuple(index)]


def _where(condition: np.ndarray, a: np.ndarray, b: np.ndarray) -> Any:
    def choose(c: Size, x: Size, y: Size) -> Size:
        return None if c is None and x != y else x if c or x == y else y

    return np.frompyfunc(choose, 3, 1)(condition, a, b)


def _unsqueezed(x: np.ndarray, axes: np.ndarray) -> np.ndarray:
    return np.expand_dims(x, tuple(_ints(axes)))


def _squeezed(x: np.ndarray, axes: np.ndarray | None = None) -> np.ndarray:
    return np.squeeze(x, None if axes is None else tuple(_ints(axes)))


_RULES: Mapping[str, Callable[..., Any]] = {
    "Add": _elementwise(_arithmetic(operator.add, 0, True)),
    "Cast": lambda x, to, **_: x,
    "Concat": lambda *xs, axis: np.concatenate(xs, axis),
    "Div": _elementwise(_arithmetic(_divided, 1, False)),
    "Equal": _elementwise(_equal),
    "Gather": _gathered,
    "Identity": lambda x: x,
    "Mul": _elementwise(_arithmetic(operator.mul, 1, True)),
    "Reshape": lambda x, shape, **_: x.reshape(_ints(shape)),
    "Slice": _sliced,
    "Squeeze": _squeezed,
    "Sub": _elementwise(_arithmetic(operator.sub, 0, False)),
    "Transpose": lambda x, perm=None: x.transpose(perm),
    "Unsqueeze": _unsqueezed,
    "Where": _where,
}
"""What each operator does to vectors of sizes: an array of `Size` for each input, attributes by name."""
