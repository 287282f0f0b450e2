"""Maps that weigh the channels of one activation: CAM, Grad-CAM and their relatives.

In the equations A_k is channel k of the activation, g_k = dy/dA_k the gradient of the class score y,
< > the mean and S the sum over the plane.
"""

from onnx_ir import Value

from onnxcam.emit import Emitter
from onnxcam.methods.algebra import PLANE
from onnxcam.methods.registry import method


@method("gradcam", cost="1 backward")
def gradcam(op: Emitter, da: Value) -> Value:
    """ReLU(sum_k <g_k> A_k). Selvaraju et al. 2017, eq. 1-2."""
    return op.ReduceMean(da, PLANE, keepdims=0)


@method("gradcam++", cost="1 backward")
def gradcam_plus_plus(op: Emitter, a: Value, da: Value) -> Value:
    """ReLU(sum_k S(alpha relu(g_k)) A_k), alpha = g^2/(2 g^2 + S(A) g^3). Chattopadhay et al. 2018, eq. 19.

    That is alpha = 1 / (2 + S(A_k) g_k); where g is 0 its product with relu(g) is 0 whatever alpha is.
    """
    positive = op.Relu(da)
    denominator = op.Add(op.Mul(op.ReduceSum(a, PLANE, keepdims=1), da), 2.0)
    share = op.Where(op.Greater(positive, 0.0), op.Div(positive, denominator), 0.0)
    return op.ReduceSum(share, PLANE, keepdims=0)


@method("xgradcam", cost="1 backward")
def xgradcam(op: Emitter, a: Value, da: Value) -> Value:
    """ReLU(sum_k S(g_k A_k) / S(A_k) A_k). Fu et al. 2020.

    A channel whose sum is zero gets no weight.
    """
    total = op.ReduceSum(a, PLANE, keepdims=0)
    empty = op.Equal(total, 0.0)
    weighed = op.ReduceSum(op.Mul(da, a), PLANE, keepdims=0)
    return op.Where(empty, 0.0, op.Div(weighed, op.Where(empty, 1.0, total)))


@method("hirescam", cost="1 backward")
def hirescam(op: Emitter, da: Value) -> Value:
    """ReLU(sum_k g_k A_k), position by position. Draelos and Carin 2020, eq. 5."""
    return da


@method("elementwise", cost="1 backward", gives="terms", unsigned=True)
def elementwise(op: Emitter, a: Value, da: Value) -> Value:
    """sum_k relu(g_k A_k), position by position: element-wise Grad-CAM. pytorch-grad-cam 2022."""
    return op.Relu(op.Mul(da, a))


@method("layercam", cost="1 backward")
def layercam(op: Emitter, da: Value) -> Value:
    """ReLU(sum_k relu(g_k) A_k), position by position. Jiang et al. 2021."""
    return op.Relu(da)


@method("finercam", cost="1 backward", target="rivals")
def finercam(op: Emitter, da: Value) -> Value:
    """ReLU(sum_k <g_k> A_k), g of the score less the mean of its three nearest. Zhang et al. 2025."""
    return gradcam(op, da)


@method("shapleycam", cost="2 backward")
def shapleycam(op: Emitter, da: Value, hda: Value) -> Value:
    """ReLU(sum_k <g_k - (H A)_k / 2> A_k), H the second derivative of y. Cai 2025, arXiv:2501.06261."""
    w = da if hda is None else op.Sub(da, op.Mul(hda, 0.5))
    return op.ReduceMean(w, PLANE, keepdims=0)


@method(
    "cam",
    cost="1 backward",
    rectified=False,
    rules="relu as identity",
    requires="linear head",
    instead="gradcam, which is the same map on such a head and works on any",
)
def cam(op: Emitter, da: Value) -> Value:
    """sum_k W_ck A_k, signed. Zhou et al. 2016, eq. 2.

    On a head that averages the plane and then weighs the channels, W_ck is the gradient's sum S(g_k).
    The class map of a convolution that ends in ReLU is taken before the ReLU.
    """
    return op.ReduceSum(da, PLANE, keepdims=0)
