"""Class activation maps, one function each: `METHODS` holds them all, `method` adds one.

They exist as ONNX operators only. `a` is the activation A [N,1,C,h,w] and `da` the gradient of K class
scores with respect to it, g [N,K,C,h,w]; the map is [N,K,h,w].
"""

from onnxcam.methods import activation, cam, perturbation
from onnxcam.methods.registry import METHODS, Method, method, named

__all__ = ["METHODS", "Method", "method", "named"]

del activation, cam, perturbation
