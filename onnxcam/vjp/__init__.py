"""Gradient rules, one for each ONNX operator: `vjp` adds one, `RULES` holds them all.

A rule of one's own is a function that is registered before ``onnxcam.attach`` or ``onnxcam.gradient``
is called, in the same process::

    from onnxcam.vjp import vjp

    @vjp("BetaSwish", domain="com.example")
    def beta_swish(op, dy, y, x, *, beta=1.0):
        s = op.Sigmoid(op.Mul(x, beta))
        return op.Mul(dy, op.Add(s, op.Mul(op.Mul(y, beta), op.Sub(1.0, s))))

It is called once for each node of the operator between the layer and the scores, and does not compute
gradients but writes the nodes that will: ``op.Sigmoid(v)`` adds a node of the standard operator Sigmoid and
returns its output, see `onnxcam.emit.Emitter`. The operands of such a call are values, numpy arrays, numbers
(which take the dtype of the other operands) or sequences of integers. A rule gets

- ``op``;
- ``dy``, the gradient of the node's output, of the same shape and dtype as the output;
- ``y``, the output itself;
- the node's inputs, in order; an optional one that the node leaves out is None, so give it a default;
- the node's attributes as keyword-only arguments, with the operator's defaults. A node that has an attribute
  which the rule does not name is refused.

It returns the gradient of each input, of the input's shape and dtype, in order: None where there is none, as
for indices, and a bare value instead of a tuple where there is one input. Where an operator has several
outputs, call the parameters ``dys`` and ``ys`` instead: they become tuples with an entry for each output,
and ``dys`` holds None where no gradient arrives.

Shapes are known as far as the graph tells: `onnxcam.vjp.shapes` has `dims`, and `unbroadcast` sums a
gradient over the axes along which an input was broadcast::

    @vjp("Mul")
    def mul(op, dy, y, a, b):
        return unbroadcast(op, op.Mul(dy, b), a, y), unbroadcast(op, op.Mul(dy, a), b, y)

ONNX cannot infer what an operator that it does not know computes: the model's ``value_info`` must tell the
type and shape of its outputs. Models older than opset 18 are converted before rules see them. Where
either will do, read the output rather than the input, so that a runtime may go on fusing a convolution with
its activation. To check a rule, compare what ``onnxcam.gradient`` adds with central differences in float64.
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
from onnxcam.vjp.variants import PORTABLE, VARIANTS, under

__all__ = ["PORTABLE", "RULES", "VARIANTS", "Rule", "under", "vjp"]

del activation, contrib, conv, elementwise, index, linalg, norm, pool, quant, recurrent, reduce, resize, shape
