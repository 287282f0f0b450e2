"""Running a part of the model again: what depends on the change is computed anew, whatever it is."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from tests.checks import relative_error
from tests.graphs import build, explained, run, weights_of
from tests.methods.nets import CLASSES, pictures

WEIGHTS = "<float[5,2,3,3] w, float[5] b, float[5,4] fc, float zero = {0}, float tenth = {0.1}"
STEM = "c = Conv<kernel_shape=[3,3], pads=[1,1,1,1]>(x, w, b)"
HEAD = "p = GlobalAveragePool(last) f = Flatten(p) scores = MatMul(f, fc)"


def net(between, more=""):
    """A classifier with `between` from the convolution c to the value last."""
    text = f"(float[N,2,6,8] x) => (float[N,4] scores) {WEIGHTS}{more}>"
    return build(text + " { " + STEM + " " + between + " " + HEAD + " }", b=np.linspace(-1, 1, 5))


LEAKY = "last = LeakyRelu<alpha=0.1>(c)"
# LeakyRelu again, by values of other types that depend on the picture.
DISGUISED = {
    "a mask": ("m = Greater(c, zero) s = Mul(c, tenth) last = Where(m, c, s)", ""),
    "a number": (
        """m = Greater(c, zero) i = Cast<to=7>(m) k = Cast<to=1>(i) o = Sub(one, k) t = Mul(o, tenth)
        g = Add(k, t) last = Mul(c, g)""",
        ", float one = {1}",
    ),
    "indices": (
        """q = Shape(c) fl = Reshape(c, minus) m = Greater(fl, zero) i = Cast<to=7>(m)
        g = Gather(slopes, i) v = Mul(fl, g) last = Reshape(v, q)""",
        ", int64[1] minus = {-1}, float[2] slopes = {0.1, 1}",
    ),
    "dropout": ("d = Dropout(c) last = LeakyRelu<alpha=0.1>(d)", ""),
}


@pytest.mark.parametrize("method", ["ablationcam", "scorecam", "reciprocam", "iscam"])
@pytest.mark.parametrize("disguise", DISGUISED)
def test_masks_and_indices_follow_the_change(disguise, method):
    between, more = DISGUISED[disguise]
    feeds = {"x": pictures(dtype=np.float32), "cam_class": CLASSES}
    got, wanted = (
        run(explained(proto, method=method, layer="c", emit=("cam",)), feeds)["cam"]
        for proto in (net(between, more), net(LEAKY))
    )
    assert relative_error(got, wanted) <= 1e-5


def test_weights_are_constants_of_the_body_once_onnxruntime_has_opened_it(tmp_path):
    """Only of such convolutions does it know a faster layout; the file holds each weight once."""
    model = explained(net(LEAKY), method="scorecam", layer="c", emit=("cam",))
    (scan,) = [node for node in model.graph.node if node.op_type == "Scan"]
    assert not next(a.g for a in scan.attribute if a.name == "body").initializer
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (scan,) = [node for node in onnx.load(tmp_path / "optimized.onnx").graph.node if node.op_type == "Scan"]
    body = next(a.g for a in scan.attribute if a.name == "body")
    convolutions = [node for node in body.node if node.op_type in ("Conv", "FusedConv")]
    held = {tensor.name for tensor in body.initializer}
    assert convolutions and all(set(node.input[1:3]) <= held for node in convolutions)


def with_if():
    """Where the picture's sum is positive LeakyRelu, else its negative; the branches read c."""
    proto = net(LEAKY)
    node = next(n for n in proto.graph.node if n.op_type == "LeakyRelu")
    helper = onnx.helper
    branches = {}
    for name, sign in (("then_branch", 1.0), ("else_branch", -1.0)):
        body = [
            helper.make_node("LeakyRelu", ["c"], [name + "_leaky"], alpha=0.1),
            helper.make_node("Constant", [], [name + "_sign"], value_float=sign),
            helper.make_node("Mul", [name + "_leaky", name + "_sign"], [name + "_out"]),
        ]
        out = helper.make_tensor_value_info(name + "_out", onnx.TensorProto.FLOAT, ["N", 5, 6, 8])
        branches[name] = helper.make_graph(body, name, [], [out])
    at = list(proto.graph.node).index(node)
    before = [
        helper.make_node("ReduceSum", ["x"], ["total"], keepdims=0),
        helper.make_node("Greater", ["total", "zero"], ["positive"]),
        helper.make_node("If", ["positive"], ["last"], "choice", **branches),
    ]
    rest = list(proto.graph.node)
    del proto.graph.node[:]
    proto.graph.node.extend([*rest[:at], *before, *rest[at + 1 :]])
    return proto


@pytest.mark.parametrize("method", ["ablationcam", "reciprocam", "scorecam"])
@pytest.mark.parametrize("sign", [1, -1])
def test_subgraphs_read_the_change_too(method, sign):
    """One picture, so that the condition is the same for all that is tried (the masks are not negative)."""
    x = sign * np.abs(pictures(1, np.float32))
    feeds = {"x": x, "cam_class": CLASSES[:1]}
    got = run(explained(with_if(), method=method, layer="c", emit=("cam",)), feeds)["cam"]
    plain = LEAKY if sign > 0 else LEAKY.replace("last", "n") + " last = Neg(n)"
    proto = net(plain)
    wanted = run(explained(proto, method=method, layer="c", emit=("cam",)), feeds)["cam"]
    assert np.abs(wanted).max() > 0
    assert relative_error(got, wanted) <= 1e-5


