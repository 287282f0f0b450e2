import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
import torch.nn.functional as f
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.reference.op_run import OpRun

from onnxcam.backward import gradient
from onnxcam.contrib import DOMAIN
from onnxcam.emit import Emitter
from onnxcam.errors import OnnxcamError
from onnxcam.onnxfile import check as check_model
from onnxcam.onnxfile import normalise
from onnxcam.vjp import RULES
from tests.checks import NEW_OPS, check_vjp, quiet, reference, relative_error

RNG = np.random.default_rng(4)


def normal(*shape):
    return RNG.standard_normal(shape)


# What each operator computes, in torch: the tests' reference, and through `_operator` also onnx.reference's.

ACTIVATIONS = {
    "": lambda x: x,
    "Celu": lambda x, alpha: f.celu(x, alpha),
    "Clip": lambda x, low, high: f.hardtanh(x, low, high),
    "Elu": lambda x, alpha: f.elu(x, alpha),
    "HardSigmoid": lambda x, alpha, beta: f.hardtanh(alpha * x + beta, 0, 1),
    "HardSwish": lambda x, *ignored: f.hardswish(x),
    "LeakyRelu": lambda x, alpha: f.leaky_relu(x, alpha),
    "Relu": torch.relu,
    "Selu": lambda x, alpha, gamma: gamma * f.elu(x, alpha),
    "Sigmoid": torch.sigmoid,
    "Softplus": f.softplus,
    "Softsign": f.softsign,
    "Tanh": torch.tanh,
    "ThresholdedRelu": lambda x, alpha: f.threshold(x, alpha, 0),
}


def fused_conv(x, w, b=None, z=None, *, activation="", activation_params=(), **attributes):
    n = x.ndim - 2
    convolve = {1: f.conv1d, 2: f.conv2d, 3: f.conv3d}[n]
    pads = attributes.get("pads", [0] * 2 * n)
    padded = f.pad(x, [p for i in reversed(range(n)) for p in (pads[i], pads[n + i])])
    y = convolve(
        padded,
        w,
        b,
        attributes.get("strides", 1),
        0,
        attributes.get("dilations", 1),
        attributes.get("group", 1),
    )
    return ACTIVATIONS[activation](y if z is None else y + z, *activation_params)


def fused_gemm(a, b, c=None, *, activation="", alpha=1.0, beta=1.0, transA=0, transB=0, **params):  # noqa: N803
    y = alpha * (a.T if transA else a) @ (b.T if transB else b)
    names = [f"activation_{name}" for name in ("alpha", "beta", "gamma")]
    return ACTIVATIONS[activation](
        y if c is None else y + beta * c, *[params[n] for n in names if n in params]
    )


def fused_matmul(a, b, *, alpha=1.0, transA=0, transB=0, transBatchA=0, transBatchB=0):  # noqa: N803
    def ordered(v, transposed, batch_transposed):
        v = v.movedim(0, -2) if batch_transposed else v
        return v.mT if transposed and v.ndim > 1 else v

    return alpha * (ordered(a, transA, transBatchA) @ ordered(b, transB, transBatchB))


def skip_layer_normalization(x, skip, scale, bias=None, offset=None, *, epsilon=1e-12):
    total = x + skip + (0 if offset is None else offset)
    y = f.layer_norm(total, total.shape[-1:], scale, bias, epsilon)
    mean = total.mean(-1, keepdim=True)
    return y, mean, (total.var(-1, keepdim=True, correction=0) + epsilon).rsqrt(), total


def skip_simplified_layer_normalization(x, skip, scale, offset=None, *, epsilon=1e-12):
    total = x + skip + (0 if offset is None else offset)
    y = f.rms_norm(total, total.shape[-1:], scale, epsilon)
    inverse = (total.square().mean(-1, keepdim=True) + epsilon).rsqrt()
    return y, torch.zeros_like(inverse), inverse, total


def simplified_layer_normalization(x, scale, *, axis=-1, epsilon=1e-5, stash_type=1):
    return f.rms_norm(x, x.shape[axis:], scale, epsilon)


