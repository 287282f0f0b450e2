import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
import torch.nn.functional as f
from hypothesis import given, settings
from hypothesis import strategies as st

import onnxcam
from onnxcam.backward import gradient
from onnxcam.emit import Emitter
from onnxcam.vjp import RULES
from onnxcam.vjp.shapes import step
from tests.checks import check_vjp, dtypes_of_gradients, gradients_in, reference

RNG = np.random.default_rng(3)
SELU_ALPHA, SELU_GAMMA = 1.67326319217681884765625, 1.05070102214813232421875


def normal(*shape):
    return RNG.standard_normal(shape)


def elu(x, alpha):
    return torch.where(x > 0, x, alpha * torch.expm1(x))


def selu(x, alpha=SELU_ALPHA, gamma=SELU_GAMMA):
    return gamma * elu(x, alpha)


def celu(x, alpha):
    return x.clamp(min=0) + (alpha * torch.expm1(x / alpha)).clamp(max=0)


def swish(x, alpha=1.0):
    return x * torch.sigmoid(alpha * x)


def shrink(x, bias=0.0, lambd=0.5):
    return torch.where(x < -lambd, x + bias, torch.where(x > lambd, x - bias, 0.0))


# Attribute values are numbers that float32, in which ONNX stores them, holds exactly.
CASES = [
    ("Relu", {}, torch.relu),
    ("LeakyRelu", {}, lambda x: f.leaky_relu(x, np.float32(0.01).item())),
    ("LeakyRelu", {"alpha": 0.25}, lambda x: f.leaky_relu(x, 0.25)),
    ("LeakyRelu", {"alpha": 0.0}, lambda x: f.leaky_relu(x, 0.0)),
    ("LeakyRelu", {"alpha": -0.5}, lambda x: f.leaky_relu(x, -0.5)),
    ("ThresholdedRelu", {}, lambda x: f.threshold(x, 1.0, 0.0)),
    ("ThresholdedRelu", {"alpha": 0.0}, lambda x: f.threshold(x, 0.0, 0.0)),
    ("ThresholdedRelu", {"alpha": -1.0}, lambda x: f.threshold(x, -1.0, 0.0)),
    ("Shrink", {}, shrink),
    ("Shrink", {"lambd": 0.25, "bias": 0.25}, lambda x: f.softshrink(x, 0.25)),
    ("Shrink", {"lambd": -1.0, "bias": 0.5}, lambda x: shrink(x, 0.5, -1.0)),
    ("Sigmoid", {}, torch.sigmoid),
    ("Tanh", {}, torch.tanh),
    ("HardSigmoid", {}, lambda x: (0.2 * x + 0.5).clamp(0, 1)),
    ("HardSigmoid", {"alpha": 0.5, "beta": 0.25}, lambda x: (0.5 * x + 0.25).clamp(0, 1)),
    ("HardSigmoid", {"alpha": -0.5}, lambda x: (-0.5 * x + 0.5).clamp(0, 1)),
    ("HardSwish", {}, f.hardswish),
    ("Elu", {}, f.elu),
    ("Elu", {"alpha": 1.75}, lambda x: elu(x, 1.75)),
    ("Elu", {"alpha": -0.5}, lambda x: elu(x, -0.5)),
    ("Celu", {}, f.celu),
    ("Celu", {"alpha": 1.75}, lambda x: celu(x, 1.75)),
    ("Celu", {"alpha": -1.75}, lambda x: celu(x, -1.75)),
    ("Selu", {}, selu),
    ("Selu", {"alpha": 0.5, "gamma": 2.0}, lambda x: selu(x, 0.5, 2.0)),
    ("Selu", {"alpha": -0.5, "gamma": 2.0}, lambda x: selu(x, -0.5, 2.0)),
    ("Selu", {"alpha": 0.5, "gamma": -2.0}, lambda x: selu(x, 0.5, -2.0)),
    ("Gelu", {}, f.gelu),
    ("Gelu", {"approximate": "tanh"}, lambda x: f.gelu(x, approximate="tanh")),
    ("Swish", {}, swish),
    ("Swish", {"alpha": 1.75}, lambda x: swish(x, 1.75)),
    ("Swish", {"alpha": -0.5}, lambda x: swish(x, -0.5)),
    ("Softplus", {}, f.softplus),
    ("Softsign", {}, f.softsign),
    ("Mish", {}, f.mish),
]


