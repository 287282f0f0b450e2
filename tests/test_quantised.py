"""Quantised models against torch's fake quantisation, whose autograd is the straight-through estimator.

One thing torch cannot know: after a convolution or a matrix product the graph tells only what was stored, so
there the two ends of the range count as clamped. `fake` does the same where it is asked to.
"""

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
import torch.nn.functional as f

from onnxcam import attach
from onnxcam.attaching import prepared
from onnxcam.differentiating import gradient
from onnxcam.layers import explainable, locate, picture, scores
from onnxcam.quantised import FUNCTIONS
from tests.checks import quiet, relative_error

RNG = np.random.default_rng(3)
MS = "com.microsoft"
INT8 = np.int8


def fake(x, scale, zero, low=0, high=255, ends=True):
    """Quantise and dequantise; `ends`: whether the ends of the range pass the gradient."""
    scale, zero = float(scale), int(zero)
    y = torch.fake_quantize_per_tensor_affine(x, scale, zero, low, high)
    stored = torch.round(y / scale) + zero
    return y if ends else torch.where((stored > low) & (stored < high), y, y.detach())


def weight(*shape):
    return RNG.integers(-90, 90, shape).astype(INT8)


X_SCALE, X_ZERO, Y_SCALE, Y_ZERO = 0.03, 120, 0.02, 110
CONSTANTS = {
    "xs": np.float32(X_SCALE),
    "xz": np.uint8(X_ZERO),
    "ys": np.float32(Y_SCALE),
    "yz": np.uint8(Y_ZERO),
    "w": weight(6, 2, 3, 3),
    "ws": RNG.uniform(0.004, 0.01, 6).astype(np.float32),
    "wz": np.zeros(6, INT8),
    "s": np.float32(0.01),
    "z": INT8(3),
    "b": RNG.integers(-900, 900, 6).astype(np.int32),
    "m": weight(6, 5),
    "ms": RNG.uniform(0.004, 0.01, 5).astype(np.float32),
    "mz": np.zeros(5, INT8),
    "mt": weight(5, 24),
    "mb": RNG.integers(-900, 900, 5).astype(np.int32),
    "c": RNG.integers(0, 255, (4, 1, 6), np.uint8),
    "flat": np.array([2, 24 * 6]),
    "bias": np.ones(5, np.float32),
    "yes": RNG.random((2, 4, 6, 6)) < 0.5,
    "packed": RNG.integers(0, 255, (5, 1, 8), np.uint8),
    "blocks": np.full(5, 0.05, np.float32),
}
C = {k: torch.tensor(np.asarray(v)) for k, v in CONSTANTS.items()}
W = (C["w"].float() - 0) * C["ws"].reshape(6, 1, 1, 1)
M = C["m"].float() * C["ms"]
MT = (C["mt"].float() - 3) * 0.01
OTHER = (C["c"].float() - X_ZERO) * X_SCALE
B = C["b"].float() * X_SCALE * C["ws"]
NIBBLES = torch.stack([C["packed"] % 16, C["packed"] // 16], -1).reshape(5, 16)[:, :6].float()


def _nibbles(x):
    return x @ ((NIBBLES - 8) * 0.05).mT


# What to write, what that computes of the dequantised x [2,4,6,6], and whether the ends pass the gradient.
STORING = {
    ("", "QLinearConv"): (
        "QLinearConv<pads=[1,1,0,0], strides=[2,1], group=2>(q, xs, xz, w, ws, wz, ys, yz, b)",
        lambda x: f.conv2d(f.pad(x, (1, 0, 1, 0)), W, B, (2, 1), groups=2),
        False,
    ),
    ("", "QLinearMatMul"): ("QLinearMatMul(q, xs, xz, m, ms, mz, ys, yz)", lambda x: x @ M, False),
    (MS, "QLinearAdd"): ("com.microsoft.QLinearAdd(q, xs, xz, c, xs, xz, ys, yz)", lambda x: x + OTHER, True),
    (MS, "QLinearMul"): ("com.microsoft.QLinearMul(q, xs, xz, c, xs, xz, ys, yz)", lambda x: x * OTHER, True),
    (MS, "QLinearSigmoid"): ("com.microsoft.QLinearSigmoid(q, xs, xz, ys, yz)", torch.sigmoid, True),
    (MS, "QLinearLeakyRelu"): (
        "com.microsoft.QLinearLeakyRelu<alpha=0.25>(q, xs, xz, ys, yz)",
        lambda x: f.leaky_relu(x, 0.25),
        True,
    ),
    (MS, "QLinearConcat"): (
        "com.microsoft.QLinearConcat<axis=1>(ys, yz, q, xs, xz, q, xs, xz)",
        lambda x: torch.cat([x, x], 1),
        True,
    ),
    (MS, "QLinearAveragePool"): (
        "com.microsoft.QLinearAveragePool<kernel_shape=[3,2], strides=[2,2]>(q, xs, xz, ys, yz)",
        lambda x: f.avg_pool2d(x, (3, 2), 2),
        True,
    ),
    (MS, "QLinearGlobalAveragePool"): (
        "com.microsoft.QLinearGlobalAveragePool(q, xs, xz, ys, yz)",
        lambda x: x.mean((2, 3), True),
        True,
    ),
    (MS, "QLinearSoftmax"): (
        "com.microsoft.QLinearSoftmax<axis=-1, opset=13>(q, xs, xz, ys, yz)",
        lambda x: x.softmax(-1),
        True,
    ),
    (MS, "QLinearWhere"): (
        "com.microsoft.QLinearWhere(yes, q, xs, xz, c, xs, xz, ys, yz)",
        lambda x: torch.where(C["yes"], x, OTHER),
        True,
    ),
}
FLOATING = {
    ("", "ConvInteger"): (
        "i = ConvInteger<kernel_shape=[3,3], group=2>(q, w, xz) y = Cast<to=1>(i)",
        lambda x: f.conv2d(x / X_SCALE, C["w"].float(), groups=2),
    ),
    ("", "MatMulInteger"): (
        "i = MatMulInteger(q, m, xz, mz) y = Cast<to=1>(i)",
        lambda x: x / X_SCALE @ C["m"].float(),
    ),
    (MS, "MatMulIntegerToFloat"): (
        "y = com.microsoft.MatMulIntegerToFloat(q, m, xs, ms, xz, mz, bias)",
        lambda x: x @ M,
    ),
    ("", "DequantizeLinear"): (
        "t = Transpose<perm=[0,1,3,2]>(q) y = DequantizeLinear(t, xs, xz)",
        lambda x: x.mT,
    ),
    (MS, "DequantizeLinear"): ("y = com.microsoft.DequantizeLinear(q, xs, xz)", lambda x: x),
    (MS, "QGemm"): (
        "t = Reshape(q, rows) y = com.microsoft.QGemm<transB=1, alpha=0.5>(t, xs, xz, mt, s, z, mb)",
        lambda x: 0.5 * x.reshape(12, 24) @ MT.mT,
    ),
}
FLOAT_INPUT = {
    (MS, "QuantizeLinear"): (
        "p = com.microsoft.QuantizeLinear(x, xs, xz) y = com.microsoft.DequantizeLinear(p, xs, xz)",
        lambda x: fake(x, X_SCALE, X_ZERO),
    ),
    (MS, "DynamicQuantizeMatMul"): (
        "y = com.microsoft.DynamicQuantizeMatMul(x, m, ms, mz, bias)",
        lambda x: x @ M,
    ),
    (MS, "MatMulNBits"): (
        "y = com.microsoft.MatMulNBits<K=6, N=5, bits=4, block_size=16>(x, packed, blocks)",
        _nibbles,
    ),
}
LAID_OUT = {(MS, "QLinearConv")}
"""What only files have that onnxruntime laid out for one machine; see the test of these."""


def gradient_of(body, rank=4, opset=21):
    text = f"""<ir_version: 10, opset_import: ["": {opset}, "{MS}": 1]>
        net (float[2,4,6,6] x) => (float[{", ".join("abcd"[:rank])}] y) {{ {body} }}"""
    proto = onnx.parser.parse_model(text)
    for name, array in {**CONSTANTS, "rows": np.array([12, 24])}.items():
        if any(name in node.input for node in proto.graph.node):
            proto.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(array), name))
    found = ir.to_proto(gradient(proto, "y", "x"))
    kinds = [node.op_type for node in proto.graph.node]
    assert [node.op_type for node in found.graph.node if not node.name.startswith("gradient")][
        : len(kinds)
    ] == kinds
    added = [node for node in found.graph.node if node.name.startswith("gradient")]
    assert not [node.op_type for node in added if node.domain or "Linear" in node.op_type]
    return onnxruntime.InferenceSession(found.SerializeToString(), quiet())


