"""Each method as its paper defines it; scaling, fusing and smoothing as is usual."""

from collections.abc import Sequence

from onnx_ir import Value

from onnxcam.dialects.dialect import Dialect
from onnxcam.emit import Emitter
from onnxcam.methods import METHODS, Method
from onnxcam.methods.scaling import Size, heatmap, over_largest, resized


def fuse(op: Emitter, maps: Sequence[Value], size: Size, fusion: str, _method: Method) -> Value:
    """Scale each map by its largest absolute value, resize them, and take the mean, maximum or product.

    LayerCAM (Jiang et al. 2021, eq. 8-9) takes the maximum, after a tanh.
    """
    alike = [resized(op, over_largest(op, cam), size) for cam in maps]
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