@pytest.mark.parametrize(("op_type", "attributes", "function"), CASES)
@pytest.mark.parametrize("symbolic", [False, True])
def test_activation(op_type, attributes, function, symbolic):
    newer = {"Celu": 28, "Swish": 24}  # the first that has float64
    check_vjp(
        op_type,
        [3 * normal(4, 5, 3)],
        against=function,
        symbolic=symbolic,
        opset=newer.get(op_type, 20),
        ort_opset=20 if op_type == "Celu" else None,
        **attributes,
    )


@pytest.mark.parametrize(
    ("op_type", "attributes", "function", "points"),
    [
        ("Relu", {}, torch.relu, [0]),
        ("LeakyRelu", {"alpha": 0.25}, lambda x: f.leaky_relu(x, 0.25), [0]),
        ("ThresholdedRelu", {"alpha": 0.5}, lambda x: f.threshold(x, 0.5, 0), [0.5]),
        ("Shrink", {"bias": 0.5}, lambda x: f.softshrink(x, 0.5), [-0.5, 0.5]),
        ("HardSigmoid", {"alpha": 0.5}, lambda x: f.hardtanh(x * 0.5 + 0.5, 0, 1), [-1, 1]),
        ("HardSwish", {}, f.hardswish, [-3, 3]),
        ("Elu", {"alpha": 0.5}, lambda x: f.elu(x, 0.5), [0]),
        ("Celu", {"alpha": 0.5}, lambda x: f.celu(x, 0.5), [0]),
        ("Selu", {"alpha": 0.5, "gamma": 2.0}, lambda x: 2 * f.elu(x, 0.5), [0]),
        ("Softsign", {}, f.softsign, [0]),
    ],
)
def test_at_kinks_as_in_torch(op_type, attributes, function, points):
    x = torch.tensor(points, dtype=torch.float64, requires_grad=True)
    function(x).sum().backward()
    (got,) = gradients_in(
        np.float64, op_type, [x.detach().numpy()], np.ones(len(points)), opset=28, **attributes
    )
    np.testing.assert_array_equal(got, x.grad.numpy())


@pytest.mark.parametrize("slope", [(2, 3, 4), (3, 1), (1,), (), (4,)])
@pytest.mark.parametrize("symbolic", [False, True])
@pytest.mark.parametrize("constant", [[], [1]])
def test_prelu(slope, symbolic, constant):
    def prelu(x, w):
        return torch.where(x > 0, x, w * x)

    check_vjp("PRelu", [normal(2, 3, 4), normal(*slope)], against=prelu, symbolic=symbolic, constant=constant)


def test_prelu_at_zero_as_in_torch():
    x, w = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in ([0.0, 0.0], [0.25]))
    f.prelu(x, w).sum().backward()
    got = gradients_in(np.float64, "PRelu", [x.detach().numpy(), w.detach().numpy()], np.ones(2))
    np.testing.assert_array_equal(got[0], x.grad.numpy())
    np.testing.assert_array_equal(got[1], w.grad.numpy())


@pytest.mark.parametrize(
    ("low", "high"), [(-0.5, 0.75), (-0.5, None), (None, 0.75), (None, None), (0.75, -0.5)]
)
@pytest.mark.parametrize("symbolic", [False, True])
@pytest.mark.parametrize("constant", [[], [1, 2], [1], [2]])
def test_clip(low, high, symbolic, constant):
    """Bounds are weights or computed while the model runs; they may cross."""
    bounds = [None if bound is None else np.array(bound) for bound in (low, high)]
    constant = [i for i in constant if bounds[i - 1] is not None]

    def clamp(x, low, high):
        return x.clone() if low is None and high is None else torch.clamp(x, low, high)

    check_vjp("Clip", [2 * normal(3, 4), *bounds], against=clamp, symbolic=symbolic, constant=constant)


