"""captum 0.9.0: LayerGradCam and the attributions of the picture.

Its maps are signed and not scaled; ``relu_attributions=True`` is the evidence ``for`` the class.
"""

import dataclasses

from onnx_ir import Value

from onnxcam.dialects.dialect import Dialect
from onnxcam.emit import Emitter
from onnxcam.methods import METHODS
from onnxcam.methods.algebra import Size, resized


def heatmap(op: Emitter, cam: Value, size: Size, _signed: bool = False) -> Value:
    """``LayerAttribution.interpolate``: the nearest value, torch's way, which rounds down; no scaling."""
    return resized(op, cam, size, "nearest", "asymmetric", nearest_mode="floor")


CAPTUM = Dialect(
    "captum",
    {"gradcam": dataclasses.replace(METHODS["gradcam"], rectified=False)},
    heatmap,
    evidence=("for", "counterfactual"),
)
"""On tokens its LayerGradCam averages over the channels and sums over the tokens, which is no map."""
