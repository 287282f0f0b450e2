"""The two Grad-CAMs for Keras that were copied most, for one picture and the output of the softmax.

Where the largest value is 0 both divide 0 by 0; here the map is 0.
"""

from onnx_ir import Value

from onnxcam.dialects.dialect import Dialect
from onnxcam.emit import Emitter
from onnxcam.methods import Method, method
from onnxcam.methods.algebra import PLANE, summed
from onnxcam.methods.scaling import Size, resized

BOOK: dict[str, Method] = {}
CODE: dict[str, Method] = {}


@method("gradcam", cost="1 backward", into=BOOK)
def in_the_book(op: Emitter, a: Value, da: Value) -> Value:
    """ReLU(mean_k <g_k> A_k), g of the probability. Chollet 2017, Deep Learning with Python, listing 5.42."""
    channels = op.CastLike(op.Shape(a, start=2, end=3), a)
    return op.Div(op.ReduceMean(da, PLANE, keepdims=0), channels)


def _over_largest(op: Emitter, maps: Value) -> Value:
    """Over the largest value."""
    largest = op.ReduceMax(maps, [2, 3], keepdims=1)
    return op.Div(maps, op.Where(op.Greater(largest, 0.0), largest, 1.0))


def _resized(op: Emitter, cam: Value, size: Size, _signed: bool = False) -> Value:
    """Listing 5.44: OpenCV's linear resizing of the map that is scaled already."""
    return resized(op, cam, size)


@method("gradcam", cost="1 backward", gives="map", rectified=False, into=CODE)
def in_the_code(op: Emitter, a: Value, da: Value) -> Value:
    """1 + sum_k <n_k> A_k, n = g / (sqrt(mean of g^2) + 1e-5), g of the probability. grad-cam.py.

    The map starts at ones; the mean is over channels and positions.
    """
    size = op.Sqrt(op.ReduceMean(op.Mul(da, da), [2, *PLANE], keepdims=1))
    w = op.ReduceMean(op.Div(da, op.Add(size, 1e-5)), PLANE, keepdims=0)
    return op.Add(summed(op, w, a), 1.0)


def _resized_first(op: Emitter, cam: Value, size: Size, _signed: bool = False) -> Value:
    """OpenCV's linear resizing, then the ReLU, then over the largest value."""
    return _over_largest(op, op.Relu(resized(op, cam, size)))


KERAS_BOOK = Dialect("keras-book", BOOK, _resized, cam=_over_largest, score="after")
"""Chollet, Deep Learning with Python, first edition, section 5.4.3, listings 5.40 to 5.44."""

KERAS_GRAD_CAM = Dialect("keras-grad-cam", CODE, _resized_first, score="after")
"""jacobgil/keras-grad-cam; ``cam`` is the map before resizing and ReLU."""
