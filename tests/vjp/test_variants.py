"""The portable forms of rules give the gradient, to the last tie."""

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import onnxcam
from onnxcam.vjp import PORTABLE, VARIANTS, under
from tests.checks import check_vjp
from tests.graphs import build, run
from tests.vjp.test_pool import TORCH_MAX, any_geometry, geometry, normal, torch_max_pool, windows

BOTH = pytest.mark.parametrize("symbolic", [False, True])
RULES = under(PORTABLE)


def test_a_later_variant_comes_first_and_the_table_stays():
    assert under("guided", "deconvnet")["", "Relu"] is VARIANTS["deconvnet"]["", "Relu"]
    assert under(None, "guided")["", "Relu"] is VARIANTS["guided"]["", "Relu"]
    assert onnxcam.vjp.RULES["", "MaxPool"] is not RULES["", "MaxPool"]


@BOTH
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("shape", "attributes"), TORCH_MAX)
def test_max_pool_without_indices(shape, attributes, ties, symbolic):
    """Negative numbers: what lies around the picture never counts. Of equals the first takes it all."""
    x = np.random.default_rng(0).integers(-3, -1, shape).astype(float) if ties else normal(*shape) - 3
    check_vjp(
        "MaxPool", [x], against=torch_max_pool(attributes), symbolic=symbolic, rules=RULES, **attributes
    )


@any_geometry
@given(geometry=geometry(), symbolic=st.booleans())
def test_any_max_pool_without_indices(geometry, symbolic):
    shape, attributes = geometry
    x = np.random.default_rng(0).integers(0, 2, shape).astype(float)
    numbers = windows(np.arange(x.size).reshape(shape), -1, **attributes)
    first = windows(x, -np.inf, **attributes).argmax(-1)[..., None]
    chosen = torch.tensor(np.take_along_axis(numbers, first, -1)[..., 0])
    check_vjp(
        "MaxPool",
        [x],
        against=lambda x: x.flatten()[chosen],
        symbolic=symbolic,
        opset=22,
        rules=RULES,
        **attributes,
    )


@pytest.mark.parametrize("constant", [[], [1]])
def test_square_weights_that_are_copied(constant):
    x, w = normal(2, 3, 5, 6), normal(3, 3, 2, 2)
    f = torch.nn.functional
    check_vjp("Conv", [x, w], against=f.conv2d, constant=constant, rules=RULES)
    check_vjp("ConvTranspose", [x, w], against=f.conv_transpose2d, constant=constant, rules=RULES)
    check_vjp("MatMul", [x, normal(6, 6)], against=torch.matmul, constant=constant, rules=RULES)
    check_vjp("MatMul", [x, normal(3, 6, 6)], against=torch.matmul, constant=constant, rules=RULES)
    a, b, c = normal(4, 3), normal(3, 3), normal(3)
    gemm = {"against": lambda a, b, c: a @ b.T + c, "transB": 1}
    check_vjp("Gemm", [a, b, c], constant=constant, rules=RULES, **gemm)


def test_only_square_weights_are_copied():
    graph = """(float[N,3,6,6] x) => (float[N,4] y) <float[3,3,3,3] v, float[4,3,6,6] w>
    {
        a = Conv<kernel_shape=[3,3], pads=[1,1,1,1]>(x, v)
        b = Conv<kernel_shape=[6,6]>(a, w)
        y = Flatten(b)
    }"""
    found = onnxcam.gradient(build(graph), "y", "x", portable=True)
    read = {node.op_type: [v.name for v in node.inputs] for node in found.graph if node.op_type == "Max"}
    assert read == {"Max": ["v", "v"]}


def test_gradient_portable_writes_no_indices():
    graph = """(float[N,3,6,6] x) => (float[N,27] y)
    { a = MaxPool<kernel_shape=[2,2], strides=[2,2]>(x) y = Flatten(a) }"""
    x = np.random.default_rng(0).integers(0, 3, (2, 3, 6, 6)).astype(np.float32)
    seed = np.random.default_rng(1).standard_normal((2, 27)).astype(np.float32)
    tensor = torch.tensor(x, requires_grad=True)
    (torch.nn.functional.max_pool2d(tensor, 2).flatten(1) * torch.tensor(seed)).sum().backward()
    found = onnxcam.gradient(build(graph), "y", "x", portable=True)
    assert not {"ScatterElements", "Mod"} & {node.op_type for node in found.graph}
    assert all(len(node.outputs) == 1 for node in found.graph if node.op_type == "MaxPool")
    got = run(ir.to_proto(found), {"x": x, "y_seed": seed})["x_gradient"]
    np.testing.assert_array_equal(got, tensor.grad.numpy())