def check(session, function, step, tolerance=1e-5):
    """Compare values to `step` and gradients to `tolerance`."""
    x = (3 * RNG.standard_normal((2, 4, 6, 6))).astype(np.float32)
    t = torch.tensor(x, requires_grad=True)
    y = function(t)
    seed = RNG.standard_normal(y.shape).astype(np.float32)
    y.backward(torch.tensor(seed))
    got, dx = session.run(["y", "x_gradient"], {"x": x, "y_seed": seed})
    assert np.count_nonzero(t.grad) / x.size > 0.2
    np.testing.assert_allclose(got, y.detach().numpy(), atol=step, rtol=0)
    assert relative_error(dx, t.grad.numpy()) < tolerance


@pytest.mark.parametrize("key", STORING, ids=lambda key: key[1])
def test_operators_that_store_what_they_compute(key):
    body, function, ends = STORING[key]
    session = gradient_of(f"q = QuantizeLinear(x, xs, xz) p = {body} y = DequantizeLinear(p, ys, yz)")
    check(
        session,
        lambda t: fake(function(fake(t, X_SCALE, X_ZERO)), Y_SCALE, Y_ZERO, ends=ends),
        1.01 * Y_SCALE,  # runtimes round to either side
    )


@pytest.mark.parametrize("key", FLOATING, ids="".join)
def test_operators_on_stored_numbers(key):
    body, function = FLOATING[key]
    session = gradient_of(f"q = QuantizeLinear(x, xs, xz) {body}", rank=2 if key[1] == "QGemm" else 4)
    check(session, lambda t: function(fake(t, X_SCALE, X_ZERO)), 20)


