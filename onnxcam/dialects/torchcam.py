"""torch-cam 0.5.0 (frgfm, PyPI ``torchcam``).

What its call returns is ``cam``: scaled to [0,1] with 1e-8 at the layer's size. (A NaN counts as 0 there.)
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from onnx_ir import Value

from onnxcam.dialects.dialect import Dialect
from onnxcam.emit import Emitter
from onnxcam.methods import METHODS, Method, method
from onnxcam.methods.algebra import PLANE, summed
from onnxcam.methods.perturbation import (
    IS_STEPS,
    masked,
    noisy,
    noisy_gradients,
    over_noise,
    over_steps,
    powers,
    scored,
)
from onnxcam.methods.scaling import Size, resized, scaled
from onnxcam.targets import less_mean

if TYPE_CHECKING:
    from onnxcam.probe import Probe

SHARED = ("gradcam", "layercam", "cam")
"""What it computes as the papers say."""

OWN: dict[str, Method] = {name: METHODS[name] for name in SHARED}

_SAMPLES = 4
_DEVIATION = 0.3
"""Of the noise in SmoothGradCAMpp, in units of the model's input."""


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


@method("smoothgradcam++", cost=f"{_SAMPLES} and {_SAMPLES} backward", gives="map", into=OWN)
def smooth_gradcam_plus_plus(op: Emitter, a: Value, probe: "Probe") -> Value:
    """ReLU(sum_k S(alpha relu(g'_k)) A'_k), alpha = D2 / (2 D2 + S(A D3) + 1e-8), Dp the mean of g^p.

    The mean is over 4 pictures with noise of deviation 0.3. By mistake g' is not their mean but the gradient
    of the last of them, A' its activation, and A D3 is summed as a product; the A in it is the picture's own.
    """
    g = noisy_gradients(op, probe, _SAMPLES, _DEVIATION)
    _, d2, d3 = (op.ReduceMean(power, [0], keepdims=0) for power in powers(op, g))
    last = op.constant(np.array(_SAMPLES - 1))
    denominator = op.Add(op.Mul(d2, 2.0), op.ReduceSum(op.Mul(a, d3), PLANE, keepdims=1))
    alpha = op.Div(d2, op.Add(denominator, 1e-8))
    w = op.ReduceSum(op.Mul(alpha, op.Relu(op.Gather(g, last, axis=0))), PLANE, keepdims=0)
    seen = noisy(op, probe, _DEVIATION)(last).activation()
    return summed(op, w, op.Unsqueeze(seen, [1]))


@method("scorecam", cost="C", into=OWN)
def scorecam(op: Emitter, probe: "Probe") -> Value:
    """ReLU(sum_k w_k A_k), w = softmax over k of y(X o up(s(A_k))): s, with 1e-8, before the resizing."""
    return scored(op, probe, _mask(op, probe), lambda mask: probe.on(masked(op, probe, mask)).y())


@method("sscam", cost=METHODS["sscam"].cost, into=OWN)
def sscam(op: Emitter, probe: "Probe") -> Value:
    """ReLU(sum_k w_k A_k), w = softmax over k of mean_i y(X o (up(s(A_k)) + noise_i)): s before the resizing.

    There each channel and picture has noise of its own; here all have the same.
    """
    return scored(op, probe, _mask(op, probe), over_noise(op, probe))


@method("iscam", cost=f"{IS_STEPS} C", into=OWN)
def iscam(op: Emitter, probe: "Probe") -> Value:
    """ReLU(sum_k w_k A_k), w = softmax over k of mean_i y(c_i X o up(s(A_k))), c_i = sum of j/10 for j <= i.

    The paper's sum is over j < i; i is from 1 to 10.
    """
    steps = np.arange(1, IS_STEPS + 1).cumsum() / IS_STEPS
    return scored(op, probe, _mask(op, probe), over_steps(op, probe, steps))


@method("finercam", cost="1 backward", target="rivals", into=OWN)
def finercam(op: Emitter, da: Value) -> Value:
    """ReLU(sum_k <g_k> A_k), g of the score less 0.6 times the mean of its three nearest."""
    return op.ReduceMean(da, PLANE, keepdims=0)


@method(
    "legrad",
    cost="1 backward, and the head for each layer",
    gives="map",
    rectified=False,
    unsigned=True,
    requires="attention",
    instead="gradcam, which needs none",
    into=OWN,
)
def legrad(op: Emitter, probe: "Probe") -> Value:
    """Mean over layers, heads and queries of relu(dy_l/dS_l), y_l the head on the mean of its tokens."""

    def of(da: Value) -> list[Value]:
        tokens = op.ReduceMean(op.Relu(da), [2, 3], keepdims=0)  # [N,k,T]
        return [op.Squeeze(probe.grid.planes(op, op.Unsqueeze(tokens, [3])), [2])]

    maps = [run.per_sum_at([weights], of)[0] for weights, run in probe.early_exits()]
    return maps[0] if len(maps) == 1 else op.Mean(*maps)


def less_some(op: Emitter, scores: Value, index: Value, rivals: Value) -> Value:
    """The score less 0.6 times the mean of the rivals' y."""
    return less_mean(op, scores, index, rivals, 0.6)


def _mask(op: Emitter, probe: "Probe") -> Callable[[Value], Value]:
    return lambda channel: resized(op, scaled(op, channel, 1e-8), probe.size())


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
    contrast=less_some,
    contrasted=("finercam", "gradcam", "gradcam++", "layercam"),
)
