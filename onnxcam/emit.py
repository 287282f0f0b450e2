"""Writing ONNX nodes: ``op.Relu(x)`` appends a Relu node to a graph and returns its output value."""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import onnx
import onnx_ir as ir

Operand: TypeAlias = "ir.Value | np.ndarray | bool | float | Sequence[int] | None"

_KNOWN_DATA_LIMIT = 1024
"""Constants of up to this many bytes are shown to shape inference, which reads axes, shapes and pads."""


@functools.cache
def _schema(op_type: str, opset: int) -> onnx.defs.OpSchema:
    return onnx.defs.get_schema(op_type, opset)


class Emitter:
    """Appends standard ``ai.onnx`` nodes to one graph.

    An operand may be a value of the graph, a numpy array, a Python number (it takes the dtype of
    the operands that share its type in the operator's schema), a sequence of integers (int64) or
    None for an optional input that is left out. Constants become initializers of the main graph,
    each distinct one once. Every value that comes back has a dtype and, as far as it can be known,
    a shape.

    Attributes:
        graph: where the nodes go: the main graph, or the body of a Scan or an If.
        nodes: the nodes emitted so far, in order.
        portable: whether runtimes that lack Scan must do, so that what is done for each of many is written
            out for each.
    """

    def __init__(self, graph: ir.Graph, opset: int, prefix: str, portable: bool = False) -> None:
        self.graph = graph
        self.portable = portable
        self.nodes: list[ir.Node] = []
        self._main = graph
        self._anchor: ir.Node | None = None
        self._opset = opset
        self._scope = prefix
        self._taken = {value.name for value in all_values(graph)}
        self._constants: dict[tuple[Any, ...], ir.Value] = {}
        self._counts: dict[str, int] = {}

    @contextlib.contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Names of nodes emitted within the block begin with ``<prefix>/<name>/``."""
        outer = self._scope
        self._scope = f"{outer}/{name.strip('/')}"
        try:
            yield
        finally:
            self._scope = outer

    @contextlib.contextmanager
    def body(self, graph: ir.Graph) -> Iterator[None]:
        """Nodes emitted within the block go to `graph`, the body of a Scan or a branch of an If."""
        outer = self.graph
        self.graph = graph
        try:
            yield
        finally:
            self.graph = outer

    @contextlib.contextmanager
    def before(self, node: ir.Node) -> Iterator[None]:
        """Nodes emitted within the block are put before `node`, into its graph."""
        assert node.graph is not None
        outer = self._anchor
        self._anchor = node
        try:
            yield
        finally:
            self._anchor = outer

    def __getattr__(self, op_type: str) -> Callable[..., Any]:
        if not op_type[:1].isupper():
            raise AttributeError(op_type)
        return functools.partial(self.node, op_type)

    def node(self, op_type: str, *operands: Operand, outputs: int = 1, **attributes: Any) -> Any:
        """Append one node.

        Args:
            op_type: the operator's name in the ``ai.onnx`` domain.
            operands: its inputs, in order.
            outputs: how many outputs the node has; with more than one a tuple is returned. Those of an
                operator with a subgraph come back without a type: the caller knows it.
            attributes: the node's attributes; those that are None are left out.
        """
        schema = _schema(op_type, self._opset)
        inputs = self._values(schema, operands)
        while inputs and inputs[-1] is None:
            inputs.pop()
        name = self.fresh(op_type)
        node = ir.Node(
            "",
            op_type,
            inputs,
            ir.convenience.convert_attributes({k: v for k, v in attributes.items() if v is not None}),
            num_outputs=outputs,
            name=name,
        )
        for index, value in enumerate(node.outputs):
            value.name = name if index == 0 else f"{name}:{index}"
        if not any(isinstance(value, ir.Graph) for value in attributes.values()):
            self._infer(schema, node)
        self._append(node)
        return node.outputs[0] if outputs == 1 else tuple(node.outputs)

    def _append(self, node: ir.Node) -> None:
        if self._anchor is None:
            self.graph.append(node)
        else:
            self._anchor.graph.insert_before(self._anchor, node)  # type: ignore[union-attr]
        self.nodes.append(node)

    def copy(self, node: ir.Node, substitutes: Mapping[ir.Value, ir.Value]) -> list[ir.Value]:
        """Append `node` again, reading substitutes instead of the values they stand for; return its outputs.

        The outputs get the types and shapes of the original's.
        """
        attributes = []
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                body = attribute.as_graph().clone(allow_outer_scope_values=True)
                for inner in ir.traversal.RecursiveGraphIterator(body):
                    for index, value in enumerate(inner.inputs):
                        if value is not None and value in substitutes:
                            inner.replace_input_with(index, substitutes[value])
                for index, value in enumerate(body.outputs):
                    body.outputs[index] = substitutes.get(value, value)
                for value in all_values(body):
                    value.name = self.fresh(value.name or "value")
                attribute = ir.AttrGraph(attribute.name, body)
            attributes.append(attribute)
        name = self.fresh(node.name or node.op_type)
        copied = ir.Node(
            node.domain,
            node.op_type,
            [None if value is None else substitutes.get(value, value) for value in node.inputs],
            attributes,
            num_outputs=len(node.outputs),
            overload=node.overload,
            name=name,
        )
        for index, (value, original) in enumerate(zip(copied.outputs, node.outputs, strict=True)):
            value.name = (name if index == 0 else f"{name}:{index}") if original.name else ""
            value.type, value.shape = original.type, original.shape
        self._append(copied)
        return list(copied.outputs)

    def constant(self, array: np.ndarray) -> ir.Value:
        """Return an initializer of the main graph that holds `array`; equal arrays share one."""
        key = (array.dtype.str, array.dtype.name, array.shape, array.tobytes())
        if key not in self._constants:
            name = self.fresh("constant")
            tensor = ir.tensor(array, name=name)
            value = ir.Value(
                name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
            )
            self._main.register_initializer(value)
            self._constants[key] = value
        return self._constants[key]

    def adopt(self, nodes: Iterable[ir.Node], constants: Iterable[ir.Value]) -> None:
        """Treat nodes and constants of the graph as emitted ones, named accordingly."""
        for node in nodes:
            node.name = self.fresh(node.op_type)
            for index, value in enumerate(node.outputs):
                value.name = node.name if index == 0 else f"{node.name}:{index}"
            self.nodes.append(node)
        self._constants.update({("adopted", value.name): value for value in constants})

    def remove_dead(self, keep: Sequence[ir.Value]) -> None:
        """Remove emitted nodes and constants that nothing reads and that are not in `keep`."""
        kept = set(keep)
        self._remove(self.nodes, kept)
        for key, value in list(self._constants.items()):
            if not value.uses() and value not in kept:
                del self._main.initializers[value.name]  # type: ignore[arg-type]
                del self._constants[key]

    def remove_unread(self, body: ir.Graph) -> None:
        """Remove the nodes that the outputs of `body`, all of whose nodes were emitted, do not need."""
        self._remove(body.all_nodes(), set())

    def _remove(self, nodes: Iterable[ir.Node], kept: set[ir.Value]) -> None:
        waiting = list(nodes)
        own = set(waiting)
        while waiting:
            node = waiting.pop()
            if node not in own or node.graph is None:
                continue
            if any(value.uses() or value in kept or value.is_graph_output() for value in node.outputs):
                continue
            waiting.extend(node.predecessors())
            for attribute in node.attributes.values():
                if attribute.type == ir.AttributeType.GRAPH:
                    attribute.as_graph().outputs.clear()
                    waiting.extend(attribute.as_graph())
            node.graph.remove(node, safe=True)
        self.nodes = [node for node in self.nodes if node.graph is not None]

    def fresh(self, base: str) -> str:
        """Return a name in the current scope that nothing in the model has yet."""
        stem = f"{self._scope}/{base}"
        while True:
            count = self._counts.get(stem, 0)
            self._counts[stem] = count + 1
            name = f"{stem}_{count}" if count else stem
            if name not in self._taken:
                self._taken.add(name)
                return name

    def _values(self, schema: onnx.defs.OpSchema, operands: Sequence[Operand]) -> list[ir.Value | None]:
        formal = [schema.inputs[min(i, len(schema.inputs) - 1)].type_str for i in range(len(operands))]
        dtypes = {
            kind: operand.dtype
            for kind, operand in zip(formal, operands, strict=True)
            if isinstance(operand, ir.Value) and operand.dtype is not None
        }
        values: list[ir.Value | None] = []
        for kind, operand in zip(formal, operands, strict=True):
            if operand is None or isinstance(operand, ir.Value):
                values.append(operand)
            elif isinstance(operand, np.ndarray | np.generic):
                values.append(self.constant(np.asarray(operand)))
            elif isinstance(operand, bool | int | float):
                dtype = dtypes.get(kind)
                if dtype is None and isinstance(operand, float):
                    dtype = next(iter(dtypes.values()))  # the exponent of a Pow has a type of its own
                as_dtype = np.dtype(np.int64) if dtype is None else dtype.numpy()
                values.append(self.constant(np.asarray(operand, as_dtype)))
            else:
                values.append(self.constant(np.asarray(operand, np.int64)))
        return values

    def _infer(self, schema: onnx.defs.OpSchema, node: ir.Node) -> None:
        """Give the node's outputs the dtypes and shapes that ONNX's own inference finds."""
        types: dict[str, onnx.TypeProto] = {}
        data: dict[str, onnx.TensorProto] = {}
        for value in node.inputs:
            if value is None:
                continue
            assert value.name is not None
            types[value.name] = ir.serde.serialize_value(value).type
            tensor = None if value.is_graph_input() else ir.convenience.get_const_tensor(value)
            if tensor is not None and tensor.nbytes <= _KNOWN_DATA_LIMIT:
                data[value.name] = ir.serde.serialize_tensor(tensor)
        inferred = onnx.shape_inference.infer_node_outputs(
            schema,
            ir.serde.serialize_node(node),
            types,
            data,
            opset_imports=[onnx.helper.make_opsetid("", self._opset)],
        )
        for value in node.outputs:
            proto = inferred.get(value.name or "")
            if proto is not None:
                typed = ir.serde.deserialize_type_proto_for_type(proto)
                value.type = typed
                value.shape = ir.serde.deserialize_type_proto_for_shape(proto)


def all_values(graph: ir.Graph) -> Iterator[ir.Value]:
    """Iterate over the inputs, the initializers and what the nodes compute, in subgraphs too."""
    for each in (graph, *graph.subgraphs()):
        yield from each.inputs
        yield from each.initializers.values()
    for node in graph.all_nodes():
        yield from node.outputs