OPERATORS = {
    (DOMAIN, "FusedConv"): fused_conv,
    (DOMAIN, "FusedGemm"): fused_gemm,
    (DOMAIN, "FusedMatMul"): fused_matmul,
    (DOMAIN, "TransposeMatMul"): fused_matmul,
    (DOMAIN, "Gelu"): f.gelu,
    (DOMAIN, "BiasGelu"): lambda x, bias: f.gelu(x + bias),
    (DOMAIN, "FastGelu"): lambda x, bias=None: f.gelu(x if bias is None else x + bias, approximate="tanh"),
    (DOMAIN, "QuickGelu"): lambda x, alpha=1.702: x * torch.sigmoid(alpha * x),
    (DOMAIN, "SkipLayerNormalization"): skip_layer_normalization,
    (DOMAIN, "SkipSimplifiedLayerNormalization"): skip_simplified_layer_normalization,
    ("", "SimplifiedLayerNormalization"): simplified_layer_normalization,
}


def _operator(domain, name, function):
    def run(self, *inputs, **attributes):
        found = function(*[None if x is None else torch.tensor(x) for x in inputs], **attributes)
        found = found if isinstance(found, tuple) else (found,)
        return tuple(y.numpy() for y in found[: len(self.onnx_node.output)])

    return type(name, (OpRun,), {"op_domain": domain, "_run": run})


NEW_OPS.extend(_operator(domain, name, function) for (domain, name), function in OPERATORS.items())


def check(
    op_type,
    inputs,
    *,
    domain=DOMAIN,
    symbolic=True,
    constant=(),
    outputs=(0,),
    count=1,
    wrt=None,
    **attributes,
):
    check_vjp(
        op_type,
        inputs,
        against=lambda *xs: OPERATORS[domain, op_type](*xs, **attributes),
        domain=domain,
        symbolic=symbolic,
        constant=constant,
        outputs=outputs,
        count=count,
        wrt=wrt,
        **attributes,
    )


def test_every_rule_of_contrib_is_tested_here():
    from onnxcam.vjp import contrib

    assert OPERATORS.keys() == {
        k for k, rule in RULES.items() if rule.function.__module__ == contrib.__name__
    }


CONV_ACTIVATIONS = [
    ("", []),
    ("Relu", []),
    ("Sigmoid", []),
    ("Tanh", []),
    ("LeakyRelu", [0.25]),
    ("LeakyRelu", [-0.25]),
    ("Clip", [-0.5, 1.5]),
    ("HardSigmoid", [0.25, 0.5]),
    ("HardSwish", []),
    ("HardSwish", [0.125, 0.5]),  # onnxruntime requires or forbids nothing here, and reads nothing
]


@pytest.mark.parametrize(("activation", "params"), CONV_ACTIVATIONS)
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("symbolic", [False, True])
def test_fused_conv(activation, params, add, symbolic):
    x, w, b = 2 * normal(2, 4, 7, 6), normal(6, 2, 3, 2), normal(6)
    extra = [normal(2, 6, 4, 3)] if add else []
    attributes = {"activation": activation} if activation else {}
    if params:
        attributes["activation_params"] = params
    check(
        "FusedConv",
        [x, w, b, *extra],
        symbolic=symbolic,
        kernel_shape=[3, 2],
        strides=[2, 2],
        pads=[1, 0, 2, 1],
        group=2,
        **attributes,
    )


def test_fused_conv_with_constant_weights_and_without_bias():
    x, w, z = normal(2, 3, 7), normal(4, 3, 3), normal(2, 4, 5)
    check("FusedConv", [x, w], constant=[1], activation="Relu", kernel_shape=[3])
    check("FusedConv", [x, w, None, z], constant=[1], activation="Relu", kernel_shape=[3], dilations=[1])


GEMM_ACTIVATIONS = [
    ("Relu", ()),
    ("Sigmoid", ()),
    ("Tanh", ()),
    ("Softplus", ()),
    ("Softsign", ()),
    ("LeakyRelu", (0.25,)),
    ("LeakyRelu", (-0.25,)),
    ("Elu", (0.5,)),
    ("Celu", (0.5,)),
    ("ThresholdedRelu", (0.5,)),
    ("HardSigmoid", (0.25, 0.5)),
    ("Selu", (1.5, 1.25)),
]