def test_clip_is_flat_at_its_bounds_as_relu6():
    x = torch.tensor([0.0, 6.0, 3.0], dtype=torch.float64, requires_grad=True)
    f.relu6(x).sum().backward()
    got = gradients_in(np.float64, "Clip", [x.detach().numpy(), np.array(0.0), np.array(6.0)], np.ones(3))
    np.testing.assert_array_equal(got[0], x.grad.numpy())
    np.testing.assert_array_equal(got[1:], [0, 0])


def test_clip_between_equal_bounds_as_in_torch():
    tensors = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in ([-1.0, 1.0, 3.0], 1.0, 1.0)]
    torch.clamp(*tensors).sum().backward()
    arrays = [t.detach().numpy() for t in tensors]
    got = gradients_in(np.float64, "Clip", arrays, np.ones(3))
    for mine, tensor in zip(got[1:], tensors[1:], strict=True):
        np.testing.assert_array_equal(mine, tensor.grad.numpy())


@pytest.mark.parametrize("alpha", [1.0, 1.75])
@pytest.mark.parametrize("symbolic", [False, True])
def test_swiglu(alpha, symbolic):
    """New in opset 28, which onnxruntime does not have yet."""

    def gated(a, b):
        return swish(a, alpha) * b

    inputs = [normal(3, 4), normal(3, 4)]
    check_vjp("SwiGLU", inputs, against=gated, symbolic=symbolic, opset=28, ort=False, alpha=alpha)


@pytest.mark.parametrize(
    ("op_type", "function"), [("Softmax", torch.softmax), ("LogSoftmax", torch.log_softmax)]
)
@settings(deadline=None, derandomize=True, max_examples=20)
@given(st.data())
def test_softmax(op_type, function, data):
    shape = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    axis = data.draw(st.none() | st.integers(-len(shape), len(shape) - 1))
    symbolic = data.draw(st.booleans())
    attributes = {} if axis is None else {"axis": axis}

    def softmax(x):
        return function(x, -1 if axis is None else axis)

    check_vjp(op_type, [3 * normal(*shape)], against=softmax, symbolic=symbolic, **attributes)


@pytest.mark.parametrize("op_type", ["Softmax", "LogSoftmax"])
@settings(deadline=None, derandomize=True, max_examples=15)
@given(st.data())
def test_softmax_before_opset_13(op_type, data):
    """Over all axes from the one named on, which is the second by default."""
    shape = data.draw(st.lists(st.integers(1, 4), min_size=2, max_size=4))
    axis = data.draw(st.none() | st.integers(0, len(shape) - 1))
    sizes = [f"d{i}" for i in range(len(shape))] if data.draw(st.booleans()) else shape
    given = "" if axis is None else f"<axis = {axis}>"
    model = onnx.parser.parse_model(
        f"""<ir_version: 7, opset_import: ["": {data.draw(st.sampled_from([9, 11, 12]))}]>
        m (double[{",".join(map(str, sizes))}] x) => (double[{",".join(map(str, sizes))}] y)
        {{ y = {op_type}{given}(x) }}"""
    )
    x, seed = (torch.tensor(3 * normal(*shape)) for _ in range(2))
    x.requires_grad_()
    rows = x.flatten(1 if axis is None else axis) if axis != 0 else x.flatten()
    function = torch.softmax if op_type == "Softmax" else torch.log_softmax
    function(rows, -1).reshape(shape).backward(seed)
    gradient = ir.to_proto(onnxcam.gradient(model, "y", "x"))
    got = reference(gradient).run(["x_gradient"], {"x": x.detach().numpy(), "y_seed": seed.numpy()})[0]
    np.testing.assert_allclose(got, x.grad.numpy(), rtol=0, atol=1e-12)


def test_hardmax_has_no_gradient():
    x = ir.Value(name="x", shape=ir.Shape([2, 3]), type=ir.TensorType(ir.DataType.FLOAT))
    op = Emitter(ir.Graph([x], [], nodes=[], opset_imports={"": 20}), 20, "test")
    y = op.Hardmax(x, axis=0)
    assert gradient(op, y, y, x) is None


