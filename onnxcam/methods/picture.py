"""Maps at the picture itself: its gradient, as it is, averaged or by other rules.

In the equations x is the picture and g = dy/dx.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from onnx_ir import Value

from onnxcam.emit import Emitter
from onnxcam.methods.algebra import largest, summed
from onnxcam.methods.cam import gradcam
from onnxcam.methods.perturbation import SAMPLES, deviation, noisy_gradients
from onnxcam.methods.registry import method
from onnxcam.methods.scaling import Size, resized, unit

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from onnxcam.probe import Probe

_STEPS = 50


@method(
    "saliency",
    cost="1 backward",
    gives="terms",
    over_channels=largest,
    rectified=False,
    unsigned=True,
    at_picture=True,
)
def saliency(op: Emitter, da: Value) -> Value:
    """max_c |g_c| over the colour channels. Simonyan et al. 2013, section 3.1."""
    return da


@method("inputxgradient", cost="1 backward", gives="terms", rectified=False, signed=True, at_picture=True)
def inputxgradient(op: Emitter, a: Value, da: Value) -> Value:
    """sum_c x_c g_c, signed. Shrikumar et al. 2016, arXiv:1605.01713."""
    return op.Mul(a, da)


@method(
    "integratedgradients",
    cost=f"{_STEPS} and {_STEPS} backward",
    gives="terms",
    rectified=False,
    signed=True,
    at_picture=True,
)
def integratedgradients(op: Emitter, probe: "Probe") -> Value:
    """sum_c x_c int_0^1 dy(t x)/dx_c dt, signed. Sundararajan et al. 2017, eq. 1 and 3.

    The baseline is zeros in the model's input, the integral a midpoint rule of 50 steps. The terms add up to
    y(x) - y(0), as far as that rule is exact.
    """
    return integrated(op, probe, (np.arange(_STEPS) + 0.5) / _STEPS, np.full(_STEPS, 1 / _STEPS))


def integrated(
    op: Emitter, probe: "Probe", points: "NDArray[np.floating]", weights: "NDArray[np.floating]"
) -> Value:
    """Return x times the integral over t of g(t x), by a rule of `points` from 0 to 1 and their `weights`."""
    dtype = probe.picture.dtype
    assert dtype is not None

    def at(t: Value) -> Value:
        (da,) = probe.on(op.Mul(probe.picture, t)).per_sum(lambda da: [da])
        return da

    found = probe.each(op.constant(points.astype(dtype.numpy())), at)
    weighed = op.Mul(found, weights.astype(dtype.numpy()).reshape(-1, 1, 1, 1, 1, 1))
    return op.Mul(op.Unsqueeze(probe.activation(), [1]), op.ReduceSum(weighed, [0], keepdims=0))


@method(
    "smoothgrad",
    cost=f"{SAMPLES} and {SAMPLES} backward",
    gives="terms",
    over_channels=largest,
    rectified=False,
    unsigned=True,
    at_picture=True,
)
def smoothgrad(op: Emitter, probe: "Probe") -> Value:
    """max_c |mean_i g_c(x + noise_i)|, the noise normal. Smilkov et al. 2017, arXiv:1706.03825.

    25 samples; the deviation is 0.15 of the picture's span from minimum to maximum, as in the authors' code.
    """
    g = noisy_gradients(op, probe, SAMPLES, deviation(op, probe))
    return op.ReduceMean(g, [0], keepdims=0)


@method(
    "guidedbackprop",
    cost="1 backward",
    gives="terms",
    over_channels=largest,
    rectified=False,
    unsigned=True,
    at_picture=True,
    rules="guided",
    requires="rectifier",
    instead="smoothgrad, which needs none",
)
def guidedbackprop(op: Emitter, da: Value) -> Value:
    """max_c |g_c|, where only what is positive passes back through a rectifier. Springenberg et al. 2014.

    At a rectifier of input z the gradient passes where it is positive itself and z > 0.
    """
    return da


@method(
    "deconvnet",
    cost="1 backward",
    gives="terms",
    over_channels=largest,
    rectified=False,
    unsigned=True,
    at_picture=True,
    rules="deconvnet",
    requires="rectifier",
    instead="smoothgrad, which needs none",
)
def deconvnet(op: Emitter, da: Value) -> Value:
    """max_c |g_c|, where what passes back through a rectifier is rectified itself. Zeiler and Fergus 2013.

    At a rectifier it passes where it is positive, whatever the input; max-pooling sends it to where the
    maximum was (the switches).
    """
    return da


@method(
    "guidedgradcam",
    cost="2 backward",
    gives="terms",
    over_channels=largest,
    rectified=False,
    unsigned=True,
    full_size=True,
    requires="rectifier",
    instead="smoothgrad, which needs none",
)
def guidedgradcam(op: Emitter, probe: "Probe") -> Value:
    """max_c |g_c up(L)|, g by guided back-propagation and L the map of Grad-CAM. Selvaraju et al. 2017, 3.2.

    L is brought to the size of the picture bilinearly.
    """
    return guided(op, probe, "guided", resized)


def guided(
    op: Emitter, probe: "Probe", rules: str, enlarge: "Callable[[Emitter, Value, Size], Value]"
) -> Value:
    """Return the gradient at the picture by other rules times Grad-CAM's map, enlarged to the picture."""
    a = op.Unsqueeze(probe.activation(), [1])
    (coarse,) = probe.per_sum(lambda da: [op.Relu(summed(op, gradcam(op, da), a))])
    (fine,) = probe.at_picture().under(rules).per_sum(lambda dx: [dx])
    return op.Mul(fine, op.Unsqueeze(enlarge(op, coarse, probe.size()), [2]))


@method(
    "fullgrad",
    cost="1 backward",
    gives="map",
    rectified=False,
    unsigned=True,
    at_picture=True,
    requires="biases",
    instead="inputxgradient, its first term",
)
def fullgrad(op: Emitter, probe: "Probe") -> Value:
    """psi(x g) + sum over biases b of psi(b dy/db). Srinivas and Fleuret 2019, eq. 6.

    psi(.) takes the absolute value, scales to [0,1], resizes to the picture bilinearly and adds up the
    channels. It scales all channels of one value together, as the authors' code does. The biases are all
    those of a value with positions: of convolutions, linear layers and normalisations, and added constants.
    """
    found = probe.biases()

    def of(dx: Value, *dbs: Value) -> list[Value]:
        full = psi(probe.layout.planes(op, op.Mul(dx, op.Unsqueeze(probe.picture, [1]))))
        for db, (_, bias, grid) in zip(dbs, placed, strict=True):
            full = op.Add(full, resized(op, psi(grid.planes(op, op.Mul(db, bias))), probe.size()))
        return [full]

    def psi(terms: Value) -> Value:
        return op.ReduceSum(unit(op, op.Abs(terms), [2, 3, 4]), [2], keepdims=0)

    placed = [(value, bias, grid) for value, bias, grid in found if grid is not None]
    return probe.per_sum_at([probe.picture, *(value for value, _, _ in placed)], of)[0]