@pytest.mark.parametrize(("activation", "params"), GEMM_ACTIVATIONS)
@pytest.mark.parametrize("symbolic", [False, True])
@pytest.mark.parametrize("trans", [(0, 0), (1, 0), (0, 1)])
def test_fused_gemm(activation, params, symbolic, trans):
    a, b = 2 * normal(*[(3, 4), (4, 3)][trans[0]]), normal(*[(4, 5), (5, 4)][trans[1]])
    names = ["alpha", "gamma"] if activation == "Selu" else ["alpha", "beta"]
    given = {f"activation_{name}": value for name, value in zip(names, params, strict=False)}
    check(
        "FusedGemm",
        [a, b, normal(5)],
        symbolic=symbolic,
        activation=activation,
        alpha=0.5,
        beta=1.5,
        transA=trans[0],
        transB=trans[1],
        **given,
    )


def test_fused_gemm_without_c():
    check("FusedGemm", [normal(3, 4), normal(4, 5)], activation="Tanh")
    check("FusedGemm", [normal(3, 4), normal(4, 5)], activation="Softplus", constant=[1])


@settings(deadline=None, derandomize=True, max_examples=40)
@given(st.data())
def test_fused_matmul(data):
    m, k, n = (data.draw(st.integers(1, 4), label) for label in "mkn")
    batch = data.draw(st.lists(st.integers(1, 3), max_size=2))
    trans, batch_trans = ([data.draw(st.booleans()) for _ in "ab"] for _ in range(2))
    shapes = []
    for i, (rows, columns) in enumerate([(m, k), (k, n)]):
        first, last = (columns, rows) if trans[i] else (rows, columns)
        batch_trans[i] = batch_trans[i] and bool(batch)
        shapes.append([first, *batch, last] if batch_trans[i] else [*batch, first, last])
    for i in range(2):
        if batch and not any(batch_trans) and data.draw(st.booleans()):
            shapes[i] = shapes[i][data.draw(st.integers(0, len(batch))) :]
            break
    check(
        data.draw(st.sampled_from(["FusedMatMul", "TransposeMatMul"]))
        if not any(batch_trans)
        else "FusedMatMul",
        [normal(*shape) for shape in shapes],
        symbolic=data.draw(st.booleans()),
        constant=data.draw(st.sampled_from([[], [0], [1]])),
        alpha=data.draw(st.sampled_from([1.0, 0.5])),
        transA=int(trans[0]),
        transB=int(trans[1]),
        **(
            {"transBatchA": int(batch_trans[0]), "transBatchB": int(batch_trans[1])}
            if any(batch_trans)
            else {}
        ),
    )


def test_fused_matmul_of_vectors():
    check("FusedMatMul", [normal(3), normal(3, 4)], alpha=0.5)
    check("FusedMatMul", [normal(2, 3), normal(3)], alpha=0.5)


@pytest.mark.parametrize("symbolic", [False, True])
@pytest.mark.parametrize("constant", [[], [1]])
def test_gelus(symbolic, constant):
    x, bias = 2 * normal(2, 3, 4), normal(4)
    check("Gelu", [x], symbolic=symbolic)
    check("BiasGelu", [x, bias], symbolic=symbolic, constant=constant)
    check("FastGelu", [x], symbolic=symbolic)
    check("FastGelu", [x, bias], symbolic=symbolic, constant=constant)
    check("QuickGelu", [x], symbolic=symbolic)
    check("QuickGelu", [x], symbolic=symbolic, alpha=1.0)


@pytest.mark.parametrize("symbolic", [False, True])
@pytest.mark.parametrize("skip", [(2, 3, 8), (1, 3, 8), (3, 8)])
@pytest.mark.parametrize("constant", [[], [2, 3, 4]])
def test_skip_layer_normalization(symbolic, skip, constant):
    inputs = [normal(2, 3, 8), normal(*skip), normal(8), normal(8), normal(8)]
    for count, outputs in [(1, [0]), (4, [0, 3]), (4, [0])]:
        check(
            "SkipLayerNormalization",
            inputs,
            symbolic=symbolic,
            constant=constant,
            count=count,
            outputs=outputs,
            wrt=[0, 1] if 3 in outputs else None,
            epsilon=2.0**-10,
        )
    check("SkipLayerNormalization", [*inputs[:3], None, inputs[4]], symbolic=symbolic)
    check("SkipLayerNormalization", inputs[:3], symbolic=symbolic)
    check("SkipLayerNormalization", inputs, count=4, outputs=[3], wrt=[0, 1, 4])


