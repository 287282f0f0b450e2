"""Running a part of the graph again, on other values."""

from collections.abc import Mapping, Sequence

from onnx_ir import Value

from onnxcam.backward import ancestors
from onnxcam.emit import Emitter
from onnxcam.subgraphs import reads


def replay(op: Emitter, outputs: Sequence[Value], substitutes: Mapping[Value, Value]) -> list[Value]:
    """Emit again all that lies between some values and the outputs, on substitutes of the same shapes.

    Args:
        op: where the nodes go.
        outputs: values of the graph.
        substitutes: what takes the place of values that the outputs depend on.

    Returns:
        The outputs as they come out then; one that depends on none of the values is itself.
    """
    found: dict[Value, Value] = dict(substitutes)
    for node in ancestors(outputs):
        # The substitutes have the shapes of what they stand for.
        if node.op_type == "Shape" and not node.domain:
            continue
        if any(value in found for value in reads(node)) and not any(v in substitutes for v in node.outputs):
            copied = op.copy(node, found)
            found.update(zip(node.outputs, copied, strict=True))
    return [found.get(value, value) for value in outputs]
