"""Quantised models as gradients see them: operators between DequantizeLinear and QuantizeLinear.

`unfold` puts that form beside the nodes of a model: the QLinearConv of the file becomes DequantizeLinear,
Conv, QuantizeLinear, which layers, rules and methods know. `fold` lets the model be itself again when all is
emitted: its own nodes read what they read before, what was emitted reads the numbers that the model's own
nodes store, and of the other form nothing is left but a DequantizeLinear here and there.

What an operator on stored numbers computes is written down once, in `FUNCTIONS`.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir import Value

from onnxcam.contrib import DOMAIN
from onnxcam.emit import Emitter, all_values
from onnxcam.vjp.quant import by_arithmetic, copied, dequantised, is_heavy, unit
from onnxcam.vjp.shapes import is_constant

_KEY = "onnxcam.quantised"

_MOVING = (
    "DepthToSpace", "Expand", "Flatten", "Gather", "Identity", "MaxPool", "Reshape", "Slice", "SpaceToDepth",
    "Squeeze", "Transpose", "Unsqueeze",
)  # fmt: skip
"""Operators of ONNX that also take stored numbers."""


@dataclasses.dataclass(frozen=True)
class Stored:
    """A value that an operator stores as integers: round(value / scale) + zero, cut to their range."""

    value: Value
    scale: Value
    zero: Value | None


FUNCTIONS: dict[tuple[str, str], Callable[..., "Value | Stored"]] = {}
"""For each operator on stored numbers what its first output stands for: ``f(op, *inputs, **attributes)``."""


@dataclasses.dataclass
class _Unfolded:
    """What `unfold` did to a graph.

    Attributes:
        nodes: those it added.
        constants: those it added.
        owns: the model's own value for each of the added ones that takes its place.
        instead: the other way round.
        moved: a node of the model, the place of an input, and what it reads there.
        views: the floating-point view of stored numbers that have one.
        stores: what stores a value that is read for nothing else.
    """

    nodes: set[ir.Node] = dataclasses.field(default_factory=set)
    constants: list[Value] = dataclasses.field(default_factory=list)
    owns: dict[Value, Value] = dataclasses.field(default_factory=dict)
    instead: dict[Value, Value] = dataclasses.field(default_factory=dict)
    moved: list[tuple[ir.Node, int, Value]] = dataclasses.field(default_factory=list)
    views: dict[Value, Value] = dataclasses.field(default_factory=dict)
    stores: dict[Value, Value] = dataclasses.field(default_factory=dict)


def oldest_opset(graph: ir.Graph) -> int:
    """Return the oldest opset in which ONNX's own operators store what the graph's weights and values are."""
    stored = [
        v for node in graph for v in node.inputs[:3] if v is not None and node.op_type == "DequantizeLinear"
    ]
    narrow = (ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.INT32)
    wide = any(v.dtype is not None and v.dtype.is_integer() and v.dtype not in narrow for v in stored)
    return 21 if wide else 1


def unfold(graph: ir.Graph) -> None:
    """Add the other form and let all nodes read it; types and shapes are still to be inferred.

    A node with attributes that its function does not know stays as it is.
    """
    done = _Unfolded()
    op = _Writer(graph, done)
    for node in list(graph):
        op.writing = node.name or node.op_type
        found = _written(op, node)
        if found is None:
            continue
        graph.insert_after(node, op.nodes)
        done.nodes.update(op.nodes)
        op.nodes = []
        own = node.outputs[0]
        if found.producer() in done.nodes:
            done.owns.setdefault(found, own)
        done.instead[own] = found
        for user, place in list(own.uses()):
            done.moved.append((user, place, own))
            user.replace_input_with(place, found)
    for node in graph:
        x, y = node.inputs[0] if node.inputs else None, node.outputs[0]
        if x is None or y in done.instead:
            continue
        if node.op_type == "DequantizeLinear":
            done.views[x] = y
        elif node.op_type == "QuantizeLinear" and not x.is_graph_output():
            others = [
                user for user, _ in x.uses() if user is not node and user.outputs[0] not in done.instead
            ]
            done.stores.update([] if others else [(x, y)])
    if done.instead:
        graph.meta[_KEY] = done


def fold(op: Emitter) -> None:
    """Undo `unfold` after everything was emitted through `op`, which can remove what is dead then."""
    done: _Unfolded | None = op.graph.meta.pop(_KEY, None)
    if done is None:
        return
    for node in list(op.nodes):
        for place, value in enumerate(node.inputs):
            if value is not None:
                node.replace_input_with(place, _apart(op, done, value, node))
    for node, place, own in reversed(done.moved):
        node.replace_input_with(place, own)
    for value, own in done.owns.items():
        if own.dtype is None:
            own.type, own.shape = value.type, value.shape
        if value.dtype == own.dtype and dequantised(value) is None:
            value.replace_all_uses_with(own)
    for node in done.nodes:
        x = node.inputs[0]
        if node.op_type == "DequantizeLinear" and x is not None and node.outputs[0].uses():
            _by_arithmetic(op, node, x)
    op.adopt(done.nodes, done.constants)


def _apart(op: Emitter, done: _Unfolded, value: Value, reader: ir.Node) -> Value:
    """Return what `reader`, a node that was emitted, may read instead of `value`.

    What the model computes on stored numbers nothing else can read before it is stored: it is worked out
    again, or where that would be a convolution or a matrix product, read from the store.
    """
    stored = done.stores.get(value)
    nodes = [] if stored is None else unit(value)
    if reader.op_type == "Shape":
        return (stored if nodes else dequantised(value)) or value
    if stored is None or not nodes:
        return value
    if is_heavy(nodes):
        return done.views.get(stored) or _read(op, done, stored)
    if value.producer() in done.nodes:
        return value
    with op.before(reader):
        return copied(op, nodes)


def _read(op: Emitter, done: _Unfolded, stored: Value) -> Value:
    """Add the floating-point view of `stored`, which nothing has needed so far."""
    node = stored.producer()
    assert node is not None and node.graph is not None
    reader = ir.Node("", "DequantizeLinear", [stored, *node.inputs[1:]], list(node.attributes.values()))
    reader.outputs[0].type = node.inputs[0].type  # type: ignore[union-attr]
    reader.outputs[0].shape = None if stored.shape is None else stored.shape.copy()
    node.graph.insert_after(node, reader)
    done.nodes.add(reader)
    done.views[stored] = reader.outputs[0]
    return reader.outputs[0]


def _by_arithmetic(op: Emitter, node: ir.Node, x: Value) -> None:
    scale, zero = node.inputs[1], node.inputs[2] if len(node.inputs) > 2 else None
    assert scale is not None
    attributes = {a.name: a.as_int() for a in node.attributes.values()}
    with op.before(node), op.scope("dequantised"):
        found = by_arithmetic(op, x, scale, zero, attributes.get("axis", 1), attributes.get("block_size", 0))
        node.outputs[0].replace_all_uses_with(found)


def _unfolded(value: Value) -> _Unfolded:
    done = None if value.graph is None else value.graph.meta.get(_KEY)
    return done or _Unfolded()


def own_nodes(graph: ir.Graph) -> list[ir.Node]:
    """Return the nodes of an unfolded graph that are the model's own."""
    done: _Unfolded | None = graph.meta.get(_KEY)
    return [node for node in graph if done is None or node not in done.nodes]


