"""Small classifiers for the tests, written as ONNX text."""

import functools
import re

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime

from onnxcam.attaching import attach
from tests.checks import quiet, reference

EVERYTHING = ("cam", "heatmap", "activations", "gradients")


def build(graph, *, dtype="float", opset=18, ir_version=10, seed=0, **weights):
    """Parse ``(inputs) => (outputs) <weights> { nodes }``; a weight declared without values is random.

    Args:
        graph: the text. ``T`` stands for `dtype`.
        dtype: float, double or float16.
        opset: of the model.
        ir_version: of the model.
        seed: of the random weights, normal with deviation sqrt(2 / fan-in).
        weights: arrays for weights declared in the text.
    """
    graph = re.sub(r"\bT\b", dtype, graph)
    model = onnx.parser.parse_model(f'<ir_version: {ir_version}, opset_import: ["" : {opset}]>\nm {graph}')
    rng = np.random.default_rng(seed)
    declared = [v for v in model.graph.value_info if v.name in _free(model.graph)]
    for info in declared:
        dtype = onnx.helper.tensor_dtype_to_np_dtype(info.type.tensor_type.elem_type)
        shape = [d.dim_value for d in info.type.tensor_type.shape.dim]
        array = weights.get(info.name)
        if array is None:
            fan_in = np.prod(shape[1:]) if len(shape) > 2 else shape[0]
            array = rng.standard_normal(shape) * np.sqrt(2 / fan_in)
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(array, dtype), info.name))
        model.graph.value_info.remove(info)
    return model


def _free(graph):
    """What the nodes of `graph` and of its branches read but nothing makes."""
    made = {name for node in graph.node for name in node.output} | {v.name for v in graph.input}
    read = {name for node in graph.node for name in node.input}
    return read.union(*(_free(a.g) for node in graph.node for a in node.attribute if a.HasField("g"))) - made


# One convolution, pooling and a matrix: the gradient at r depends on nothing but the class.
LINEAR = """(T[N,3,8,10] x) => (T[N,5] scores) <T[4,3,3,3] w, T[4] b, T[4,5] fc, T[5] bias>
{
    c = Conv<kernel_shape=[3,3], pads=[1,1,1,1]>(x, w, b)
    r = Relu(c)
    p = GlobalAveragePool(r)
    f = Flatten(p)
    m = MatMul(f, fc)
    scores = Add(m, bias)
}"""

# Two convolutions: the gradient at r depends on the picture.
DEEP = """(T[N,3,8,10] x) => (T[N,5] scores) <T[4,3,3,3] w, T[6,4,3,3] v, T[6,5] fc>
{
    c = Conv<kernel_shape=[3,3], pads=[1,1,1,1]>(x, w)
    r = Sigmoid(c)
    d = Conv<kernel_shape=[3,3], pads=[1,1,1,1], strides=[2,2]>(r, v)
    s = Relu(d)
    p = GlobalAveragePool(s)
    f = Flatten(p)
    scores = MatMul(f, fc)
}"""


def explained(model, **options):
    """Attach with every output and return the proto."""
    return ir.to_proto(attach(model, **{"emit": EVERYTHING, **options}))


def run(model, feeds, *, by="ort"):
    """All outputs by name, from onnxruntime (``ort``) or onnx.reference (``ref``)."""
    names = [v.name for v in model.graph.output]
    feeds = {"x": feeds} if isinstance(feeds, np.ndarray) else feeds
    return dict(zip(names, runner(model.SerializeToString(), by)(names, feeds), strict=True))


@functools.lru_cache(maxsize=64)
def runner(data, by):
    if by == "ref":
        return reference(onnx.load_from_string(data)).run
    return onnxruntime.InferenceSession(data, quiet(), providers=["CPUExecutionProvider"]).run


