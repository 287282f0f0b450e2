"""Nodes with subgraphs: what they read from around them, and the branches of an If."""

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from onnxcam.emit import Emitter
from onnxcam.errors import OnnxcamError

_BRANCHES = ("then_branch", "else_branch")


def bodies(node: ir.Node) -> list[ir.Graph]:
    """Return the subgraphs of `node`."""
    found: list[ir.Graph] = []
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            found.append(attribute.as_graph())
        elif attribute.type == ir.AttributeType.GRAPHS:
            found.extend(attribute.as_graphs())
    return found


def is_if(node: ir.Node) -> bool:
    """Whether `node` runs one of two subgraphs."""
    return node.op_type == "If" and not node.domain


def branches(node: ir.Node) -> list[ir.Graph]:
    """Return the two subgraphs of an If: the one for true, the one for false."""
    return [node.attributes[name].as_graph() for name in _BRANCHES]


def within(node: ir.Node) -> Iterator[ir.Node]:
    """Iterate over `node` and all nodes of its subgraphs."""
    yield node
    for body in bodies(node):
        yield from body.all_nodes()


def refuse_inner(graph: ir.Graph, what: str, name: str) -> None:
    """Complain if a node inside a node of `graph`, or what it computes, is called `name`.

    Raises:
        OnnxcamError: it is; `what` says what the name stands for.
    """
    for node in graph:
        for inner in within(node):
            if inner is not node and name in (inner.name, *(value.name for value in inner.outputs)):
                raise OnnxcamError(
                    f"{what} {name!r} lies inside node {node.name!r} ({node.op_type}), where nothing else "
                    f"can read it; choose one before or after that, such as {node.outputs[0].name!r}"
                )


def reads(node: ir.Node) -> list[ir.Value]:
    """Return the values that `node` reads, those of the graphs around it that its subgraphs read included."""
    found = [value for value in node.inputs if value is not None]
    for body in bodies(node):
        own = set(body.inputs)
        for inner in body:
            found.extend(value for value in reads(inner) if value not in own)
            own.update(inner.outputs)
        found.extend(value for value in body.outputs if value not in own)
    return found


def emit_if(op: Emitter, like: ir.Node, then_else: list[ir.Graph], outputs: list[ir.Value]) -> list[ir.Value]:
    """Emit an If on the condition of the If `like`.

    Its branches may read what the branches of `like` compute: `like` hands that out from now on, as further
    outputs behind its own. In the branch that is not taken a single zero stands for such a value.

    Args:
        op: where the node goes.
        like: an If.
        then_else: the branches.
        outputs: a value of the type and shape of each output.

    Raises:
        OnnxcamError: the type of what a branch of `like` would hand out is unknown.
    """
    for theirs, ours in zip(branches(like), then_else, strict=True):
        op.remove_unread(ours)
        for node in ours.all_nodes():
            for i, value in enumerate(node.inputs):
                if value is not None and value.graph is theirs:
                    node.replace_input_with(i, _from_outside(op, like, theirs, value))
    found = op.If(like.inputs[0], **dict(zip(_BRANCHES, then_else, strict=True)), outputs=len(outputs))
    results = [found] if len(outputs) == 1 else list(found)
    for result, value in zip(results, outputs, strict=True):
        result.type, result.shape = value.type, value.shape
    return results


def _from_outside(op: Emitter, node: ir.Node, branch: ir.Graph, value: ir.Value) -> ir.Value:
    """Return what holds `value`, computed in a `branch` of `node`, outside of the branches."""
    tensor = ir.convenience.get_const_tensor(value)
    if tensor is not None:
        return op.constant(tensor.numpy())
    if value not in branch.outputs:
        if value.dtype is None:
            raise OnnxcamError(
                f"the type of value {value.name!r}, inside node {node.name!r} ({node.op_type}), is unknown; "
                "declare it there (value_info)"
            )
        branch.outputs.append(value)
        (other,) = (graph for graph in branches(node) if graph is not branch)
        zero = np.zeros([1] * len(value.shape or ()), value.dtype.numpy())
        with op.body(other):
            other.outputs.append(op.Identity(op.constant(zero)))
        node.resize_outputs(len(branch.outputs))
        node.outputs[-1].name = op.fresh("read")
        node.outputs[-1].type = value.type
        node.outputs[-1].shape = None if value.shape is None else ir.Shape([None] * len(value.shape))
    return node.outputs[list(branch.outputs).index(value)]