@pytest.mark.parametrize("key", FLOAT_INPUT, ids="".join)
def test_operators_with_stored_weights(key):
    body, function = FLOAT_INPUT[key]
    check(gradient_of(body), function, 2)


def test_every_function_is_tested():
    tested = STORING.keys() | FLOATING.keys() | FLOAT_INPUT.keys() | LAID_OUT
    assert FUNCTIONS.keys() == tested


def test_dynamic_quantisation_counts_as_the_product_itself():
    body = """q, a, o = DynamicQuantizeLinear(x)
        i = MatMulInteger(q, m, o, mz) j = Cast<to=1>(i) k = Mul(a, ms) y = Mul(j, k)"""
    check(gradient_of(body), lambda t: t @ M, 1)
    lone = "q, a, o = DynamicQuantizeLinear(x) y = DequantizeLinear(q, a, o)"
    check(gradient_of(lone), lambda t: t * 1.0, 0.1)


# Whole networks, quantised by onnxruntime


NET = """<ir_version: 8, opset_import: ["": 17]>
net (float[N,3,12,12] image) => (float[N,5] scores) {
    a = Conv<kernel_shape=[3,3], pads=[1,1,1,1]>(image, w1, b1)
    ar = Relu(a)
    c = Conv<kernel_shape=[3,3], pads=[1,1,1,1]>(ar, w2, b2)
    cs = Sigmoid(c)
    cm = Mul(ar, cs)
    d = Concat<axis=1>(cm, ar)
    p = MaxPool<kernel_shape=[2,2], strides=[2,2]>(d)
    e = Conv<kernel_shape=[3,3], pads=[1,1,1,1]>(p, w3, b3)
    er = Relu(e)
    g = GlobalAveragePool(er)
    h = Flatten(g)
    scores = Gemm<transB=1>(h, w4, b4)
}"""


