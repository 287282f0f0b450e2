"""What onnx's own tools must be told about the operators that onnxruntime's optimiser writes into files."""

import functools
from collections.abc import Iterator

import onnx
import onnx_ir as ir

from onnxcam.errors import OnnxcamError

DOMAIN = "com.microsoft"

_IN_ONNX_DOMAIN = ("GroupNormalization", "LayerNormalization", "SimplifiedLayerNormalization")
"""Those that stand in ONNX's domain at any opset.

ONNX itself has LayerNormalization from opset 17 on; GroupNormalization it calls deprecated before opset 21.
"""

_LAYOUTS = ("com.microsoft.nchwc", "com.ms.internal.nhwc")
"""Domains of operators on activations that are laid out in memory as one kind of processor likes them."""


def refuse_layouts(model: ir.Model) -> None:
    """Refuse a file that onnxruntime's optimiser has rearranged for one kind of processor.

    Raises:
        OnnxcamError: it holds operators of such a layout.
    """
    for node in model.graph.all_nodes():
        if node.domain in _LAYOUTS:
            raise OnnxcamError(
                f"onnxruntime's optimiser rearranged the model for one kind of processor (node {node.name!r} "
                f"is a {node.domain}.{node.op_type}); attach to the model before that, or let onnxruntime "
                "optimise it up to ORT_ENABLE_EXTENDED only"
            )


def move_out(proto: onnx.ModelProto) -> None:
    """Move operators that stand in ONNX's domain, but that it does not know, to onnxruntime's."""
    opset = {entry.domain: entry.version for entry in proto.opset_import}
    for node in _nodes(proto.graph):
        if node.domain == "" and node.op_type in _IN_ONNX_DOMAIN and not _in_onnx(node.op_type, opset[""]):
            node.domain = DOMAIN
            if DOMAIN not in opset:
                opset[DOMAIN] = 1
                proto.opset_import.append(onnx.helper.make_opsetid(DOMAIN, 1))


def move_back(proto: onnx.ModelProto) -> None:
    """Undo `move_out`."""
    for node in _nodes(proto.graph):
        if node.domain == DOMAIN and node.op_type in _IN_ONNX_DOMAIN:
            node.domain = ""


def _in_onnx(op_type: str, opset: int) -> bool:
    known = onnx.defs.has(op_type, max_inclusive_version=opset)
    return known and not onnx.defs.get_schema(op_type, opset).deprecated


def stand_in(graph: onnx.GraphProto) -> None:
    """Replace nodes by standard ones whose outputs have the same types and shapes, for shape inference."""
    for body in _bodies(graph):
        stand_in(body)
    nodes = [known for node in graph.node for known in stand_ins(node)]
    del graph.node[:]
    graph.node.extend(nodes)


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    yield from graph.node
    for body in _bodies(graph):
        yield from _nodes(body)


def _bodies(graph: onnx.GraphProto) -> list[onnx.GraphProto]:
    return [a.g for node in graph.node for a in node.attribute if a.HasField("g")]


def stand_ins(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """Return standard operators whose outputs have the types and shapes of `node`'s, for shape inference.

    A node that onnx infers well, or that nothing is known of, is returned as it is.
    """
    make = functools.partial(onnx.helper.make_node, name=node.name)
    if node.op_type in ("GroupNormalization", "MeanVarianceNormalization"):
        # Through the functions that define them, onnx 1.23 infers no shape, or refuses half precision.
        return [make("Identity", node.input[:1], node.output[:1])]
    if node.domain != DOMAIN:
        return [node]
    attributes = {attribute.name: attribute.i for attribute in node.attribute}
    match node.op_type:
        case "Gelu" | "BiasGelu" | "FastGelu" | "QuickGelu" | "SimplifiedLayerNormalization":
            return [make("Identity", node.input[:1], node.output[:1])]
        case "SkipLayerNormalization" | "SkipSimplifiedLayerNormalization":
            alike = [name for i, name in enumerate(node.output) if name and i in (0, 3)]
            return [make("Identity", node.input[:1], [name]) for name in alike]
        case "FusedConv" | "FusedGemm":
            plain = make(node.op_type.removeprefix("Fused"), node.input[:2], node.output)
            plain.attribute.extend(a for a in node.attribute if not a.name.startswith("activation"))
            return [plain]
        case "FusedMatMul" | "TransposeMatMul":
            operands, nodes = list(node.input), []
            for i, which in enumerate("AB"):
                equation = _order(attributes.get(f"trans{which}", 0), attributes.get(f"transBatch{which}", 0))
                if equation is not None:
                    moved = f"{node.output[0]}/{which}"
                    nodes.append(make("Einsum", [operands[i]], [moved], equation=equation))
                    operands[i] = moved
            return [*nodes, make("MatMul", operands, node.output)]
        case _:
            return [node]


def _order(transposed: int, batch_transposed: int) -> str | None:
    """The Einsum that brings an operand of FusedMatMul into the order in which MatMul expects its axes."""
    if not transposed and not batch_transposed:
        return None
    return ("i...j" if batch_transposed else "...ij") + "->" + ("...ji" if transposed else "...ij")
