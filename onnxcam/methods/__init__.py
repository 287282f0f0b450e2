"""Class activation maps, one function each: `METHODS` holds them all, `method` adds one.

They exist as ONNX operators only. What a function takes and returns is written down in `Method`.
"""

from onnxcam.methods import activation, attention, cam, perturbation, picture
from onnxcam.methods.registry import METHODS, Method, method, named

__all__ = ["METHODS", "Method", "method", "named"]

del activation, attention, cam, perturbation, picture