def standing_for(value: Value) -> Value:
    """Return what takes the place of `value`, a value of the model, in the unfolded graph."""
    return _unfolded(value).instead.get(value, value)


def view(value: Value) -> Value:
    """Return the same as floating-point numbers.

    For stored numbers, and for a value that the model only stores, these are what it reads from the store,
    if it reads such.
    """
    done = _unfolded(value)
    value = done.instead.get(value, value)
    return done.views.get(done.stores.get(value, value), value)


def before_storing(value: Value) -> Value | None:
    """Return what was stored and is read again as `value`; None: that is not how `value` is made."""
    stored = dequantised(value)
    node = None if stored is None else stored.producer()
    return node.inputs[0] if node is not None and node.op_type == "QuantizeLinear" else None


def origin(value: Value) -> Value | None:
    """Return the model's own value that `value`, of an unfolded graph, shows; None if it shows none."""
    done = _unfolded(value)
    if value in done.views or view(value) is not value:
        return None
    stored = dequantised(value)
    if stored is not None and not is_constant(stored):
        own = done.owns.get(stored, stored)
        node = own.producer()
        x = node.inputs[0] if node is not None and node.op_type == "QuantizeLinear" else None
        return own if x is None or view(x) is not value else x
    if value.producer() in done.nodes:
        stands = done.owns.get(value)
        return stands if stands is not None and stands.dtype in (None, value.dtype) else None
    return value


