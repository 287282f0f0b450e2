"""Each method as its paper defines it; scaling, fusing and smoothing as is usual."""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir import Value

from onnxcam.dialects.dialect import Dialect
from onnxcam.emit import Emitter
from onnxcam.methods import METHODS, Method
from onnxcam.methods.algebra import Size, resized, unit


def heatmap(op: Emitter, cam: Value, size: Size, signed: bool = False) -> Value:
    """Resize maps to the picture (bilinear, half-pixel centres) and scale each to [0,1].

    A map that is flat, has nothing above zero or has a value that is not finite becomes all zeros.

    Args:
        op: where the nodes go.
        cam: float32 [N,K,h,w].
        size: height and width of the picture.
        signed: divide by the largest absolute value instead, to [-1,1]: zero stays zero. Then a map of
            nothing above zero is as good as any.

    Returns:
        float32 [N,K,H,W].
    """
    # Up to half the largest number, so that the span from minimum to maximum is finite too.
    small = op.LessOrEqual(op.Abs(cam), float(np.finfo(np.float32).max) / 2)
    finite = op.Greater(op.ReduceMin(op.Cast(small, to=ir.DataType.FLOAT), [2, 3]), 0.0)
    # A flat map is zero before the resizing, whose weights add up to 1 only nearly.
    low, high = op.ReduceMin(cam, [2, 3]), op.ReduceMax(cam, [2, 3])
    says = op.Greater(high, low if signed else op.Relu(low))
    clean = op.Where(op.And(finite, says), cam, 0.0)
    full = resized(op, clean, size)
    if signed:
        largest = op.ReduceMax(op.Abs(full), [2, 3])
        return op.Div(full, op.Where(op.Greater(largest, 0.0), largest, 1.0))
    return unit(op, full)


def fuse(op: Emitter, maps: Sequence[Value], size: Size, fusion: str, _method: Method) -> Value:
    """Scale each map by its largest absolute value, resize them, and take the mean, maximum or product.

    LayerCAM (Jiang et al. 2021, eq. 8-9) takes the maximum, after a tanh.
    """
    alike = []
    for cam in maps:
        largest = op.ReduceMax(op.Abs(cam), [2, 3])
        alike.append(resized(op, op.Div(cam, op.Where(op.Greater(largest, 0.0), largest, 1.0)), size))
    if fusion == "mean":
        return op.Mean(*alike)
    if fusion == "max":
        return op.Max(*alike)
    product = alike[0]
    for factor in alike[1:]:
        product = op.Mul(product, factor)
    return product


PAPER = Dialect(
    "paper",
    METHODS,
    heatmap,
    fusions=("mean", "max", "product"),
    fuse=fuse,
    evidence=("for", "against", "both", "counterfactual"),
    smoothings=("augmentation", "eigen"),
)