# Tokens: a class token, then 4 x 3 = 12 of the plane; one attention without weights of its own mixes them.
TOKENS = """(double[N,2,8,6] x) => (double[N,4] scores)
<double[5,2,2,2] w, double[1,1,5] first, double[5] scale, double[5] shift, double[5,4] fc,
 int64[3] flat = {0, 5, -1}, int64 zero = {0}, int64[2] ones = {1, 1}>
{
    c = Conv<kernel_shape=[2,2], strides=[2,2]>(x, w)
    r = Reshape(c, flat)
    t = Transpose<perm=[0,2,1]>(r)
    batch = Shape<start=0, end=1>(x)
    size = Concat<axis=0>(batch, ones)
    several = Expand(first, size)
    a = Concat<axis=1>(several, t)
    l = LayerNormalization(a, scale, shift)
    k = Transpose<perm=[0,2,1]>(l)
    s = MatMul(l, k)
    weights = Softmax(s)
    mixed = MatMul(weights, l)
    head = Gather<axis=1>(mixed, zero)
    scores = MatMul(head, fc)
}"""


def tokens_in_torch(proto, x):
    w = {name: torch.tensor(array) for name, array in weights_of(proto).items()}
    t = torch.nn.functional.conv2d(x, w["w"], stride=2).flatten(2).transpose(1, 2)
    a = torch.cat([w["first"].expand(len(x), -1, -1), t], 1)
    epsilon = float(np.float32(1e-5))
    layer = torch.nn.functional.layer_norm(a, (5,), w["scale"], w["shift"], epsilon)

    def tail(tokens):
        return ((tokens @ tokens.transpose(1, 2)).softmax(-1) @ tokens)[:, 0] @ w["fc"]

    return layer, tail


@pytest.mark.parametrize("method", ["ablationcam", "reciprocam"])
def test_tokens_beside_the_plane_stay(method):
    proto = build(TOKENS, dtype="double", scale=np.linspace(0.5, 2, 5), shift=np.linspace(-1, 1, 5))
    x = np.random.default_rng(0).standard_normal((3, 2, 8, 6))
    added = explained(proto, method=method, layer="l", evidence="both", emit=("cam",))
    got = run(added, {"x": x, "cam_class": CLASSES}, by="ref")["cam"]
    layer, tail = tokens_in_torch(proto, torch.tensor(x))
    for n in range(3):
        for k, c in enumerate(CLASSES[n]):
            one = layer[n : n + 1]
            y = tail(one)[0, c]
            wanted = torch.zeros(12, dtype=torch.float64)
            if method == "ablationcam":
                for channel in range(5):
                    without = one.clone()
                    without[:, 1:, channel] = 0
                    wanted += (y - tail(without)[0, c]) / y * one[0, 1:, channel]
            else:
                for place in range(12):
                    alone = one.clone()
                    alone[:, 1:] = 0
                    alone[:, 1 + place] = one[:, 1 + place]
                    wanted[place] = tail(alone)[0, c]
            assert relative_error(got[n, k], wanted.reshape(4, 3)) <= 1e-6


CHANNELS_LAST = """(double[N,2,8,6] x) => (double[N,4] scores)
<double[5,2,2,2] w, double[5] scale, double[5] shift, double[5,5] mlp, double[5,4] fc,
 int64[2] plane = {1, 2}>
{
    c = Conv<kernel_shape=[2,2], strides=[2,2]>(x, w)
    t = Transpose<perm=[0,2,3,1]>(c)
    l = LayerNormalization(t, scale, shift)
    m = MatMul(l, mlp)
    h = Tanh(m)
    p = ReduceMean<keepdims=0>(h, plane)
    scores = MatMul(p, fc)
}"""


def test_channels_last_activations_are_put_back_as_they_were():
    proto = build(CHANNELS_LAST, dtype="double", scale=np.linspace(0.5, 2, 5), shift=np.linspace(-1, 1, 5))
    x = np.random.default_rng(0).standard_normal((3, 2, 8, 6))
    emit = ("cam", "activations")
    added = explained(proto, method="reciprocam", layer="l", emit=emit)
    got = run(added, {"x": x, "cam_class": CLASSES}, by="ref")
    w = {i.name: onnx.numpy_helper.to_array(i) for i in proto.graph.initializer}
    a = got["cam_activations"]  # zeros elsewhere give tanh(0) = 0
    scores = np.einsum("nchw,cd->ndhw", a, w["mlp"])
    wanted = np.einsum("ndhw,dk->nkhw", np.tanh(scores), w["fc"]) / 12
    for n in range(3):
        np.testing.assert_allclose(got["cam"][n], wanted[n, CLASSES[n]], rtol=1e-6, atol=1e-7)