def _written(op: "_Writer", node: ir.Node) -> Value | None:
    """Write what takes the place of the first output of `node`; None: it stays."""
    if node.op_type == "QuantizeLinear" and not node.domain:
        return op.met(node)
    if node.op_type in _MOVING and not node.domain:
        return op.moved(node)
    if node.op_type == "NhwcMaxPool":
        return op.moved(node)
    if node.op_type == "Mul":
        return op.scaled(node)
    function = FUNCTIONS.get((node.domain, node.op_type))
    if function is None or any(value.uses() for value in node.outputs[1:]):
        return None
    attributes = {a.name: a.value for a in node.attributes.values()}
    parameters = inspect.signature(function).parameters
    if not attributes.keys() <= parameters.keys() and "a" not in parameters:
        return None
    real = function(op, *node.inputs, **attributes)
    return real if isinstance(real, Value) else op.QuantizeLinear(real.value, real.scale, real.zero)


class _Writer:
    """``op.Conv(x, w)`` makes a node of no known type; equal DequantizeLinear and QuantizeLinear are one."""

    def __init__(self, graph: ir.Graph, done: _Unfolded) -> None:
        self.nodes: list[ir.Node] = []
        self.writing = ""
        self._graph = graph
        self._done = done
        self._taken = {value.name for value in all_values(graph)} | {n.name for n in graph.all_nodes()}
        self._count = 0
        self._known: dict[tuple[Any, ...], Value] = {}

    def __getattr__(self, op_type: str) -> Callable[..., Value]:
        return functools.partial(self.node, op_type)

    def node(self, op_type: str, *inputs: Any, **attributes: Any) -> Value:
        values = [v if v is None or isinstance(v, Value) else self._constant(v) for v in inputs]
        while values[-1] is None:
            values.pop()
        given = {name: value for name, value in attributes.items() if value is not None}
        node = ir.Node(
            "", op_type, values, ir.convenience.convert_attributes(given), name=self._fresh(op_type)
        )
        node.outputs[0].name = node.name
        if op_type in ("DequantizeLinear", "QuantizeLinear"):
            known = self.met(node)
            if known is not None:
                for place in range(len(values)):
                    node.replace_input_with(place, None)
                return known
        self.nodes.append(node)
        return node.outputs[0]

    def moved(self, node: ir.Node) -> Value | None:
        """Write `node`, if it moves stored numbers about, as one that moves what they stand for."""
        store = None if node.inputs[0] is None else node.inputs[0].producer()
        if store is None or store.op_type != "QuantizeLinear" or "axis" in store.attributes:
            return None
        if len(node.outputs) > 1:
            return None
        x = self.DequantizeLinear(*store.outputs, *store.inputs[1:])
        attributes = {a.name: a.value for a in node.attributes.values()}
        if node.op_type == "NhwcMaxPool":
            y = _last(self, self.MaxPool(_planes(self, x, 1), **attributes), 1)
        else:
            y = self.node(node.op_type, x, *node.inputs[1:], **attributes)
        return self.QuantizeLinear(y, *store.inputs[1:])

    def scaled(self, node: ir.Node) -> Value | None:
        """Write a product of integers times both scales, as dynamic quantisation leaves it, without these."""
        cast, scales = (None if v is None else v.producer() for v in node.inputs)
        if cast is None or scales is None or cast.op_type != "Cast" or scales.op_type != "Mul":
            return None
        found = cast.inputs[0]
        product = None if found is None else self._done.owns.get(found, found).producer()
        if product is None or product.op_type not in ("ConvInteger", "MatMulInteger"):
            return None
        a, b = product.inputs[:2]
        dynamic = None if a is None else a.producer()
        if (
            dynamic is None
            or dynamic.op_type != "DynamicQuantizeLinear"
            or scales.inputs[0] is not dynamic.outputs[1]
        ):
            return None
        zero = product.inputs[3] if len(product.inputs) > 3 else None
        attributes = {a.name: a.value for a in product.attributes.values()}
        matrix = product.op_type == "MatMulInteger"
        w = self.DequantizeLinear(b, scales.inputs[1], zero, axis=-1 if matrix else 0)
        return self.node("MatMul" if matrix else "Conv", dynamic.inputs[0], w, **attributes)

    def met(self, node: ir.Node) -> Value | None:
        """Remember a QuantizeLinear or DequantizeLinear; return what an equal one before it computes."""
        attributes = sorted((a.name, a.value) for a in node.attributes.values())
        key = (node.op_type, *map(_identity, node.inputs), *attributes)
        before = self._known.setdefault(key, node.outputs[0])
        return None if before is node.outputs[0] else before

    def _constant(self, array: Any) -> Value:
        given = np.asarray(array)
        tensor = ir.tensor(given, name=self._fresh("constant"))
        value = Value(
            name=tensor.name,
            shape=ir.Shape(given.shape),
            type=ir.TensorType(tensor.dtype),
            const_value=tensor,
        )
        self._graph.register_initializer(value)
        self._done.constants.append(value)
        return value

    def _fresh(self, name: str) -> str:
        stem = f"{self.writing}/{name}"
        while (fresh := f"{stem}_{self._count}" if self._count else stem) in self._taken:
            self._count += 1
        self._count = 0
        self._taken.add(fresh)
        return fresh


