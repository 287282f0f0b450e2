"""Gradient rules, one for each ONNX operator: `vjp` adds one, `RULES` holds them all.

A rule gets the Emitter, the gradient ``dy`` of the node's output, the output ``y`` and the node's
inputs, with the node's attributes as keyword arguments; it returns the gradient of each input::

    @vjp("Mul")
    def mul(op, dy, y, a, b):
        return unbroadcast(op, op.Mul(dy, b), a, y), unbroadcast(op, op.Mul(dy, a), b, y)

The defaults of the attributes in the signature are those of the ONNX operator, written once. Rules
read the output rather than the input where they can, so that a runtime may go on fusing a
convolution with its activation. They see opset 18 or newer: older graphs are converted before.
"""

from onnxcam.vjp import (
    activation,
    contrib,
    conv,
    elementwise,
    index,
    linalg,
    norm,
    pool,
    quant,
    recurrent,
    reduce,
    resize,
    shape,
)
from onnxcam.vjp.registry import RULES, Rule, vjp
from onnxcam.vjp.variants import VARIANTS

__all__ = ["RULES", "VARIANTS", "Rule", "vjp"]

del activation, contrib, conv, elementwise, index, linalg, norm, pool, quant, recurrent, reduce, resize, shape
