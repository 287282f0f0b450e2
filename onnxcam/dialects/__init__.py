"""DIALECTS: whose numbers a map has. ``paper`` is each method as its paper defines it.

Libraries differ in epsilons, in how they scale and resize a map, and in formulas; a dialect reproduces one,
its mistakes included, and each module here is the list of what one library does differently.
"""

from onnxcam.dialects.captum import CAPTUM
from onnxcam.dialects.dialect import Dialect
from onnxcam.dialects.keras import KERAS_BOOK, KERAS_GRAD_CAM
from onnxcam.dialects.paper import PAPER
from onnxcam.dialects.pytorch_grad_cam import PYTORCH_GRAD_CAM
from onnxcam.dialects.torchcam import TORCHCAM

DIALECTS: dict[str, Dialect] = {
    dialect.name: dialect
    for dialect in (PAPER, PYTORCH_GRAD_CAM, TORCHCAM, CAPTUM, KERAS_BOOK, KERAS_GRAD_CAM)
}
"""Every dialect by the name that people type."""

__all__ = ["DIALECTS", "Dialect"]