def picture(n=1, *size, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal((n, *(size or (3, 8, 10)))).astype(dtype)


# Every kind of layer that torchvision's CNNs have between picture and scores; build it with RICH_WEIGHTS.
RICH = """(T[N,3,13,14] x) => (T[N,5] scores)
<T[8,3,3,3] w1, T[8] b1, T[8] scale, T[8] shift, T[8] mean, T[8] variance, T[8,8,1,1] w2, T[8,4,3,3] w3,
 T[4,16,1,1] squeeze, T[4] squeeze_b, T[16,4,1,1] excite, T[16] excite_b, T[12,16] fc1, T[12] fc1_b,
 T[12,5] fc2, T[1] six, int64[2] plane = {2, 3}>
{
    c1 = Conv<kernel_shape=[3,3], pads=[1,1,1,1]>(x, w1, b1)
    n1 = BatchNormalization(c1, scale, shift, mean, variance)
    r1 = Relu(n1)
    m1 = MaxPool<kernel_shape=[3,3], strides=[2,2], pads=[1,1,1,1]>(r1)
    c2 = Conv<kernel_shape=[1,1]>(m1, w2)
    h2 = HardSwish(c2)
    c3 = Conv<kernel_shape=[3,3], pads=[2,2,2,2], dilations=[2,2], group=2>(m1, w3)
    s3 = Sigmoid(c3)
    h3 = Mul(c3, s3)
    cat = Concat<axis=1>(h2, h3)
    a = AveragePool<kernel_shape=[3,2], strides=[2,1], pads=[1,0,1,1]>(cat)
    g = GlobalAveragePool(a)
    q = Conv<kernel_shape=[1,1]>(g, squeeze, squeeze_b)
    qr = Relu(q)
    e = Conv<kernel_shape=[1,1]>(qr, excite, excite_b)
    es = HardSigmoid<alpha=0.16666667>(e)
    se = Mul(a, es)
    res = Add(se, a)
    r6 = Min(res, six)
    p = ReduceMean<keepdims=0>(r6, plane)
    d = Gemm<transB=1>(p, fc1, fc1_b)
    dh = Elu(d)
    scores = MatMul(dh, fc2)
}"""


RICH_WEIGHTS = {
    "mean": np.linspace(-0.3, 0.3, 8),
    "variance": np.linspace(0.5, 2, 8),
    "six": [6.0],
}


def rich_in_torch(x, weights):
    """RICH again, as torch computes it: all values by name."""
    import torch
    from torch.nn import functional as F  # noqa: N812

    w = {name: torch.tensor(array) for name, array in weights.items()}
    v = {"x": x}
    v["c1"] = F.conv2d(x, w["w1"], w["b1"], padding=1)
    v["n1"] = F.batch_norm(
        v["c1"], w["mean"], w["variance"], w["scale"], w["shift"], eps=float(np.float32(1e-5))
    )
    v["r1"] = F.relu(v["n1"])
    v["m1"] = F.max_pool2d(v["r1"], 3, 2, 1)
    v["h2"] = F.hardswish(F.conv2d(v["m1"], w["w2"]))
    v["h3"] = F.silu(F.conv2d(v["m1"], w["w3"], padding=2, dilation=2, groups=2))
    v["cat"] = torch.cat([v["h2"], v["h3"]], 1)
    padded = F.pad(v["cat"], (0, 1, 1, 1))
    members = F.avg_pool2d(F.pad(torch.ones_like(v["cat"]), (0, 1, 1, 1)), (3, 2), (2, 1))
    v["a"] = F.avg_pool2d(padded, (3, 2), (2, 1)) / members
    squeezed = F.relu(F.conv2d(v["a"].mean((2, 3), keepdim=True), w["squeeze"], w["squeeze_b"]))
    excited = F.conv2d(squeezed, w["excite"], w["excite_b"])
    v["se"] = v["a"] * (excited * float(np.float32(1 / 6)) + 0.5).clamp(0, 1)
    v["res"] = v["se"] + v["a"]
    d = F.linear(v["res"].clamp(max=6).mean((2, 3)), w["fc1"], w["fc1_b"])
    v["scores"] = F.elu(d) @ w["fc2"]
    return v


def weights_of(model):
    return {i.name: onnx.numpy_helper.to_array(i) for i in model.graph.initializer}


# Scores [N,5,1,1] from a 1x1 convolution behind the pooling.
CONV_HEAD = """(T[N,3,8,10] x) => (T[N,5,1,1] scores) <T[4,3,3,3] w, T[5,4,1,1] v, T[5] bias>
{
    c = Conv<kernel_shape=[3,3], pads=[1,1,1,1]>(x, w)
    r = Relu(c)
    p = GlobalAveragePool(r)
    scores = Conv<kernel_shape=[1,1]>(p, v, bias)
}"""

# As in SqueezeNet: class maps, their average, softmax.
CLASS_MAPS = """(T[N,3,8,10] x) => (T[N,5,1,1] scores) <T[4,3,3,3] w, T[5,4,1,1] v, T[5] bias>
{
    c = Conv<kernel_shape=[3,3], pads=[1,1,1,1]>(x, w)
    r = Relu(c)
    d = Conv<kernel_shape=[1,1]>(r, v, bias)
    s = Relu(d)
    p = GlobalAveragePool(s)
    scores = Softmax<axis=1>(p)
}"""

# As in VGG: the feature map itself goes through a matrix for each position.
FLAT_HEAD = """(T[N,3,8,10] x) => (T[N,5] scores) <T[4,3,3,3] w, T[7,80] fc1, T[5,7] fc2, T[5] bias>
{
    c = Conv<kernel_shape=[3,3], pads=[1,1,1,1]>(x, w)
    r = Relu(c)
    m = MaxPool<kernel_shape=[2,2], strides=[2,2]>(r)
    f = Flatten(m)
    g = Gemm<transB=1>(f, fc1)
    h = Tanh(g)
    scores = Gemm<transB=1, alpha=0.5>(h, fc2, bias)
}"""
