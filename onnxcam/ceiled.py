"""Pools with ceil_mode, whose size ONNX got wrong before opset 22.

Its formula counted windows that begin in the padding behind the picture. No runtime computes them, but all
that infer shapes, onnxruntime among them, believe in them. The same pooling can be written so that the
formula is right: rounding down, or without the padding that no window reaches.
"""

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from onnxcam.errors import OnnxcamError

CORRECTED = 22
"""The opset from which on the formula is right."""


def is_ceiled(node: ir.Node) -> bool:
    """Whether `node` is a pooling that rounds its size up."""
    return (
        not node.domain
        and node.op_type in ("AveragePool", "LpPool", "MaxPool")
        and bool(node.attributes.get_int("ceil_mode", 0))
        and node.attributes.get_string("auto_pad", "NOTSET") == "NOTSET"
    )


def restate(graph: ir.Graph, shapes: Mapping[str, Sequence[int | None]]) -> bool:
    """Rewrite the first pooling of which the formula counts windows too many.

    Args:
        graph: of an opset before 22; changed in place.
        shapes: of values by name, as far as known.

    Returns:
        Whether there was one; what was inferred behind it is then wrong.

    Raises:
        OnnxcamError: it cannot be written in another way.
    """
    for node in filter(is_ceiled, graph):
        source = node.inputs[0]
        sizes = shapes.get(source.name or "", ())[2:] if source is not None else ()
        if _restate(node, sizes):
            return True
    return False


def _restate(node: ir.Node, sizes: Sequence[int | None]) -> bool:
    kernel = node.attributes["kernel_shape"].as_ints()
    n = len(kernel)
    ones, zeros = [1] * n, [0] * 2 * n
    strides = node.attributes.get_ints("strides", ones)
    dilations = node.attributes.get_ints("dilations", ones)
    pads = node.attributes.get_ints("pads", zeros)
    ends = list(pads[n:])
    floors, wrong = True, False
    for i, size in enumerate(sizes):
        if size is None:
            floors = False
            continue
        extent, step, before = dilations[i] * (kernel[i] - 1) + 1, strides[i], size + pads[i]
        spare = before + pads[n + i] - extent
        # The windows that begin in the picture or in the padding before it.
        count = min(-(-spare // step) + 1, -(-before // step))
        if count <= -(-spare // step):
            wrong = True
            ends[i] = (count - 1) * step + extent - before
        floors &= count == spare // step + 1
    if not wrong:
        return False
    if floors:
        node.attributes.add(ir.AttrInt64("ceil_mode", 0))
    elif min(ends) >= 0:
        node.attributes.add(ir.AttrInt64s("pads", [*pads[:n], *ends]))
    else:
        raise OnnxcamError(
            f"onnx infers a wrong size for the pooling {node.name or node.op_type!r}, which has ceil_mode "
            "and windows that lie apart; convert the model to opset 22, or leave the image size open"
        )
    return True
