"""The constants that a model adds on the way from its picture to its scores."""

from collections.abc import Sequence

import onnx_ir as ir
from onnx_ir import Value

from onnxcam.backward import path
from onnxcam.emit import Emitter
from onnxcam.vjp.shapes import rank

_THIRD_IS_BIAS = ("Conv", "ConvTranspose", "InstanceNormalization", "LayerNormalization")
_ADDING = ("Add", "Sub", "Sum")


def biases(op: Emitter, scores: Value, picture: Value) -> list[tuple[Value, Value]]:
    """Find the biases of Conv, ConvTranspose, Gemm and normalisations, and what Add, Sub and Sum add.

    That of a BatchNormalization is what it adds to its scaled input, shift - mean scale / deviation.

    Args:
        op: where the nodes go.
        scores: where the way ends.
        picture: where it begins; whatever does not depend on it is a constant.

    Returns:
        Pairs of a value that a node computes and the constant in it, which broadcasts against that value.
    """
    nodes = path(scores, picture)
    depending = {picture, *(value for node in nodes for value in node.outputs)}
    found = []
    for node in nodes:
        constants = [v for v in node.inputs if v is not None and v not in depending]
        bias = _bias(op, node, constants) if not node.domain else None
        if bias is not None:
            found.append((node.outputs[0], bias))
    return found


def _bias(op: Emitter, node: ir.Node, constants: Sequence[Value]) -> Value | None:
    y = node.outputs[0]
    if node.op_type in _ADDING:
        if not constants:
            return None
        bias = constants[0] if len(constants) == 1 else op.Sum(*constants)
        return op.Neg(bias) if node.op_type == "Sub" and node.inputs[1] is bias else bias
    if node.op_type == "BatchNormalization":
        _, scale, shift, mean, variance = node.inputs
        epsilon = node.attributes["epsilon"].as_float() if "epsilon" in node.attributes else 1e-5
        deviation = op.Sqrt(op.Add(variance, epsilon))
        return _along_channels(op, op.Sub(shift, op.Div(op.Mul(mean, scale), deviation)), y)
    third = node.inputs[2] if len(node.inputs) > 2 else None
    if third is None:
        return None
    if node.op_type == "Gemm":
        beta = node.attributes["beta"].as_float() if "beta" in node.attributes else 1.0
        return third if beta == 1.0 else op.Mul(third, beta)
    if node.op_type not in _THIRD_IS_BIAS:
        return None
    return third if node.op_type == "LayerNormalization" else _along_channels(op, third, y)


def _along_channels(op: Emitter, bias: Value, y: Value) -> Value:
    """Lay [C] out along axis 1 of [N,C,...]."""
    return op.Reshape(bias, [-1] + [1] * (rank(y) - 2))
