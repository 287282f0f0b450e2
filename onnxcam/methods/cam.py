"""Maps that weigh the channels of one activation: CAM, Grad-CAM and their relatives.

In the equations A_k is channel k of the activation, g_k = dy/dA_k the gradient of the class score y,
< > the mean and S the sum over the plane.
"""

from onnx_ir import Value

from onnxcam.emit import Emitter
from onnxcam.methods.registry import method

PLANE = [3, 4]
"""The spatial axes of [N,K,C,h,w]."""


def weighted_sum(op: Emitter, w: Value, a: Value) -> Value:
    """Return sum_k w_k A_k [N,K,h,w] for weights w [N,K,C]: one product of matrices per image."""
    plane = op.Shape(a, start=3)
    flat = op.Reshape(op.Squeeze(a, [1]), [0, 0, -1])
    summed = op.MatMul(w, flat)
    return op.Reshape(summed, op.Concat(op.Shape(w, start=0, end=2), plane, axis=0))


@method("gradcam")
def gradcam(op: Emitter, a: Value, da: Value) -> Value:
    """ReLU(sum_k <g_k> A_k). Selvaraju et al. 2017, eq. 1-2."""
    return op.Relu(weighted_sum(op, op.ReduceMean(da, PLANE, keepdims=0), a))


@method("gradcam++")
def gradcam_plus_plus(op: Emitter, a: Value, da: Value) -> Value:
    """ReLU(sum_k S(alpha relu(g_k)) A_k), alpha = g^2/(2 g^2 + S(A) g^3). Chattopadhay et al. 2018, eq. 19.

    That is alpha = 1 / (2 + S(A_k) g_k); where g is 0 its product with relu(g) is 0 whatever alpha is.
    """
    positive = op.Relu(da)
    denominator = op.Add(op.Mul(op.ReduceSum(a, PLANE, keepdims=1), da), 2.0)
    share = op.Where(op.Greater(positive, 0.0), op.Div(positive, denominator), 0.0)
    return op.Relu(weighted_sum(op, op.ReduceSum(share, PLANE, keepdims=0), a))


@method("hirescam")
def hirescam(op: Emitter, a: Value, da: Value) -> Value:
    """ReLU(sum_k g_k A_k), position by position. Draelos and Carin 2020, eq. 5."""
    return op.Relu(op.ReduceSum(op.Mul(da, a), [2], keepdims=0))


@method("cam", linear_head=True)
def cam(op: Emitter, a: Value, da: Value) -> Value:
    """sum_k W_ck A_k, signed. Zhou et al. 2016, eq. 2.

    On a head that averages the plane and then weighs the channels, W_ck is the gradient's sum S(g_k).
    """
    return weighted_sum(op, op.ReduceSum(da, PLANE, keepdims=0), a)