class Pictures:
    def __init__(self):
        rng = np.random.default_rng(0)
        self.left = [{"image": rng.standard_normal((1, 3, 12, 12)).astype(np.float32)} for _ in range(4)]

    def get_next(self):
        return self.left.pop() if self.left else None


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    proto = onnx.parser.parse_model(NET)
    rng = np.random.default_rng(1)
    shapes = {"w1": (6, 3, 3, 3), "w2": (6, 6, 3, 3), "w3": (8, 12, 3, 3), "w4": (5, 8)}
    for name, shape in shapes.items():
        values = rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
        proto.graph.initializer.append(onnx.numpy_helper.from_array(values.astype(np.float32), name))
        bias = 0.1 * rng.standard_normal(shape[0])
        proto.graph.initializer.append(onnx.numpy_helper.from_array(bias.astype(np.float32), f"b{name[1]}"))
    for node in proto.graph.node:
        node.name = f"node_{node.output[0]}"
    path = tmp_path_factory.mktemp("quantised") / "net.onnx"
    onnx.save(proto, path)
    return path


KINDS = [
    (kind, per_channel, activation, weights)
    for kind in ("QDQ", "QOperator")
    for per_channel, activation, weights in (
        (False, "QUInt8", "QInt8"),
        (True, "QUInt8", "QInt8"),
        (True, "QInt8", "QInt8"),
        (False, "QUInt8", "QUInt8"),
    )
]


def quantised(net, kind, per_channel, activation, weights):
    quantization = pytest.importorskip("onnxruntime.quantization")
    path = net.with_name(f"{kind}{per_channel}{activation}{weights}.onnx")
    quantization.quantize_static(
        net, path, Pictures(), quant_format=quantization.QuantFormat[kind], per_channel=per_channel,
        activation_type=quantization.QuantType[activation], weight_type=quantization.QuantType[weights],
        extra_options={"ActivationSymmetric": activation == "QInt8"},
    )  # fmt: skip
    return path


def twin(path, net, image):
    """Compute the network in torch, rounded where the file at `path` rounds; return its values by name."""
    numbers = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
    plain = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(net).graph.initializer}
    found = {}

    def q(name, value, ends=True):
        if f"{name}_scale" in numbers:
            zero = numbers[f"{name}_zero_point"]
            limits = np.iinfo(zero.dtype)
            value = fake(value, numbers[f"{name}_scale"], zero, limits.min, limits.max, ends)
        found[name] = value
        if value.requires_grad:
            value.retain_grad()
        return value

    def weights(number, stored):
        shape = [-1] + [1] * (plain[f"w{number}"].ndim - 1)
        scale = numbers[f"w{number}_scale"].reshape(shape if numbers[f"w{number}_scale"].size > 1 else [])
        zero = numbers[f"w{number}_zero_point"].astype(np.float32).reshape(scale.shape)
        w = (numbers[f"w{number}_quantized"] - zero) * scale
        step = numbers[f"{stored}_scale"] * scale.reshape(-1)
        return torch.tensor(w), torch.tensor(np.float32(np.rint(plain[f"b{number}"] / step) * step))

    def rectified(name, value):
        kept = f"{name}_scale" in numbers
        return q(f"{name}r", q(name, value, ends=False).relu(), ends=kept)

    x = q("image", torch.tensor(image, requires_grad=True))
    ar = rectified("a", f.conv2d(x, *weights(1, "image"), padding=1))
    after = "ar" if "ar_scale" in numbers else "a"
    c = q("c", f.conv2d(ar, *weights(2, after), padding=1), ends=False)
    d = q("d", torch.cat([q("cm", ar * q("cs", c.sigmoid())), ar], 1))
    p = q("p", f.max_pool2d(d, 2))
    er = rectified("e", f.conv2d(p, *weights(3, "p" if "p_scale" in numbers else "d"), padding=1))
    h = q("h", q("g", er.mean((2, 3), True)).flatten(1))
    found["logits"] = f.linear(h, *weights(4, "h" if "h_scale" in numbers else "g"))
    return found


