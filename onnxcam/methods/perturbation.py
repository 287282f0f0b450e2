"""Maps of what happens to the score when an activation or the picture is changed; no gradient is needed."""

from typing import TYPE_CHECKING

import numpy as np
from onnx_ir import Value

from onnxcam.emit import Emitter
from onnxcam.methods.algebra import resized, unit
from onnxcam.methods.registry import method

if TYPE_CHECKING:
    from onnxcam.probe import Probe


@method("ablationcam", cost="C times the layers after A")
def ablationcam(op: Emitter, probe: "Probe") -> Value:
    """ReLU(sum_k (y - y_k) / y A_k), y_k the score without channel k. Desai and Ramaswamy 2020, eq. 3."""
    a, y = probe.activation(), probe.y()
    channels = op.Range(np.int64(0), op.Squeeze(op.Shape(a, start=1, end=2), [0]), np.int64(1))

    def without(k: Value) -> Value:
        others = op.Unsqueeze(op.Not(op.Equal(channels, k)), [0, 2, 3])
        return probe.with_activation(op.Where(others, a, 0.0)).y()

    scores = op.Transpose(probe.each(channels, without), perm=[1, 2, 0])  # [N,K,C]
    y = op.Unsqueeze(y, [2])
    return op.Div(op.Sub(y, scores), y)


@method("scorecam", cost="C")
def scorecam(op: Emitter, probe: "Probe") -> Value:
    """ReLU(sum_k w_k A_k), w = softmax over k of y(X o s(up(A_k))) - y(0). Wang et al. 2020, eq. 4-8.

    s scales each channel, brought to the size of the picture X, to [0,1] by its own minimum and maximum.
    y(0), the score of the empty picture, is the same for all channels and leaves the softmax as it is.
    """
    channels = op.Transpose(probe.activation(), perm=[1, 0, 2, 3])

    def masked(channel: Value) -> Value:
        mask = unit(op, resized(op, op.Unsqueeze(channel, [1]), probe.size()))
        return probe.on(op.Mul(probe.picture, probe.over_picture(mask))).y()

    scores = op.Transpose(probe.each(channels, masked), perm=[1, 2, 0])  # [N,K,C]
    return op.Softmax(scores, axis=2)