def _identity(value: Value | None) -> Any:
    """What makes two operands equal: of scales and zero points their numbers."""
    tensor = None if value is None or value.is_graph_input() else value.const_value
    if tensor is None or tensor.size > 1:
        return id(value)
    return tensor.dtype, tuple(tensor.shape), tensor.numpy().tobytes()


# What the operators compute


def _dq(op: Any, x: Any, scale: Any, zero: Any = None, axis: int | None = None) -> Any:
    return op.DequantizeLinear(x, scale, zero, axis=axis)


def _shifted(op: Any, x: Any, zero: Any, axis: int) -> Any:
    """Return the numbers in `x` without their zero point, which may have one dimension, along `axis`."""
    count = [] if zero is None or zero.const_value is None else list(zero.const_value.shape)
    return op.DequantizeLinear(x, np.ones(count, np.float32), zero, axis=axis)


def _computes(*op_types: str, domain: str = DOMAIN) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        for op_type in op_types:
            FUNCTIONS[domain, op_type] = function
        return function

    return register


@_computes("DequantizeLinear", domain="")
@_computes("DequantizeLinear")
def _dequantize(
    op: Any, x: Any, scale: Any, zero: Any = None, *, axis: int | None = None, block_size: int | None = None
) -> Any:
    return op.DequantizeLinear(x, scale, zero, axis=axis, block_size=block_size)


@_computes("QuantizeLinear")
def _quantize(op: Any, x: Any, scale: Any, zero: Any = None, *, axis: int | None = None) -> Any:
    return op.QuantizeLinear(x, scale, zero, axis=axis)