@pytest.mark.parametrize(("kind", "per_channel", "activation", "weights"), KINDS)
def test_a_quantised_network_has_the_gradient_of_its_twin_in_torch(
    net, kind, per_channel, activation, weights
):
    path = quantised(net, kind, per_channel, activation, weights)
    image = Pictures().get_next()["image"]
    for layer in (None, "d", "image"):
        name = layer if layer in (None, "image") or kind == "QDQ" else f"{layer}_quantized"
        found = attach(path, layer=name, emit=["cam", "activations", "gradients"])
        session = onnxruntime.InferenceSession(ir.to_proto(found).SerializeToString(), quiet())
        given, a, da = session.run(
            ["scores", "cam_activations", "cam_gradients"], {"image": image, "cam_class": np.array([[2]])}
        )
        values = twin(path, net, image)
        values["logits"][0, 2].backward()
        # Measured: half a step of the scores, which the twin leaves unrounded; 3e-4 where a tie is rounded to
        # another side, 5e-8 elsewhere.
        np.testing.assert_allclose(given, values["logits"].detach().numpy(), atol=0.01)
        np.testing.assert_allclose(a, values[layer or "er"].detach().numpy(), atol=0.03)
        assert relative_error(da, values[layer or "er"].grad.numpy()) < 1e-3


def integer_operators(path, folder):
    """The operators on stored numbers that onnxruntime runs of the model itself."""
    options = quiet()
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    onnxruntime.InferenceSession(path, options)
    nodes = onnx.load(folder / "optimised.onnx").graph.node
    return sorted(n.op_type for n in nodes if n.op_type.startswith(("QLinear", "QGemm")))


@pytest.mark.parametrize("kind", ["QDQ", "QOperator"])
@pytest.mark.parametrize("layer", [None, "d", "image"])
def test_the_model_itself_goes_on_computing_with_integers(net, kind, layer, tmp_path):
    path = quantised(net, kind, True, "QUInt8", "QInt8")
    name = layer if layer in (None, "image") or kind == "QDQ" else f"{layer}_quantized"
    attach(path, tmp_path / "explained.onnx", layer=name)
    plain = integer_operators(path, tmp_path)
    assert {"QLinearConv", "QLinearMul", "QLinearConcat", "QGemm"} <= set(plain)
    assert integer_operators(tmp_path / "explained.onnx", tmp_path) == plain
    before, after = onnx.load(path).graph, onnx.load(tmp_path / "explained.onnx").graph
    own = [node for node in after.node if not node.name.startswith("cam/")]
    for was, now in zip(before.node, own, strict=True):
        assert (was.op_type, was.domain, was.input, was.output) == (
            now.op_type,
            now.domain,
            now.input,
            now.output,
        )
    assert not [node for node in after.node if node.name.startswith("cam/") and node.domain]


def test_layers_have_the_names_of_the_model(net):
    names = {}
    for kind in ("QDQ", "QOperator"):
        model = prepared(quantised(net, kind, True, "QUInt8", "QInt8"))
        source, logits = picture(model), scores(model).logits
        found = explainable(source, logits)
        names[kind] = [(layer.name, layer.operator) for layer in found]
        for layer in found:
            for name in (layer.name, layer.node):
                if layer.node:
                    assert locate(model, name, source, logits).value is layer.value
    assert (
        ("ar", "Conv") in names["QDQ"]
        and ("d", "Concat") in names["QDQ"]
        and ("p", "MaxPool") in names["QDQ"]
    )
    assert ("d_quantized", "QLinearConcat") in names["QOperator"]
    assert ("p_quantized", "MaxPool") in names["QOperator"]
    operators = {operator for found in names.values() for _, operator in found}
    assert "DequantizeLinear" not in operators


@pytest.mark.parametrize("per_channel", [False, True])
def test_a_dynamically_quantised_network(net, per_channel, tmp_path):
    quantization = pytest.importorskip("onnxruntime.quantization")
    path = tmp_path / "dynamic.onnx"
    quantization.quantize_dynamic(
        net, path, weight_type=quantization.QuantType.QUInt8, per_channel=per_channel
    )
    assert {"ConvInteger", "MatMulInteger"} & {node.op_type for node in onnx.load(path).graph.node}
    image = Pictures().get_next()["image"]
    found = []
    for model in (net, path):
        own = attach(model, layer="d", emit=["cam", "gradients"])
        session = onnxruntime.InferenceSession(ir.to_proto(own).SerializeToString(), quiet())
        found.append(session.run(["cam_gradients"], {"image": image, "cam_class": np.array([[2]])})[0])
    # Measured: 0.097, from Relus whose inputs round to the other side of 0.
    assert relative_error(found[1], found[0]) < 0.15


