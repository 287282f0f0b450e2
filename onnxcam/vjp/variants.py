"""VARIANTS: what some methods propagate instead of the gradient, as rules in the place of others.

A rectifier is Relu, or Clip from 0 (as in ReLU6). LeakyRelu, Elu, Gelu and the like let something pass on
both sides, so they keep their gradient.
"""

from collections.abc import Mapping

import onnx_ir as ir
from onnx_ir import Value

from onnxcam.emit import Emitter
from onnxcam.vjp.activation import clip, relu
from onnxcam.vjp.registry import RULES, Rule, rule
from onnxcam.vjp.shapes import constant_array


def rectifies(node: ir.Node) -> bool:
    """Whether `node` is a rectifier."""
    if node.domain or node.op_type not in ("Relu", "Clip"):
        return False
    return node.op_type == "Relu" or _is_zero(node.inputs[1] if len(node.inputs) > 1 else None)


def _is_zero(low: Value | None) -> bool:
    array = None if low is None else constant_array(low)
    return array is not None and array.size == 1 and not array.any()


def _guided_relu(op: Emitter, dy: Value, y: Value, x: Value) -> Value:
    """Only what is positive passes, and where the input was. Springenberg et al. 2014, figure 1."""
    return relu(op, op.Relu(dy), y, x)


def _guided_clip(
    op: Emitter, dy: Value, y: Value, x: Value, low: Value | None = None, high: Value | None = None
) -> tuple[Value | None, ...]:
    return clip(op, op.Relu(dy) if _is_zero(low) else dy, y, x, low, high)


def _deconvolved_relu(op: Emitter, dy: Value, y: Value, x: Value) -> Value:
    """Only what is positive passes, wherever that is. Zeiler and Fergus 2013, section 2.1."""
    return op.Relu(dy)


def _deconvolved_clip(
    op: Emitter, dy: Value, y: Value, x: Value, low: Value | None = None, high: Value | None = None
) -> tuple[Value | None, ...]:
    """The upper bound is one of activations, not of what is sent back."""
    return (op.Relu(dy), None, None) if _is_zero(low) else clip(op, dy, y, x, low, high)


VARIANTS: dict[str, Mapping[tuple[str, str], Rule]] = {
    "relu as identity": {("", "Relu"): RULES["", "Identity"]},
    "guided": {("", "Relu"): rule(_guided_relu), ("", "Clip"): rule(_guided_clip)},
    "deconvnet": {("", "Relu"): rule(_deconvolved_relu), ("", "Clip"): rule(_deconvolved_clip)},
    "guided relu": {("", "Relu"): rule(_guided_relu)},
    "deconvnet relu": {("", "Relu"): rule(_deconvolved_relu)},
}
"""Rules by the name of the variant. The last two, of other libraries, leave ReLU6 its gradient."""
