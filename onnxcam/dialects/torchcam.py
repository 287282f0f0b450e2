"""torch-cam 0.5.0 (frgfm, PyPI ``torchcam``).

What its call returns is ``cam``: scaled to [0,1] with 1e-8 at the layer's size. (A NaN counts as 0 there.)
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from onnx_ir import Value

from onnxcam.dialects.dialect import Dialect
from onnxcam.emit import Emitter
from onnxcam.methods import METHODS, Method, method
from onnxcam.methods.algebra import PLANE, Size, resized, scaled

if TYPE_CHECKING:
    from onnxcam.probe import Probe

SHARED = ("gradcam", "layercam", "cam")
"""What it computes as the papers say."""

OWN: dict[str, Method] = {name: METHODS[name] for name in SHARED}


@method("gradcam++", cost="1 backward", into=OWN)
def gradcam_plus_plus(op: Emitter, da: Value) -> Value:
    """ReLU(sum_k S(relu(g_k)^3) A_k): by mistake alpha is g^2, the quotient goes to a copy of it."""
    positive = op.Relu(da)
    return op.ReduceSum(op.Mul(positive, op.Mul(positive, positive)), PLANE, keepdims=0)


@method("xgradcam", cost="1 backward", into=OWN)
def xgradcam(op: Emitter, a: Value, da: Value) -> Value:
    """ReLU(sum_k S(g_k A_k) / (S(A_k) + 1e-8) A_k)."""
    total = op.Add(op.ReduceSum(a, PLANE, keepdims=0), 1e-8)
    return op.Div(op.ReduceSum(op.Mul(da, a), PLANE, keepdims=0), total)


@method("scorecam", cost="C", into=OWN)
def scorecam(op: Emitter, probe: "Probe") -> Value:
    """ReLU(sum_k w_k A_k), w = softmax over k of y(X o up(s(A_k))): s, with 1e-8, before the resizing."""
    channels = op.Transpose(probe.activation(), perm=[1, 0, 2, 3])

    def masked(channel: Value) -> Value:
        mask = resized(op, scaled(op, op.Unsqueeze(channel, [1]), 1e-8), probe.size())
        return probe.on(op.Mul(probe.picture, probe.over_picture(mask))).y()

    scores = op.Transpose(probe.each(channels, masked), perm=[1, 2, 0])  # [N,K,C]
    return op.Softmax(scores, axis=2)


def normalised(op: Emitter, cam: Value) -> Value:
    """Minus the minimum, over what is then the maximum plus 1e-8."""
    return scaled(op, cam, 1e-8)


def heatmap(op: Emitter, cam: Value, size: Size, _signed: bool = False) -> Value:
    """What ``overlay_mask`` colours: resized by Pillow's bicubic, squared, at most 1."""
    full = resized(op, cam, size, "cubic", cubic_coeff_a=-0.5, exclude_outside=1)
    return op.Min(op.Mul(full, full), 1.0)


def fuse(op: Emitter, maps: Sequence[Value], size: Size, fusion: str, method: Method) -> Value:
    """The maximum, in LayerCAM of tanh(2 cam); or, as its RefineCAM, the product, scaled again."""
    if fusion == "max":
        if method.name == "layercam":
            maps = [op.Tanh(op.Mul(cam, 2.0)) for cam in maps]
        return op.Max(*(resized(op, cam, size) for cam in maps))
    product = resized(op, maps[0], size)
    for cam in maps[1:]:
        product = op.Mul(product, resized(op, cam, size))
    return normalised(op, product)


TORCHCAM = Dialect(
    "torchcam",
    OWN,
    heatmap,
    cam=normalised,
    fusions=("max", "product"),
    fuse=fuse,
    evidence=("counterfactual",),
)
