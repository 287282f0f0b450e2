"""VARIANTS: rules in the place of others, for what some methods propagate instead of the gradient, and for
the gradient in a form that every runtime computes alike.

A rectifier is Relu, or Clip from 0 (as in ReLU6). LeakyRelu, Elu, Gelu and the like let something pass on
both sides, so they keep their gradient.
"""

import functools
from collections.abc import Mapping
from typing import Any

import onnx_ir as ir
from onnx_ir import Value

from onnxcam.emit import Emitter
from onnxcam.vjp.activation import clip, relu
from onnxcam.vjp.pool import first_in_window
from onnxcam.vjp.quant import as_stored
from onnxcam.vjp.registry import RULES, Rule, rule
from onnxcam.vjp.shapes import constant_array, dims, is_constant

PORTABLE = "portable"
"""The variant that gives the gradient itself."""


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


def _unclamped_quantize(
    op: Emitter,
    dy: Value,
    y: Value,
    x: Value,
    scale: Value,
    zero_point: Value | None = None,
    *,
    axis: int = 1,
    block_size: int = 0,
    output_dtype: int = 0,
    precision: int = 0,
    saturate: int = 1,
) -> Value:
    """A Relu may have become the lower end of the range."""
    return as_stored(op, dy, x, scale, axis, block_size)


def _own_weights(op_type: str, axes: slice) -> Rule:
    """The rule of an operator with weights as second input, with a copy of them if square along `axes`.

    The larger of each number and itself is that number. OpenVINO 2026.4 packs square weights once, for the
    first of two operators that read them, and the other then takes them for packed its own way.
    """
    function = RULES["", op_type].function

    @functools.wraps(function)
    def through(
        op: Emitter, dy: Value, y: Value, x: Value, w: Value, *rest: Value | None, **attributes: Any
    ) -> tuple[Value | None, ...]:
        square = len(set(dims(w)[axes])) == 1
        dx, dw, *others = function(op, dy, y, x, op.Max(w, w) if square else w, *rest, **attributes)
        return dx, None if is_constant(w) else dw, *others

    return rule(through)


VARIANTS: dict[str, Mapping[tuple[str, str], Rule]] = {
    "relu as identity": {
        ("", "Relu"): RULES["", "Identity"],
        ("", "QuantizeLinear"): rule(_unclamped_quantize),
    },
    "guided": {("", "Relu"): rule(_guided_relu), ("", "Clip"): rule(_guided_clip)},
    "deconvnet": {("", "Relu"): rule(_deconvolved_relu), ("", "Clip"): rule(_deconvolved_clip)},
    PORTABLE: {
        ("", "MaxPool"): rule(first_in_window),
        **{("", name): _own_weights(name, slice(0, 2)) for name in ("Conv", "ConvTranspose", "Gemm")},
        ("", "MatMul"): _own_weights("MatMul", slice(-2, None)),
    },
    "guided relu": {("", "Relu"): rule(_guided_relu)},
    "deconvnet relu": {("", "Relu"): rule(_deconvolved_relu)},
}
"""Rules by the name of the variant. The last two, of other libraries, leave ReLU6 its gradient."""


def under(*variants: str | None) -> Mapping[tuple[str, str], Rule]:
    """Return the rule of every operator under some variants, the later ones first; None stands for none."""
    rules = dict(RULES)
    for name in variants:
        if name is not None:
            rules.update(VARIANTS[name])
    return rules
