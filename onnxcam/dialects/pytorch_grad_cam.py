"""pytorch-grad-cam 1.5.7 (jacobgil, PyPI ``grad-cam``).

Every map ends in a ReLU. What its call returns is the heat map: scaled to [0,1] with 1e-7 at the layer's
size, resized as OpenCV does (linear), of several layers the mean, and scaled once more.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from onnx_ir import Value

from onnxcam.dialects.dialect import Dialect
from onnxcam.emit import Emitter
from onnxcam.methods import METHODS, Method, method
from onnxcam.methods.activation import fem as share_beyond
from onnxcam.methods.algebra import PLANE, Size, first_component, resized, scaled, summed

if TYPE_CHECKING:
    from onnxcam.probe import Probe

SHARED = ("gradcam", "hirescam", "elementwise", "layercam", "shapleycam")
"""What it computes as the papers say."""

OWN: dict[str, Method] = {name: METHODS[name] for name in SHARED}

_BATCH = 32
"""Channels that AblationCAM leaves out in one run of the model."""


@method("gradcam++", cost="1 backward", into=OWN)
def gradcam_plus_plus(op: Emitter, a: Value, da: Value) -> Value:
    """ReLU(sum_k S(alpha relu(g_k)) A_k), alpha = g^2 / (2 g^2 + S(A) g^3 + 1e-6), 0 where g is 0.

    The 1e-6 is a large part of g^2 where gradients are small.
    """
    square = op.Mul(da, da)
    total = op.ReduceSum(a, PLANE, keepdims=1)
    denominator = op.Add(op.Add(op.Mul(square, 2.0), op.Mul(total, op.Mul(square, da))), 1e-6)
    alpha = op.Where(op.Equal(da, 0.0), 0.0, op.Div(square, denominator))
    return op.ReduceSum(op.Mul(op.Relu(da), alpha), PLANE, keepdims=0)


@method("xgradcam", cost="1 backward", into=OWN)
def xgradcam(op: Emitter, a: Value, da: Value) -> Value:
    """ReLU(sum_k S(g_k A_k / (S(A_k) + 1e-7)) A_k)."""
    total = op.Add(op.ReduceSum(a, PLANE, keepdims=1), 1e-7)
    return op.ReduceSum(op.Div(op.Mul(da, a), total), PLANE, keepdims=0)


def centred_component(op: Emitter, x: Value) -> Value:
    """Project onto the first principal direction of the channels, after taking each channel's mean from it.

    The library keeps whatever sign its SVD gives; here the extreme of larger magnitude is positive, as in its
    own SegEigenCAM.
    """
    return first_component(op, op.Sub(x, op.ReduceMean(x, PLANE, keepdims=1)))


@method("eigencam", cost="none", gives="map", into=OWN)
def eigencam(op: Emitter, a: Value) -> Value:
    """ReLU of A, centred, on its first principal direction; the sign is fixed, see `centred_component`."""
    return centred_component(op, a)


@method("eigengradcam", cost="1 backward", gives="map", into=OWN)
def eigengradcam(op: Emitter, a: Value, da: Value) -> Value:
    """ReLU of g A, centred, on its first principal direction; the sign is fixed, see `centred_component`."""
    return centred_component(op, op.Mul(da, a))


@method("fem", cost="none", gives="map", into=OWN)
def fem(op: Emitter, a: Value) -> Value:
    """ReLU(sum_k share_k A_k) as in the paper; eigen smoothing, which is ignored there, is refused."""
    return summed(op, share_beyond(op, a), a)


@method("ablationcam", cost="C times the layers after A", into=OWN)
def ablationcam(op: Emitter, probe: "Probe") -> Value:
    """ReLU(sum_k (y - y_k) / y A_k), y_k with channel k at 0 only where the least of A is exactly 0.

    Elsewhere channel k becomes min A - 1e7 (1 + k mod 32): the library lowers the minimum that it reads next
    with each channel of a batch of 32. On tokens it is an error there without a layer of its own.
    """
    a, y = probe.activation(), probe.y()
    least = op.ReduceMin(a, [1, 2, 3], keepdims=1)
    channels = op.Range(np.int64(0), op.Squeeze(op.Shape(a, start=1, end=2), [0]), np.int64(1))

    def without(k: Value) -> Value:
        others = op.Unsqueeze(op.Not(op.Equal(channels, k)), [0, 2, 3])
        depth = op.Mul(op.CastLike(op.Add(op.Mod(k, np.int64(_BATCH)), 1), a), 1e7)
        instead = op.Where(op.Equal(least, 0.0), 0.0, op.Sub(least, depth))
        return probe.with_activation(op.Where(others, a, instead)).y()

    scores = op.Transpose(probe.each(channels, without), perm=[1, 2, 0])  # [N,K,C]
    y = op.Unsqueeze(y, [2])
    return op.Div(op.Sub(y, scores), y)


@method("scorecam", cost="C", into=OWN)
def scorecam(op: Emitter, probe: "Probe") -> Value:
    """ReLU(sum_k w_k A_k), w = softmax over k of y(X o s(up(A_k))): up with aligned corners, s with 1e-8."""
    channels = op.Transpose(probe.activation(), perm=[1, 0, 2, 3])

    def masked(channel: Value) -> Value:
        full = resized(op, op.Unsqueeze(channel, [1]), probe.size(), centres="align_corners")
        return probe.on(op.Mul(probe.picture, probe.over_picture(scaled(op, full, 1e-8)))).y()

    scores = op.Transpose(probe.each(channels, masked), perm=[1, 2, 0])  # [N,K,C]
    return op.Softmax(scores, axis=2)


def heatmap(op: Emitter, cam: Value, size: Size, _signed: bool = False) -> Value:
    """Scale, resize, scale: minus the minimum, over what is then the maximum plus 1e-7."""
    return scaled(op, resized(op, scaled(op, cam, 1e-7), size), 1e-7)


def fuse(op: Emitter, maps: Sequence[Value], size: Size, fusion: str, _method: Method) -> Value:
    """The mean of the maps, each scaled and resized; or, as its RefineCAM, the product of the heat maps."""
    if fusion == "mean":
        return op.Mean(*(resized(op, scaled(op, cam, 1e-7), size) for cam in maps))
    product = heatmap(op, maps[0], size)
    for cam in maps[1:]:
        product = op.Mul(product, heatmap(op, cam, size))
    return product


PYTORCH_GRAD_CAM = Dialect(
    "pytorch-grad-cam",
    OWN,
    heatmap,
    fusions=("mean", "product"),
    fuse=fuse,
    fuses_at_picture=True,
    evidence=("counterfactual",),
    smoothings=("augmentation", "eigen"),
    projection=centred_component,
    averages_heatmaps=True,
)
"""Augmentation, its ``aug_smooth``, averages heat maps; the class is that of the picture as it is."""
