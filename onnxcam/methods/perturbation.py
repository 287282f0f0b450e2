"""Maps of what happens to the score, or its gradient, when an activation or the picture is changed."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
from onnx_ir import Value

from onnxcam.emit import Emitter
from onnxcam.methods.algebra import PLANE, known_sizes
from onnxcam.methods.noise import normal_noise
from onnxcam.methods.registry import method
from onnxcam.methods.scaling import resized, unit

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from onnxcam.probe import Probe

SAMPLES = 25
"""How many noisy pictures SmoothGrad and Smooth Grad-CAM++ average over."""

_SS_SAMPLES = 35
IS_STEPS = 10


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
    return scored(op, probe, _mask(op, probe), lambda mask: probe.on(masked(op, probe, mask)).y())


@method("sscam", cost=f"{_SS_SAMPLES} C")
def sscam(op: Emitter, probe: "Probe") -> Value:
    """ReLU(sum_k w_k A_k), w = softmax over k of mean_i y(X o (s(up(A_k)) + noise_i)). Wang et al. 2020.

    SS-CAM(1), arXiv:2006.14255: as scorecam, the mask made noisy 35 times with deviation 2. Every channel is
    tried with the same 35 noises.
    """
    return scored(op, probe, _mask(op, probe), over_noise(op, probe))


@method("iscam", cost=f"{IS_STEPS - 1} C")
def iscam(op: Emitter, probe: "Probe") -> Value:
    """ReLU(sum_k w_k A_k), w = softmax over k of mean_i y(c_i X o s(up(A_k))), i = 1..10. Naidu et al. 2020.

    arXiv:2010.03023: as scorecam, c_i = sum of j/10 for j < i, so that the masked picture grows by larger and
    larger steps, to 4.5 times itself. The first of them, where it is empty, is the same for all channels and
    left out.
    """
    return scored(
        op, probe, _mask(op, probe), over_steps(op, probe, np.arange(1, IS_STEPS).cumsum() / IS_STEPS)
    )


@method("smoothgradcam++", cost=f"{SAMPLES} and {SAMPLES} backward")
def smooth_gradcam_plus_plus(op: Emitter, a: Value, probe: "Probe") -> Value:
    """ReLU(sum_k S(alpha relu(D1)) A_k), alpha = D2 / (2 D2 + S(A) D3). Omeiza et al. 2019, eq. 6-8.

    Dp is the mean of g^p over 25 noisy pictures, the noise as smoothgrad's; A is that of the picture itself.
    The numerator, D1 in print, is D2 as in Grad-CAM++. Where D2 is 0 there is no weight.
    """
    g = noisy_gradients(op, probe, SAMPLES, deviation(op, probe))
    d1, d2, d3 = (op.ReduceMean(power, [0], keepdims=0) for power in powers(op, g))
    denominator = op.Add(op.Mul(d2, 2.0), op.Mul(op.ReduceSum(a, PLANE, keepdims=1), d3))
    share = op.Div(op.Mul(d2, op.Relu(d1)), op.Where(op.Equal(d2, 0.0), 1.0, denominator))
    return op.ReduceSum(share, PLANE, keepdims=0)


def powers(op: Emitter, g: Value) -> tuple[Value, Value, Value]:
    """Return g, its square and its cube."""
    squared = op.Mul(g, g)
    return g, squared, op.Mul(squared, g)


def deviation(op: Emitter, probe: "Probe") -> Value:
    """The noise of SmoothGrad: 0.15 of the span of each picture [N,1,1,1]."""
    picture = probe.picture
    span = op.Sub(*(reduce(picture, [1, 2, 3], keepdims=1) for reduce in (op.ReduceMax, op.ReduceMin)))
    return op.Mul(span, 0.15)


def noisy(op: Emitter, probe: "Probe", sigma: Value | float) -> Callable[[Value], "Probe"]:
    """``noisy(number)`` is the run with noise of deviation `sigma`, the same for every picture."""
    noise = normal_noise(op, probe.sizes(), _dtype(probe))
    return lambda number: probe.on(op.Add(probe.picture, op.Mul(probe.over_picture(noise(number)), sigma)))


def noisy_gradients(op: Emitter, probe: "Probe", samples: int, sigma: Value | float) -> Value:
    """Return the gradients [n,N,K,C,h,w] for n = `samples` pictures with noise of deviation `sigma`."""
    run = noisy(op, probe, sigma)

    def one(number: Value) -> Value:
        (da,) = run(number).per_sum(lambda da: [da])
        return da

    return probe.each(op.constant(np.arange(samples)), one)


def _numbers(op: Emitter, a: Value, start: int, end: int) -> Value:
    """Return 0, 1, 2, ... up to the product of the sizes of `a` along the axes from `start` to `end`."""
    sizes = known_sizes(a, start, end)
    if sizes:
        return op.constant(np.arange(math.prod(sizes)))
    count = op.ReduceProd(op.Shape(a, start=start, end=end), keepdims=0)
    return op.Range(np.int64(0), count, np.int64(1))


def scored(
    op: Emitter, probe: "Probe", mask: Callable[[Value], Value], score: Callable[[Value], Value]
) -> Value:
    """Return the softmax [N,K,C] over the channels of what a mask that is made of each brings.

    Args:
        op: where the nodes go.
        probe: the run.
        mask: makes a mask [N,1,H,W] of a channel [N,1,h,w].
        score: makes [N,K] of a mask.
    """
    channels = op.Transpose(probe.activation(), perm=[1, 0, 2, 3])

    def of(channel: Value) -> Value:
        return score(mask(op.Unsqueeze(channel, [1])))

    return op.Softmax(op.Transpose(probe.each(channels, of), perm=[1, 2, 0]), axis=2)


def _mask(op: Emitter, probe: "Probe") -> Callable[[Value], Value]:
    return lambda channel: unit(op, resized(op, channel, probe.size()))


def over_noise(op: Emitter, probe: "Probe") -> Callable[[Value], Value]:
    """The mean score over 35 times noise of deviation 2 on the mask."""
    noise = normal_noise(op, probe.size(), _dtype(probe))
    numbers = op.constant(np.arange(_SS_SAMPLES))

    def mean(mask: Value) -> Value:
        def one(number: Value) -> Value:
            louder = op.Mul(op.Unsqueeze(noise(number), [1]), 2.0)
            return probe.on(masked(op, probe, op.Add(mask, louder))).y()

        return op.ReduceMean(probe.each(numbers, one), [0], keepdims=0)

    return mean


def over_steps(op: Emitter, probe: "Probe", steps: "NDArray[np.floating]") -> Callable[[Value], Value]:
    """A tenth of the sum of the scores with the masked picture times each of `steps`."""
    factors = op.constant(steps.astype(_dtype(probe).numpy()))

    def mean(mask: Value) -> Value:
        seen = masked(op, probe, mask)
        scores = probe.each(factors, lambda factor: probe.on(op.Mul(seen, factor)).y())
        return op.Div(op.ReduceSum(scores, [0], keepdims=0), float(IS_STEPS))

    return mean


def masked(op: Emitter, probe: "Probe", mask: Value) -> Value:
    """The picture times a mask [N,1,H,W]."""
    return op.Mul(probe.picture, probe.over_picture(mask))


def _dtype(probe: "Probe") -> ir.DataType:
    assert probe.picture.dtype is not None
    return probe.picture.dtype
