"""Maps of what happens to the score, or its gradient, when an activation or the picture is changed."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
from onnx_ir import Value

from onnxcam.emit import Emitter
from onnxcam.methods.algebra import PLANE, resized, unit
from onnxcam.methods.noise import normal_noise
from onnxcam.methods.registry import method

if TYPE_CHECKING:
    from onnxcam.probe import Probe

SAMPLES = 25
"""How many noisy pictures SmoothGrad and Smooth Grad-CAM++ average over."""

_SS_SAMPLES = 35
_IS_STEPS = 10


@method("ablationcam", cost="C times the layers after A")
def ablationcam(op: Emitter, probe: "Probe") -> Value:
    """ReLU(sum_k (y - y_k) / y A_k), y_k the score without channel k. Desai and Ramaswamy 2020."""
    a, y = probe.activation(), probe.y()
    channels = _numbers(op, a, 1, 2)

    def without(k: Value) -> Value:
        others = op.Unsqueeze(op.Not(op.Equal(channels, k)), [0, 2, 3])
        return probe.with_activation(op.Where(others, a, 0.0)).y()

    scores = op.Transpose(probe.each(channels, without), perm=[1, 2, 0])  # [N,K,C]
    y = op.Unsqueeze(y, [2])
    return op.Div(op.Sub(y, scores), y)


@method("reciprocam", cost="P times the layers after A", gives="map", rectified=False)
def reciprocam(op: Emitter, probe: "Probe") -> Value:
    """L_ij = y(A o M_ij), M_ij zero everywhere but at position ij. Byun and Lee 2022, arXiv:2209.14074.

    The masks keep a single position, without the Gaussian around it that the authors' code offers. Tokens
    beside the plane stay as they are.
    """
    a = probe.activation()
    plane = op.Shape(a, start=2)
    positions = _numbers(op, a, 2, 4)
    places = op.Reshape(positions, plane)

    def alone(position: Value) -> Value:
        return probe.with_activation(op.Where(op.Equal(places, position), a, 0.0)).y()

    scores = probe.each(positions, alone)  # [P,N,K]
    shape = op.Concat(op.Shape(scores, start=1), plane, axis=0)
    return op.Reshape(op.Transpose(scores, perm=[1, 2, 0]), shape)


@method("scorecam", cost="C")
def scorecam(op: Emitter, probe: "Probe") -> Value:
    """ReLU(sum_k w_k A_k), w = softmax over k of y(X o s(up(A_k))) - y(0). Wang et al. 2020.

    s scales each channel, brought to the size of the picture X, to [0,1] by its own minimum and maximum.
    y(0), the score of the empty picture, is the same for all channels and leaves the softmax as it is.
    """
    return _scored(op, probe, lambda mask: probe.on(_masked(op, probe, mask)).y())


@method("sscam", cost=f"{_SS_SAMPLES} C")
def sscam(op: Emitter, probe: "Probe") -> Value:
    """ReLU(sum_k w_k A_k), w = softmax over k of mean_i y(X o (s(up(A_k)) + noise_i)). Wang et al. 2020.

    SS-CAM(1), arXiv:2006.14255: as scorecam, the mask made noisy 35 times with deviation 2. Every channel is
    tried with the same 35 noises.
    """
    noise = normal_noise(op, probe.size(), _dtype(probe))
    numbers = op.constant(np.arange(_SS_SAMPLES))

    def mean(mask: Value) -> Value:
        def noisy(number: Value) -> Value:
            return probe.on(
                _masked(op, probe, op.Add(mask, op.Mul(op.Unsqueeze(noise(number), [1]), 2.0)))
            ).y()

        return op.ReduceMean(probe.each(numbers, noisy), [0], keepdims=0)

    return _scored(op, probe, mean)


@method("iscam", cost=f"{_IS_STEPS} C")
def iscam(op: Emitter, probe: "Probe") -> Value:
    """ReLU(sum_k w_k A_k), w = softmax over k of mean_i y(i/n X o s(up(A_k))), i = 1..n. Naidu et al. 2020.

    arXiv:2010.03023: as scorecam, the masked picture growing from nothing to itself in n = 10 steps.
    """
    steps = op.constant(((np.arange(_IS_STEPS) + 1) / _IS_STEPS).astype(_dtype(probe).numpy()))

    def mean(mask: Value) -> Value:
        masked = _masked(op, probe, mask)
        scores = probe.each(steps, lambda step: probe.on(op.Mul(masked, step)).y())
        return op.ReduceMean(scores, [0], keepdims=0)

    return _scored(op, probe, mean)


@method("smoothgradcam++", cost=f"{SAMPLES} and {SAMPLES} backward")
def smooth_gradcam_plus_plus(op: Emitter, a: Value, probe: "Probe") -> Value:
    """ReLU(sum_k S(alpha relu(D1)) A_k), alpha = D2 / (2 D2 + S(A) D3). Omeiza et al. 2019, eq. 6-8.

    Dp is the mean of g^p over 25 noisy pictures, the noise as smoothgrad's; A is that of the picture itself.
    The numerator, D1 in print, is D2 as in Grad-CAM++. Where D2 is 0 there is no weight.
    """
    g = noisy_gradients(op, probe)
    squared = op.Mul(g, g)
    d1, d2, d3 = (op.ReduceMean(power, [0], keepdims=0) for power in (g, squared, op.Mul(squared, g)))
    denominator = op.Add(op.Mul(d2, 2.0), op.Mul(op.ReduceSum(a, PLANE, keepdims=1), d3))
    share = op.Div(op.Mul(d2, op.Relu(d1)), op.Where(op.Equal(d2, 0.0), 1.0, denominator))
    return op.ReduceSum(share, PLANE, keepdims=0)


def noisy_gradients(op: Emitter, probe: "Probe") -> Value:
    """Return the gradients [n,N,K,C,h,w] for n = 25 noisy pictures.

    The noise has 0.15 of the span of each picture as its deviation and is the same for every picture.
    """
    picture = probe.picture
    span = op.Sub(*(reduce(picture, [1, 2, 3], keepdims=1) for reduce in (op.ReduceMax, op.ReduceMin)))
    sigma = op.Mul(span, 0.15)
    noise = normal_noise(op, probe.sizes(), _dtype(probe))

    def one(number: Value) -> Value:
        noisy = op.Add(picture, op.Mul(probe.over_picture(noise(number)), sigma))
        (da,) = probe.on(noisy).per_sum(lambda da: [da])
        return da

    return probe.each(op.constant(np.arange(SAMPLES)), one)


def _numbers(op: Emitter, a: Value, start: int, end: int) -> Value:
    """Return 0, 1, 2, ... up to the product of the sizes of `a` along the axes from `start` to `end`."""
    sizes = [] if a.shape is None else [size for size in list(a.shape)[start:end] if isinstance(size, int)]
    if len(sizes) == end - start:
        return op.constant(np.arange(math.prod(sizes)))
    count = op.ReduceProd(op.Shape(a, start=start, end=end), keepdims=0)
    return op.Range(np.int64(0), count, np.int64(1))


def _scored(op: Emitter, probe: "Probe", score: Callable[[Value], Value]) -> Value:
    """Return the softmax over channels [N,K,C] of ``score(mask)`` [N,K], each channel a mask [N,1,H,W]."""
    channels = op.Transpose(probe.activation(), perm=[1, 0, 2, 3])

    def of(channel: Value) -> Value:
        return score(unit(op, resized(op, op.Unsqueeze(channel, [1]), probe.size())))

    return op.Softmax(op.Transpose(probe.each(channels, of), perm=[1, 2, 0]), axis=2)


def _masked(op: Emitter, probe: "Probe", mask: Value) -> Value:
    return op.Mul(probe.picture, probe.over_picture(mask))


def _dtype(probe: "Probe") -> ir.DataType:
    assert probe.picture.dtype is not None
    return probe.picture.dtype
