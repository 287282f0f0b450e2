"""Every method against numbers worked by hand on two channels of 2x2, and against the sum it stands for."""

import numpy as np
import onnx_ir as ir
import pytest

from onnxcam.emit import Emitter
from onnxcam.methods import METHODS
from tests.checks import reference

A = np.array([[[[1, 2], [3, 4]], [[0, 1], [-1, 2]]]], np.float64)  # [N=1, C=2, 2, 2]
DA = np.array([[[[[1, 0], [-1, 2]], [[2, -2], [0, 4]]]]], np.float64)  # [N=1, K=1, C=2, 2, 2]

BY_HAND = {
    # <g> = 2/4, 4/4: 0.5 A_0 + 1 A_1
    "gradcam": [[0.5, 2.0], [0.5, 4.0]],
    # S(g) = 2, 4
    "cam": [[2.0, 8.0], [2.0, 16.0]],
    # g_0 A_0 + g_1 A_1 = [[1, 0], [-3, 8]] + [[0, -2], [0, 8]], then ReLU
    "hirescam": [[1.0, 0.0], [0.0, 16.0]],
    # S(A) = 10, 2. w_0 = 1/(2+10) + 2/(2+20) = 23/132, w_1 = 2/(2+4) + 4/(2+8) = 11/15
    "gradcam++": [
        [23 / 132, 2 * 23 / 132 + 11 / 15],
        [0.0, 4 * 23 / 132 + 2 * 11 / 15],
    ],
}


def run(name, a, da):
    """Compute a map [N,K,h,w] from a [N,C,h,w] and da [N,K,C,h,w] through onnx.reference."""
    values = [
        ir.Value(name="a", shape=ir.Shape(["N", 1, *a.shape[1:]]), type=ir.TensorType(ir.DataType.DOUBLE)),
        ir.Value(
            name="da", shape=ir.Shape(["N", "K", *da.shape[2:]]), type=ir.TensorType(ir.DataType.DOUBLE)
        ),
    ]
    graph = ir.Graph(values, [], nodes=[], name="method", opset_imports={"": 18})
    op = Emitter(graph, 18, "test")
    graph.outputs.append(METHODS[name].function(op, *values))
    model = ir.to_proto(ir.Model(graph, ir_version=10))
    return reference(model).run(None, {"a": a[:, None], "da": da})[0]


@pytest.mark.parametrize("name", METHODS)
def test_by_hand(name):
    expected = np.array(BY_HAND[name])
    if name == "gradcam++":
        expected[1, 0] = max(3 * 23 / 132 - 11 / 15, 0)
    np.testing.assert_allclose(run(name, A, DA)[0, 0], expected, rtol=1e-12)


@pytest.mark.parametrize("name", METHODS)
def test_images_and_classes_do_not_mix(name):
    rng = np.random.default_rng(0)
    a, da = rng.standard_normal((3, 4, 5, 6)), rng.standard_normal((3, 2, 4, 5, 6))
    together = run(name, a, da)
    assert together.shape == (3, 2, 5, 6)
    for n in range(3):
        for k in range(2):
            alone = run(name, a[n : n + 1], da[n : n + 1, k : k + 1])
            np.testing.assert_allclose(together[n, k], alone[0, 0], rtol=1e-12, atol=1e-12)


def test_gradcam_plus_plus_is_the_papers_quotient():
    """alpha = g^2 / (2 g^2 + S(A) g^3) as it is printed, in float64, where no denominator is zero."""
    rng = np.random.default_rng(1)
    a, g = rng.random((1, 3, 4, 4)), rng.standard_normal((1, 1, 3, 4, 4))
    total = a.sum((2, 3), keepdims=True)[:, None]
    alpha = g**2 / (2 * g**2 + total * g**3)
    weights = (alpha * np.maximum(g, 0)).sum((3, 4))
    expected = np.maximum((weights[..., None, None] * a[:, None]).sum(2), 0)
    np.testing.assert_allclose(run("gradcam++", a, g), expected, rtol=1e-10)


def test_gradcam_plus_plus_of_a_zero_gradient_is_zero():
    assert not run("gradcam++", A, np.zeros_like(DA)).any()


def test_methods_agree_where_the_gradient_is_the_same_everywhere_in_a_plane():
    """On a GAP + Linear head Grad-CAM = HiResCAM = ReLU(CAM) / hw."""
    rng = np.random.default_rng(2)
    a = rng.standard_normal((2, 3, 4, 5))
    da = np.broadcast_to(rng.standard_normal((2, 2, 3, 1, 1)), (2, 2, 3, 4, 5))
    gradcam = run("gradcam", a, da)
    np.testing.assert_allclose(run("hirescam", a, da), gradcam, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(np.maximum(run("cam", a, da), 0) / 20, gradcam, rtol=1e-9, atol=1e-12)


def test_every_method_has_a_value_test():
    assert BY_HAND.keys() == METHODS.keys()


@pytest.mark.parametrize("name", METHODS)
def test_docstring_gives_the_equation_and_the_paper(name):
    assert any(str(year) in METHODS[name].summary for year in range(2014, 2027))