@_computes("QLinearConv", domain="")
@_computes("QLinearConv")
def _conv(
    op: Any,
    x: Any,
    xs: Any,
    xz: Any,
    w: Any,
    ws: Any,
    wz: Any,
    ys: Any,
    yz: Any,
    b: Any = None,
    *,
    channels_last: int = 0,
    **a: Any,
) -> Stored:
    bias = None if b is None else _dq(op, b, op.Mul(xs, ws), axis=0)
    planes = _planes(op, _dq(op, x, xs, xz), channels_last)
    return Stored(_last(op, op.Conv(planes, _dq(op, w, ws, wz, 0), bias, **a), channels_last), ys, yz)


def _planes(op: Any, x: Any, channels_last: int) -> Any:
    """Bring [N,h,w,C] into the order [N,C,h,w]; onnxruntime has the first on CPUs, of pictures alone."""
    return op.Transpose(x, perm=[0, 3, 1, 2]) if channels_last else x


def _last(op: Any, y: Any, channels_last: int) -> Any:
    return op.Transpose(y, perm=[0, 2, 3, 1]) if channels_last else y


@_computes("ConvInteger", domain="")
def _conv_integer(op: Any, x: Any, w: Any, xz: Any = None, wz: Any = None, **a: Any) -> Any:
    return op.Conv(_shifted(op, x, xz, 1), _shifted(op, w, wz, 0), **a)


@_computes("QLinearMatMul", domain="")
def _matmul(op: Any, a: Any, a_s: Any, az: Any, b: Any, bs: Any, bz: Any, ys: Any, yz: Any) -> Stored:
    return Stored(op.MatMul(_dq(op, a, a_s, az, -2), _dq(op, b, bs, bz, -1)), ys, yz)


@_computes("MatMulInteger", domain="")
def _matmul_integer(op: Any, a: Any, b: Any, az: Any = None, bz: Any = None) -> Any:
    return op.MatMul(_shifted(op, a, az, -2), _shifted(op, b, bz, -1))


@_computes("MatMulIntegerToFloat")
def _matmul_to_float(
    op: Any, a: Any, b: Any, a_s: Any, bs: Any, az: Any = None, bz: Any = None, bias: Any = None
) -> Any:
    y = op.MatMul(_dq(op, a, a_s, az, -2), _dq(op, b, bs, bz, -1))
    return y if bias is None else op.Add(y, bias)


@_computes("DynamicQuantizeMatMul")
def _dynamic_matmul(op: Any, a: Any, b: Any, bs: Any, bz: Any = None, bias: Any = None) -> Any:
    y = op.MatMul(a, _dq(op, b, bs, bz, -1))
    return y if bias is None else op.Add(y, bias)


