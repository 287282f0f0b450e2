"""captum 0.9.0.

Maps are signed and not scaled; ``relu_attributions=True`` is the evidence ``for`` the class. What its
attribution to the picture returns, and LayerGradientXActivation, has a value for every channel: these are the
``attributions``, and the map is their sum over the channels, as its ``visualize_image_attr`` draws them.
"""

from typing import TYPE_CHECKING

import numpy as np
from onnx_ir import Value

from onnxcam.dialects.dialect import Dialect
from onnxcam.emit import Emitter
from onnxcam.methods import METHODS, Method, method
from onnxcam.methods.cam import gradcam as mean_gradient
from onnxcam.methods.perturbation import noisy_gradients
from onnxcam.methods.picture import guided, integrated
from onnxcam.methods.scaling import Size, resized

if TYPE_CHECKING:
    from onnxcam.probe import Probe

SHARED = ("inputxgradient",)
"""What it computes as the papers say."""

OWN: dict[str, Method] = {name: METHODS[name] for name in SHARED}

_POINTS = 50
_SAMPLES = 5


@method("gradcam", cost="1 backward", rectified=False, signed=True, into=OWN)
def gradcam(op: Emitter, da: Value) -> Value:
    """sum_k <g_k> A_k, signed: LayerGradCam."""
    return mean_gradient(op, da)


@method("hirescam", cost="1 backward", rectified=False, signed=True, into=OWN)
def hirescam(op: Emitter, da: Value) -> Value:
    """sum_k g_k A_k, signed: LayerGradientXActivation."""
    return da


@method(
    "saliency",
    cost="1 backward",
    gives="terms",
    rectified=False,
    unsigned=True,
    at_picture=True,
    into=OWN,
)
def saliency(op: Emitter, da: Value) -> Value:
    """sum_c |g_c|: Saliency."""
    return op.Abs(da)


@method(
    "integratedgradients",
    cost=f"{_POINTS} and {_POINTS} backward",
    gives="terms",
    rectified=False,
    signed=True,
    at_picture=True,
    into=OWN,
)
def integratedgradients(op: Emitter, probe: "Probe") -> Value:
    """sum_c x_c int_0^1 dy(t x)/dx_c dt, by the Gauss-Legendre rule of 50 points: IntegratedGradients."""
    points, weights = np.polynomial.legendre.leggauss(_POINTS)
    return integrated(op, probe, (1 + points) / 2, weights / 2)


@method(
    "smoothgrad",
    cost=f"{_SAMPLES} and {_SAMPLES} backward",
    gives="terms",
    rectified=False,
    unsigned=True,
    at_picture=True,
    into=OWN,
)
def smoothgrad(op: Emitter, probe: "Probe") -> Value:
    """sum_c mean_i |g_c(x + noise_i)|, 5 times noise of deviation 1: NoiseTunnel of Saliency.

    There each picture has noise of its own; here all have the same.
    """
    return op.ReduceMean(op.Abs(noisy_gradients(op, probe, _SAMPLES, 1.0)), [0], keepdims=0)


@method(
    "guidedbackprop",
    cost="1 backward",
    gives="terms",
    rectified=False,
    signed=True,
    at_picture=True,
    rules="guided relu",
    into=OWN,
)
def guidedbackprop(op: Emitter, da: Value) -> Value:
    """sum_c g_c, where only what is positive passes back through a ReLU, but all through a ReLU6."""
    return da


@method(
    "deconvnet",
    cost="1 backward",
    gives="terms",
    rectified=False,
    signed=True,
    at_picture=True,
    rules="deconvnet relu",
    into=OWN,
)
def deconvnet(op: Emitter, da: Value) -> Value:
    """sum_c g_c, where what passes back through a ReLU is rectified itself, but not through a ReLU6."""
    return da


@method(
    "guidedgradcam", cost="2 backward", gives="terms", rectified=False, signed=True, full_size=True, into=OWN
)
def guidedgradcam(op: Emitter, probe: "Probe") -> Value:
    """sum_c g_c up(ReLU(L)), g by guidedbackprop and L the map of gradcam, brought up by `heatmap`."""
    return guided(op, probe, "guided relu", heatmap)


def heatmap(op: Emitter, cam: Value, size: Size, _signed: bool = False) -> Value:
    """``LayerAttribution.interpolate``: the nearest value, torch's way, which rounds down; no scaling."""
    return resized(op, cam, size, "nearest", "asymmetric", nearest_mode="floor")


CAPTUM = Dialect(
    "captum",
    OWN,
    heatmap,
    evidence=("for", "counterfactual"),
)
"""On tokens its LayerGradCam averages over the channels and sums over the tokens, which is no map."""