@pytest.mark.parametrize("symbolic", [False, True])
@pytest.mark.parametrize("skip", [(2, 3, 8), (1, 3, 8), (3, 8)])
@pytest.mark.parametrize("constant", [[], [2, 3]])
def test_skip_simplified_layer_normalization(symbolic, skip, constant):
    inputs = [normal(2, 3, 8), normal(*skip), normal(8), normal(8)]
    for count, outputs in [(1, [0]), (4, [0, 3]), (4, [0])]:
        check(
            "SkipSimplifiedLayerNormalization",
            inputs,
            symbolic=symbolic,
            constant=constant,
            count=count,
            outputs=outputs,
            wrt=[0, 1] if 3 in outputs else None,
            epsilon=2.0**-10,
        )
    check("SkipSimplifiedLayerNormalization", inputs[:3], symbolic=symbolic)
    check("SkipSimplifiedLayerNormalization", inputs, count=4, outputs=[3], wrt=[0, 1, 3])


@pytest.mark.parametrize("symbolic", [False, True])
@pytest.mark.parametrize("constant", [[], [1]])
def test_simplified_layer_normalization(symbolic, constant):
    inputs = [normal(2, 3, 8), normal(8)]
    check("SimplifiedLayerNormalization", inputs, domain="", symbolic=symbolic, constant=constant)
    inputs[1] = normal(3, 8)
    check("SimplifiedLayerNormalization", inputs, domain="", symbolic=symbolic, axis=-2, epsilon=0.5)


@pytest.mark.parametrize(
    ("op_type", "attributes", "message"),
    [
        ("FusedConv", {"activation": "Erf"}, "FusedConv with the activation Erf"),
        ("FusedGemm", {"activation": "ScaledTanh"}, "FusedGemm with the activation ScaledTanh"),
        ("FusedConv", {"activation": "Clip", "activation_params": [0.0]}, "Clip lacks low, high"),
        ("FusedGemm", {"activation": "Elu"}, "Elu lacks alpha"),
    ],
)
def test_refusals_name_the_activation(op_type, attributes, message):
    shapes = [(1, 2, 3), (2, 2, 1)] if op_type == "FusedConv" else [(2, 3), (3, 4)]
    with pytest.raises(OnnxcamError, match=message):
        _gradient_model(_one_node(op_type, shapes, 1, attributes))


def test_there_is_no_gradient_through_the_mean_of_a_skip_layer_normalization():
    model = _one_node("SkipLayerNormalization", [(2, 3, 4), (2, 3, 4), (4,)], 2, {})
    model.graph.output[0].name = "y1"
    with pytest.raises(OnnxcamError, match="no gradient through the mean"):
        _gradient_model(model)


@pytest.mark.parametrize("op_type", ["SkipLayerNormalization", "SkipSimplifiedLayerNormalization"])
def test_both_outputs_of_a_skip_normalisation_carry_gradient(op_type):
    """As in a transformer, where the sum goes on as the residual."""
    arrays = [normal(2, 3, 8), normal(2, 3, 8), normal(8)]
    model = _one_node(op_type, [a.shape for a in arrays], 4, {"epsilon": 2.0**-10}, "DOUBLE")
    model.graph.node.append(onnx.helper.make_node("Mul", ["y0", "y3"], ["z"]))
    model.graph.output[0].name = "z"
    seed = normal(2, 3, 8)
    names = [f"x{i}" for i in range(3)]
    feeds = dict(zip(names, arrays, strict=True))
    (got,) = reference(ir.to_proto(_gradient_model(model))).run(["dx"], {**feeds, "seed": seed})
    x, *others = (torch.tensor(a, requires_grad=i == 0) for i, a in enumerate(arrays))
    y, _, _, total = OPERATORS[DOMAIN, op_type](x, *others, epsilon=2.0**-10)
    (y * total * torch.tensor(seed)).sum().backward()
    assert relative_error(got, x.grad.numpy()) < 1e-12


