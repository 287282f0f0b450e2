"""A small classifier as ONNX, to try everything on that does not need a real one."""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

FACTS = {"color": "RGB", "scale": 1 / 255, "mean": (0.5,), "std": (0.5,), "resize": "stretch"}
FLAGS = ("--color", "rgb", "--scale", "1/255", "--mean", "0.5", "--std", "0.5", "--resize", "stretch")
LAYER = "features"


def classifier(
    classes=4,
    *,
    batch="N",
    channels=3,
    size=(8, 12),
    dtype=np.float32,
    nhwc=False,
    softmax=False,
    extra=(),
    inputs=(),
    outputs=(),
    opset=18,
    weights=(),
):
    """Conv, Relu (the value "features", [N,6,h,w]), GlobalAveragePool, Flatten, Gemm.

    Args:
        classes: their number.
        batch, channels, size: of the input "image".
        dtype: of input and weights.
        nhwc: takes [N,H,W,C] and transposes it.
        softmax: ends in one.
        extra: further nodes, put before the pooling; one that makes "changed" is what gets pooled.
        inputs, outputs: further inputs and outputs of the graph.
        opset: of the model.
        weights: further initializers.
    """
    rng = np.random.default_rng(0)
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))

    def weight(name, *shape):
        values = rng.standard_normal(shape)
        if name == "w2":  # so that no class has a map of zeros
            values = np.abs(values)
        return numpy_helper.from_array(values.astype(dtype), name)

    nodes = [
        helper.make_node("Conv", ["nchw" if nhwc else "image", "w1", "b1"], ["conv"], "conv1", pads=[1] * 4),
        helper.make_node("Relu", ["conv"], [LAYER], "relu1"),
        *extra,
        helper.make_node(
            "GlobalAveragePool", ["changed" if any("changed" in n.output for n in extra) else LAYER], ["mean"]
        ),
        helper.make_node("Flatten", ["mean"], ["flat"], "flatten"),
        helper.make_node("Gemm", ["flat", "w2", "b2"], ["logits" if softmax else "scores"], "fc"),
    ]
    if nhwc:
        nodes.insert(0, helper.make_node("Transpose", ["image"], ["nchw"], perm=[0, 3, 1, 2]))
    if softmax:
        nodes.append(helper.make_node("Softmax", ["logits"], ["scores"], "softmax", axis=1))
    shape = [batch, *size, channels] if nhwc else [batch, channels, *size]
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("image", kind, shape), *inputs],
        [helper.make_tensor_value_info("scores", kind, [batch, classes]), *outputs],
        [
            weight("w1", 6, channels, 3, 3),
            weight("b1", 6),
            weight("w2", 6, classes),
            weight("b2", classes),
            *weights,
        ],
    )
    domains = {node.domain for node in extra} - {""}
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
    return helper.make_model(graph, opset_imports=imports, ir_version=8)


def saved(folder, name="model.onnx", **options):
    """Write a `classifier` to a file and return its path."""
    path = folder / name
    onnx.save(classifier(**options), path)
    return path


def floats(name, shape):
    """Declare a float input or output."""
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
