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
from onnxcam.methods.algebra import (
    PLANE,
    first_component,
    first_kernel_component,
    largest,
    summed,
    total,
    widened,
)
from onnxcam.methods.perturbation import masked, scored
from onnxcam.methods.scaling import Size, resized, scaled
from onnxcam.targets import one_hot

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

    def mask(channel: Value) -> Value:
        return scaled(op, resized(op, channel, probe.size(), centres="align_corners"), 1e-8)

    return scored(op, probe, mask, lambda mask: probe.on(masked(op, probe, mask)).y())


@method("finercam", cost="1 backward", target="rivals", into=OWN)
def finercam(op: Emitter, da: Value) -> Value:
    """ReLU(sum_k <g_k> A_k), g of sum_j p_j (y - y_j) / (sum_j p_j + 1e-9), see `weighed_rivals`."""
    return op.ReduceMean(da, PLANE, keepdims=0)


def weighed_rivals(op: Emitter, scores: Value, index: Value, rivals: Value) -> Value:
    """sum_j p_j (y - y_j) / (sum_j p_j + 1e-9) over the rivals j, p the softmax, which is differentiated too.

    With q_j = p_j / (sum p + 1e-9) and s the sum, its gradient is sum q at the class, q_j (y - y_j - s - 1)
    at a rival, and -p s 1e-9 / (sum p + 1e-9) everywhere.
    """
    y = widened(op, scores)
    p = op.Softmax(y, axis=1)

    def at(values: Value, places: Value) -> Value:
        return op.Reshape(op.GatherElements(values, op.Reshape(places, [0, -1]), axis=1), op.Shape(places))

    chance = at(p, rivals)  # [N,K,R]
    away = op.Sub(op.Unsqueeze(at(y, index), [2]), at(y, rivals))
    total = op.Add(op.ReduceSum(chance, [2], keepdims=1), 1e-9)
    q = op.Div(chance, total)
    s = op.ReduceSum(op.Mul(q, away), [2], keepdims=1)
    own = op.Mul(one_hot(op, index, y), op.ReduceSum(q, [2], keepdims=1))
    others = op.Mul(one_hot(op, rivals, y), op.Unsqueeze(op.Mul(q, op.Sub(op.Sub(away, s), 1.0)), [3]))
    everywhere = op.Mul(op.Unsqueeze(p, [1]), op.Mul(op.Div(s, total), -1e-9))
    found = op.Add(op.Add(own, op.ReduceSum(others, [2], keepdims=0)), everywhere)
    return op.CastLike(found, scores)


@method("kpcacam", cost="none", gives="map", into=OWN)
def kpcacam(op: Emitter, a: Value) -> Value:
    """ReLU of A's first kernel principal component as in the paper."""
    return first_kernel_component(op, a)


@method(
    "guidedbackprop",
    cost="1 backward",
    gives="terms",
    over_channels=largest,
    rectified=False,
    unsigned=True,
    at_picture=True,
    rules="guided relu",
    into=OWN,
)
def guidedbackprop(op: Emitter, da: Value) -> Value:
    """max_c |g_c|, where only what is positive passes back through a ReLU, but all through a ReLU6.

    What its GuidedBackpropReLUModel returns, for one picture as [h,w,c], is g itself: the attributions.
    """
    return da


@method(
    "fullgrad",
    cost="1 backward",
    gives="map",
    rectified=False,
    unsigned=True,
    at_picture=True,
    requires="biases",
    instead="inputxgradient, its first term",
    into=OWN,
)
def fullgrad(op: Emitter, probe: "Probe") -> Value:
    """sum_c s(|x_c g_c|) + sum of s(|b_c dy/db_c|) over biases of convolutions and batch normalisations.

    s scales each channel by its own minimum and maximum, with 1e-7, and resizes it to the picture. Biases of
    other layers are left out. A convolution with a bias and a batch normalisation after it may be one
    convolution in the file, with one bias.
    """
    found = [
        (value, bias, grid)
        for value, bias, grid in probe.biases()
        if grid is not None and value.producer().op_type in ("Conv", "BatchNormalization")  # type: ignore[union-attr]
    ]

    def of(dx: Value, *dbs: Value) -> list[Value]:
        full = each_scaled(probe.layout.planes(op, op.Mul(dx, op.Unsqueeze(probe.picture, [1]))))
        for db, (_, bias, grid) in zip(dbs, found, strict=True):
            full = op.Add(full, resized(op, each_scaled(grid.planes(op, op.Mul(db, bias))), probe.size()))
        return [full]

    def each_scaled(terms: Value) -> Value:
        return total(op, scaled(op, op.Abs(terms), 1e-7, PLANE))

    return probe.per_sum_at([probe.picture, *(value for value, _, _ in found)], of)[0]


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
    contrast=weighed_rivals,
    contrasted=(
        "finercam",
        "gradcam",
        "gradcam++",
        "xgradcam",
        "hirescam",
        "elementwise",
        "layercam",
        "eigengradcam",
    ),
)
"""Augmentation, its ``aug_smooth``, averages heat maps; the class is that of the picture as it is."""