def _one_node(op_type, shapes, count, attributes, dtype="FLOAT"):
    kind = onnx.TensorProto.DataType.Value(dtype)
    names = [f"x{i}" for i in range(len(shapes))], [f"y{k}" for k in range(count)]
    node = onnx.helper.make_node(op_type, *names, "n", domain=DOMAIN, **attributes)
    inputs = [onnx.helper.make_tensor_value_info(f"x{i}", kind, shape) for i, shape in enumerate(shapes)]
    graph = onnx.helper.make_graph(
        [node], "g", inputs, [onnx.helper.make_tensor_value_info("y0", kind, [None] * len(shapes[0]))]
    )
    imports = [onnx.helper.make_opsetid("", 20), onnx.helper.make_opsetid(DOMAIN, 1)]
    return onnx.helper.make_model(graph, opset_imports=imports, ir_version=10)


def _gradient_model(proto):
    """Normalise a model and add the gradient of its output, times an input ``seed``, as the output ``dx``."""
    model = normalise(ir.from_proto(proto))
    x, y = model.graph.inputs[0], model.graph.outputs[0]
    for node in model.graph:
        for value in node.outputs[:1]:  # the others may be statistics, which nothing reads
            assert value.dtype is not None and value.shape is not None, value.name
    seed = ir.Value(name="seed", shape=y.shape, type=y.type)
    op = Emitter(model.graph, model.graph.opset_imports[""], "test")
    dx = gradient(op, y, seed, x)
    model.graph.inputs.append(seed)
    result = op.Identity(dx)
    result.name = "dx"
    model.graph.outputs.append(result)
    op.remove_dead([])
    return model


# Whole files: what onnxruntime's optimiser saves has the gradient of what it was given.

CONV_NET = """
net (float[n,3,8,8] x) => (float[n,5] y) {
  c1 = Conv<kernel_shape=[3,3], pads=[1,1,1,1]>(x, w1, b1)
  a1 = Relu(c1)
  c2 = Conv<kernel_shape=[3,3], strides=[2,2], pads=[1,1,1,1]>(a1, w2, b2)
  a2 = LeakyRelu<alpha=0.25>(c2)
  c3 = Conv<kernel_shape=[3,3], pads=[1,1,1,1]>(a2, w2, b2)
  a3 = Clip(c3, zero, six)
  c4 = Conv<kernel_shape=[3,3], pads=[1,1,1,1]>(a3, w2, b2)
  a4 = HardSigmoid<alpha=0.25>(c4)
  c5 = Conv<kernel_shape=[3,3], pads=[1,1,1,1]>(a4, w2, b2)
  g5 = Sigmoid(c5)
  a5 = Mul(c5, g5)
  c6 = Conv<kernel_shape=[3,3], pads=[1,1,1,1]>(a5, w2, b2)
  a6 = Tanh(c6)
  p = GlobalAveragePool(a6)
  f = Flatten(p)
  h = Gemm(f, w3, b2)
  s = Softplus(h)
  y = Gemm(s, w4)
}"""
TRANSFORMER = """
net (float[n,6,8] x) => (float[n,5] y) {
  l1 = LayerNormalization<axis=-1>(x, scale, bias)
  q0 = MatMul(l1, wq)
  q1 = Reshape(q0, heads)
  q = Transpose<perm=[0,2,1,3]>(q1)
  k = Transpose<perm=[0,2,3,1]>(q1)
  s = MatMul(q, k)
  s1 = Mul(s, half)
  p = Softmax<axis=-1>(s1)
  m = MatMul(p, q)
  o = Transpose<perm=[0,2,1,3]>(m)
  o1 = Reshape(o, joined)
  o2 = MatMul(o1, wq)
  o3 = Add(o2, bias)
  r1 = Add(x, o3)
  l2 = LayerNormalization<axis=-1>(r1, scale, bias)
  f1 = MatMul(l2, wf)
  f2 = Add(f1, bf)
  e1 = Div(f2, root2)
  e2 = Erf(e1)
  e3 = Add(e2, one)
  e4 = Mul(f2, e3)
  e5 = Mul(e4, half)
  f3 = MatMul(e5, wg)
  r2 = Add(r1, f3)
  l3 = LayerNormalization<axis=-1>(r2, scale, bias)
  g1 = MatMul(l3, wf)
  d1 = Div(g1, root2)
  d2 = Erf(d1)
  d3 = Add(d2, one)
  d4 = Mul(g1, d3)
  d5 = Mul(d4, half)
  g2 = MatMul(d5, wg)
  t = Transpose<perm=[0,2,1]>(g2)
  u = MatMul(g2, t)
  u1 = Mul(u, half)
  v = MatMul(u1, g2)
  w = ReduceMean<keepdims=0>(v, axis)
  y = Gemm(w, w5)
}"""
RMS_13 = """
net (float[n,6,8] x) => (float[n,6,8] y) {
  a1 = Pow(x, two)
  a2 = ReduceMean<axes=[-1]>(a1)
  a3 = Add(a2, epsilon)
  a4 = Sqrt(a3)
  a5 = Div(x, a4)
  a6 = Mul(scale, a5)
  h = MatMul(a6, wq)
  y = Add(x, h)
}"""
LAYER_13 = """
net (float[n,6,8] x) => (float[n,6,8] y) {
  m = ReduceMean<axes=[-1]>(x)
  c = Sub(x, m)
  a1 = Pow(c, two)
  a2 = ReduceMean<axes=[-1]>(a1)
  a3 = Add(a2, epsilon)
  a4 = Sqrt(a3)
  a5 = Div(c, a4)
  a6 = Mul(a5, scale)
  h = Add(a6, bias)
  y = MatMul(h, wq)
}"""
WEIGHTS = {
    "w1": normal(4, 3, 3, 3),
    "b1": normal(4),
    "w2": 0.3 * normal(4, 4, 3, 3),
    "b2": normal(4),
    "w3": normal(4, 4),
    "w4": normal(4, 5),
    "w5": normal(8, 5),
    "scale": normal(8),
    "bias": normal(8),
    "wq": normal(8, 8),
    "wf": normal(8, 16),
    "bf": normal(16),
    "wg": normal(16, 8),
    "zero": np.array(0.0),
    "six": np.array(6.0),
    "half": np.array(0.5),
    "one": np.array(1.0),
    "two": np.array(2.0),
    "root2": np.array(np.sqrt(2)),
    "epsilon": np.array(1e-5),
    "heads": np.array([0, 0, 2, 4]),
    "joined": np.array([0, 0, 8]),
    "axis": np.array([1]),
}