@_computes("MatMulNBits")
def _matmul_n_bits(
    op: Any,
    a: Any,
    b: Any,
    scales: Any,
    zeros: Any = None,
    g_idx: Any = None,
    bias: Any = None,
    *,
    K: int,  # noqa: N803
    N: int,  # noqa: N803
    bits: int = 4,
    block_size: int,
    accuracy_level: int = 0,
) -> Any:
    """Y = A B', B [N,K] in blocks of `block_size` numbers, `bits` each, the first in the lowest bits."""

    def unpacked(packed: Any, size: int) -> Any:
        parts = [
            op.Mod(
                op.Div(op.Cast(op.Unsqueeze(packed, np.array([-1])), to=6), np.int32(2**shift)),
                np.int32(2**bits),
            )
            for shift in range(0, 8, bits)
        ]
        flat = op.Reshape(op.Concat(*parts, axis=-1), np.array([N, -1]))
        return op.Slice(flat, np.array([0]), np.array([size]), np.array([1]))

    blocks = -(-K // block_size)
    numbers = op.Reshape(op.CastLike(unpacked(b, blocks * block_size), scales), np.array([N, blocks, -1]))
    middle: Any = op.CastLike(np.float32(2 ** (bits - 1)), scales)
    if zeros is not None:
        packed = zeros.dtype is not None and zeros.dtype.is_integer()
        middle = op.CastLike(unpacked(zeros, blocks), scales) if packed else zeros
        middle = op.Reshape(middle, np.array([N, blocks, 1]))
    w = op.Mul(op.Sub(numbers, middle), op.Reshape(scales, np.array([N, blocks, 1])))
    w = op.Slice(op.Reshape(w, np.array([N, -1])), np.array([0]), np.array([K]), np.array([1]))
    y = op.MatMul(a, op.Transpose(w, perm=[1, 0]))
    return y if bias is None else op.Add(y, bias)


@_computes("QGemm")
def _gemm(
    op: Any,
    a: Any,
    a_s: Any,
    az: Any,
    b: Any,
    bs: Any,
    bz: Any,
    c: Any = None,
    ys: Any = None,
    yz: Any = None,
    *,
    alpha: float = 1.0,
    transA: int = 0,  # noqa: N803
    transB: int = 0,  # noqa: N803
) -> Any:
    """C is stored in units of both scales, and alpha scales it too."""
    bias = None if c is None else _dq(op, c, op.Mul(a_s, bs), axis=-1)
    weights = _dq(op, b, bs, bz, 0 if transB else 1)
    y = op.Gemm(_dq(op, a, a_s, az), weights, bias, alpha=alpha, beta=alpha, transA=transA, transB=transB)
    return y if ys is None else Stored(y, ys, yz)


def _add_or_mul(op_type: str) -> None:
    @_computes(f"QLinear{op_type}")
    def function(
        op: Any, a: Any, a_s: Any, az: Any, b: Any, bs: Any, bz: Any, ys: Any, yz: Any = None
    ) -> Stored:
        return Stored(op.node(op_type, _dq(op, a, a_s, az), _dq(op, b, bs, bz)), ys, yz)


def _activation(op_type: str) -> None:
    @_computes(f"QLinear{op_type}")
    def function(op: Any, x: Any, xs: Any, xz: Any, ys: Any, yz: Any = None, **a: Any) -> Stored:
        return Stored(op.node(op_type, _dq(op, x, xs, xz), **a), ys, yz)


def _pool(op_type: str) -> None:
    @_computes(f"QLinear{op_type}")
    def function(
        op: Any, x: Any, xs: Any, xz: Any, ys: Any, yz: Any = None, *, channels_last: int = 0, **a: Any
    ) -> Stored:
        planes = _planes(op, _dq(op, x, xs, xz), channels_last)
        return Stored(_last(op, op.node(op_type, planes, **a), channels_last), ys, yz)


for _name in ("Add", "Mul"):
    _add_or_mul(_name)
for _name in ("LeakyRelu", "Sigmoid"):
    _activation(_name)
for _name in ("AveragePool", "GlobalAveragePool"):
    _pool(_name)


@_computes("QLinearConcat")
def _concat(op: Any, ys: Any, yz: Any, *parts: Any, axis: int) -> Stored:
    values = [_dq(op, *parts[i : i + 3]) for i in range(0, len(parts), 3)]
    return Stored(op.Concat(*values, axis=axis), ys, yz)


@_computes("QLinearSoftmax")
def _softmax(
    op: Any, x: Any, xs: Any, xz: Any, ys: Any, yz: Any, *, opset: int, axis: int | None = None
) -> Stored:
    """Before opset 13 Softmax took all axes from `axis` on for one."""
    logits = _dq(op, x, xs, xz)
    if opset >= 13:
        return Stored(op.Softmax(logits, axis=-1 if axis is None else axis), ys, yz)
    flat = op.Softmax(op.Flatten(logits, axis=1 if axis is None else axis), axis=-1)
    return Stored(op.Reshape(flat, op.Shape(logits)), ys, yz)


@_computes("QLinearWhere")
def _where(
    op: Any, condition: Any, a: Any, a_s: Any, az: Any, b: Any, bs: Any, bz: Any, ys: Any, yz: Any
) -> Stored:
    return Stored(op.Where(condition, _dq(op, a, a_s, az), _dq(op, b, bs, bz)), ys, yz)