SMOOTH_FAR_OUT = {
    "Gelu": ({}, 1, 0),
    "Swish": ({}, 1, 0),
    "Softplus": ({}, 1, 0),
    "Softsign": ({}, 0, 0),
    "Mish": ({}, 1, 0),
    "HardSwish": ({}, 1, 0),
    "Elu": ({}, 1, 0),
    "Celu": ({"alpha": 0.5}, 1, 0),
    "Sigmoid": ({}, 0, 0),
    "Tanh": ({}, 0, 0),
}


@pytest.mark.parametrize("op_type", [*SMOOTH_FAR_OUT, "Gelu tanh"])
def test_float16_far_from_zero(op_type):
    """x^2 and x^3 overflow there; the slope is a plain 1 or 0."""
    attributes, right, left = SMOOTH_FAR_OUT[op_type.removesuffix(" tanh")]
    if op_type.endswith("tanh"):
        attributes = {"approximate": "tanh"}
    x = np.array([300.0, 6e4, -300.0, -6e4])
    # onnx.reference's own Sigmoid computes both of its branches everywhere.
    with np.errstate(over="ignore", invalid="ignore"):
        (got,) = gradients_in(
            np.float16, op_type.removesuffix(" tanh"), [x], np.ones(4), opset=28, **attributes
        )
    np.testing.assert_allclose(got, [right, right, left, left], atol=2e-3)


@pytest.mark.parametrize(
    "op_type", sorted({case[0] for case in CASES} | {"PRelu", "SwiGLU", "Softmax", "LogSoftmax"})
)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_types(op_type, dtype):
    opset = {"Celu": 28, "SwiGLU": 28, "Swish": 24}.get(op_type, 22)
    if op_type == "Shrink":  # the one that has no bfloat16
        dtype = "float16"
    count = 2 if op_type in ("PRelu", "SwiGLU") else 1
    assert dtypes_of_gradients(op_type, [(2, 3)] * count, dtype, opset) == {dtype}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_types_of_clip(dtype):
    assert dtypes_of_gradients("Clip", [(2, 3), (), ()], dtype, 18) == {dtype}


def test_every_rule_of_activation_is_tested_here():
    from onnxcam.vjp import activation

    own = {name for (domain, name), rule in RULES.items() if rule.function.__module__ == activation.__name__}
    assert own == {case[0] for case in CASES} | {
        "PRelu",
        "Clip",
        "SwiGLU",
        "Softmax",
        "LogSoftmax",
        "Hardmax",
    }


@pytest.mark.parametrize("rises", [True, False])
@pytest.mark.parametrize(
    ("dtype", "bound"),
    [
        (dtype, bound)
        for dtype in ("float16", "float32", "float64")
        for bound in (0.0, 1.0, -3.0, 6.0, 0.1, 1e10)
        if bound < float(np.finfo(dtype).max)
    ],
)
@pytest.mark.parametrize("portable", [False, True])
def test_a_step_is_one_beyond_the_bound_and_zero_up_to_it(rises, bound, dtype, portable):
    kind = np.dtype(dtype)
    at = kind.type(bound)
    near = [np.nextafter(at, kind.type(to)) for to in (-np.inf, np.inf)] if bound else [-1e-4, 1e-4]
    y = np.array([at, *near, -np.inf, np.inf, -1e4, 1e4, 0, 1, -1, bound - 1, bound + 1], kind)
    value = ir.Value(name="y", shape=ir.Shape(y.shape), type=ir.TensorType(ir.DataType.from_numpy(kind)))
    graph = ir.Graph([value], [], nodes=[], name="g", opset_imports={"": 18})
    op = Emitter(graph, 18, "test", portable)
    graph.outputs.append(op.Identity(step(op, value, bound, rises)))
    proto = ir.to_proto(ir.Model(graph, ir_version=10))
    # OpenVINO takes a beta of 0 for a missing one.
    assert all(a.f for node in proto.graph.node for a in node.attribute if a.name == "beta")
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    found = session.run(None, {"y": y})[0]
    wanted = y > at if rises else y < at
    assert found.dtype == kind
    np.testing.assert_array_equal(found, wanted.astype(kind))