@pytest.mark.parametrize(
    ("text", "opset", "expected"),
    [
        (CONV_NET, 18, {"FusedConv", "QuickGelu", "FusedGemm"}),
        (CONV_NET, 13, {"FusedConv", "QuickGelu", "FusedGemm"}),
        (TRANSFORMER, 18, {"FusedMatMul", "BiasGelu", "SkipLayerNormalization", "Gelu"}),
        (RMS_13, 13, {"SimplifiedLayerNormalization"}),
        (LAYER_13, 13, {"LayerNormalization"}),
    ],
)
def test_optimised_files(text, opset, expected, tmp_path):
    plain = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": {opset}]>' + text)
    for name, weight in WEIGHTS.items():
        if any(name in node.input for node in plain.graph.node):
            dtype = np.float32 if weight.dtype.kind == "f" else np.int64
            plain.graph.initializer.append(onnx.numpy_helper.from_array(weight.astype(dtype), name))
    options = quiet()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    onnxruntime.InferenceSession(plain.SerializeToString(), options)
    optimised = onnx.load(tmp_path / "optimised.onnx")
    assert expected <= {node.op_type for node in optimised.graph.node}

    shape = [2, *[d.dim_value for d in plain.graph.input[0].type.tensor_type.shape.dim[1:]]]
    x = normal(*shape).astype(np.float32)
    found = []
    for proto in (plain, optimised):
        model = _gradient_model(proto)
        check_model(model)
        session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), quiet())
        y = session.get_outputs()[0].shape
        seed = np.random.default_rng(0).standard_normal([2, *y[1:]]).astype(np.float32)
        found.append(session.run(None, {"x": x, "seed": seed}))
    for got, want in zip(found[1], found[0], strict=True):
        assert relative_error(got, want) < 1e-5
