"""captum 0.9.0, its LayerGradCam.

The map is signed and not scaled; ``relu_attributions=True`` is the evidence ``for`` the class.
"""

from onnx_ir import Value

from onnxcam.dialects.dialect import Dialect
from onnxcam.emit import Emitter
from onnxcam.methods import Method, method
from onnxcam.methods.algebra import PLANE, Size, resized

OWN: dict[str, Method] = {}


@method("gradcam", cost="1 backward", rectified=False, into=OWN)
def gradcam(op: Emitter, da: Value) -> Value:
    """sum_k <g_k> A_k, signed."""
    return op.ReduceMean(da, PLANE, keepdims=0)


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