def test_a_score_beyond_its_range_is_explained(net):
    """The largest scores are those that are clamped; what is explained is the score before that."""
    path = quantised(net, "QOperator", False, "QUInt8", "QInt8")
    proto = onnx.load(path)
    for tensor in proto.graph.initializer:
        if tensor.name == "scores_scale":
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.float32(1e-4), tensor.name))
    session = onnxruntime.InferenceSession(ir.to_proto(attach(proto)).SerializeToString(), quiet())
    assert session.run(["cam"], Pictures().get_next())[0].any()


def test_files_that_onnxruntime_laid_out_for_this_machine(net, tmp_path):
    """Its last level of optimisation moves channels last; onnxruntime would not run such a file elsewhere."""
    path = quantised(net, "QOperator", True, "QUInt8", "QInt8")
    options = quiet()
    options.optimized_model_filepath = str(tmp_path / "laid_out.onnx")
    onnxruntime.InferenceSession(path, options)
    kinds = {(n.domain, n.op_type) for n in onnx.load(tmp_path / "laid_out.onnx").graph.node}
    image, maps = Pictures().get_next()["image"], []
    for model in (path, tmp_path / "laid_out.onnx"):
        session = onnxruntime.InferenceSession(ir.to_proto(attach(model)).SerializeToString(), quiet())
        maps.append(session.run(["cam"], {"image": image, "cam_class": np.array([[2]])})[0])
    assert (MS, "QLinearConv") in kinds or (MS, "NhwcMaxPool") not in kinds
    assert relative_error(maps[1], maps[0]) < 1e-5


def test_weights_of_four_bits_need_opset_21():
    """ONNX's own DequantizeLinear has them only from there on."""
    body = """net (float[2,4,6,6] x) => (float[a,b,c,d] y) {
        v = com.microsoft.DequantizeLinear(packed4, s4, z4) y = MatMul(x, v) }"""
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 18, "{MS}": 1]> {body}')
    numbers = RNG.integers(-8, 8, (6, 5)).astype(ml_dtypes.int4)
    for name, array in {
        "packed4": numbers,
        "s4": np.float32(0.1),
        "z4": np.zeros((), ml_dtypes.int4),
    }.items():
        proto.graph.initializer.append(ir.to_proto(ir.tensor(array, name=name)))
    found = ir.to_proto(gradient(proto, "y", "x"))
    session = onnxruntime.InferenceSession(found.SerializeToString(), quiet())
    x, seed = (RNG.standard_normal(shape).astype(np.float32) for shape in ((2, 4, 6, 6), (2, 4, 6, 5)))
    (dx,) = session.run(["x_gradient"], {"x": x, "y_seed": seed})
    assert relative_error(dx, seed @ (numbers.astype(np.float32) * np.float32(0.1)).T) < 1e-6


def test_half_precision(net):
    """Written by hand as the converters do: halves inside, the first Cast put last, out of order."""
    proto = onnx.load(net)
    for tensor in proto.graph.initializer:
        array = onnx.numpy_helper.to_array(tensor).astype(np.float16)
        tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    for node in proto.graph.node:
        node.input[:] = ["half" if name == "image" else name for name in node.input]
        node.output[:] = ["half_scores" if name == "scores" else name for name in node.output]
    for ends in (("image", "half", 10), ("half_scores", "scores", 1)):
        proto.graph.node.append(
            onnx.helper.make_node("Cast", ends[:1], ends[1:2], f"to_{ends[1]}", to=ends[2])
        )
    image, found = Pictures().get_next()["image"], []
    for model in (net, proto):
        own = attach(model, layer="d", emit=["cam", "gradients"])
        session = onnxruntime.InferenceSession(ir.to_proto(own).SerializeToString(), quiet())
        found.append(session.run(["cam", "cam_gradients"], {"image": image, "cam_class": np.array([[2]])}))
    for single, half in zip(*found, strict=True):
        assert relative_error(half, single) < 5e-3
