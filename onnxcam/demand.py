"""Maps only when they are asked for: everything that was added goes behind one boolean input."""

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
from onnx_ir import Value

from onnxcam.card import WANTED
from onnxcam.emit import Emitter
from onnxcam.subgraphs import reads
from onnxcam.targets import add_input


def behind_input(op: Emitter, outputs: Mapping[str, Value], optional: bool) -> dict[str, Value]:
    """Put the emitted nodes that the model itself does not read into one branch of an If.

    Args:
        op: where the nodes went.
        outputs: what they compute for the outside.
        optional: whether the input ``cam_wanted`` has a default, false.

    Returns:
        The same outputs, behind the If; empty, with all sizes 0, where they are not wanted.
    """
    graph = op.graph
    wanted = Value(name=WANTED, shape=ir.Shape([]), type=ir.TensorType(ir.DataType.BOOL))
    add_input(op, wanted, np.array(False) if optional else None)
    emitted, needed, moved = set(op.nodes), set[Value](), list[ir.Node]()
    for node in reversed(graph):
        if node in emitted and needed.isdisjoint(node.outputs):
            moved.append(node)
        else:
            needed.update(reads(node))
    made = ir.Graph([], [], nodes=[], name=op.fresh("wanted"))
    for node in reversed(moved):
        graph.remove(node)
        made.append(node)
    empty = ir.Graph([], [], nodes=[], name=op.fresh("unwanted"))
    for value in outputs.values():
        assert value.dtype is not None and value.shape is not None
        with op.body(made):
            producer = value.producer()
            inside = producer is not None and producer.graph is made and value not in made.outputs
            made.outputs.append(value if inside else op.Identity(value))
        with op.body(empty):
            nothing = np.zeros([0] * len(value.shape), value.dtype.numpy())
            empty.outputs.append(op.Identity(op.constant(nothing)))
    found = op.If(wanted, then_branch=made, else_branch=empty, outputs=len(outputs))
    results = [found] if len(outputs) == 1 else list(found)
    for result, value in zip(results, outputs.values(), strict=True):
        result.type, result.shape = value.type, ir.Shape([None] * len(value.shape))  # type: ignore[arg-type]
    return dict(zip(outputs, results, strict=True))
