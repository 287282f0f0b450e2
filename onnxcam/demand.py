"""Maps only when they are asked for: everything that was added goes behind one boolean input."""

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
from onnx_ir import Value

from onnxcam.card import WANTED
from onnxcam.emit import Emitter
from onnxcam.subgraphs import reads
from onnxcam.targets import add_input
from onnxcam.vjp.shapes import dims


def behind_input(op: Emitter, outputs: Mapping[str, Value], optional: bool) -> dict[str, Value]:
    """Put the emitted nodes that the model itself does not read into one branch of an If.

    Args:
        op: where the nodes went.
        outputs: what they compute for the outside.
        optional: whether the input ``cam_wanted`` has a default, false.

    Returns:
        The same outputs, behind the If; where they are not wanted they are empty, with all sizes 0. If the
        emitter is to be portable they are 0 in their own sizes, as far as these are known: tract and OpenCV
        want both branches to agree.
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
    shapes = []
    for value in outputs.values():
        assert value.dtype is not None
        with op.body(made):
            producer = value.producer()
            inside = producer is not None and producer.graph is made and value not in made.outputs
            made.outputs.append(value if inside else op.Identity(value))
        sizes = dims(value)
        alike = op.portable and all(isinstance(size, int) for size in sizes)
        shapes.append(ir.Shape(sizes if alike else [None] * len(sizes)))
        with op.body(empty):
            zeros = op.constant(np.zeros([int(alike)] * len(sizes), value.dtype.numpy()))
            empty.outputs.append(op.Expand(zeros, sizes) if alike else op.Identity(zeros))
    found = op.If(wanted, then_branch=made, else_branch=empty, outputs=len(outputs))
    results = [found] if len(outputs) == 1 else list(found)
    for result, value, shape in zip(results, outputs.values(), shapes, strict=True):
        result.type, result.shape = value.type, shape
    return dict(zip(outputs, results, strict=True))
