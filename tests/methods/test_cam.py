"""Maps worked by hand on two channels of 2x2, and what methods have in common on a linear head."""

import numpy as np
import pytest
import torch

from onnxcam.methods import METHODS
from tests.graphs import build, explained, run
from tests.methods.nets import CLASSES, HEAD, LAYER, Net, model, pictures

# The scores are S(g A): the gradient of the first class is DA, wherever.
SUMS = """(double[N,2,2,2] x) => (double[N,3] scores) <double[8,3] g>
{ f = Flatten(x) scores = MatMul(f, g) }"""
A = np.array([[[1, 2], [3, 4]], [[0, 1], [-1, 2]]], np.float64)
DA = np.array([[[1, 0], [-1, 2]], [[2, -2], [0, 4]]], np.float64)

# S(A) = 10, 2. w_0 = 1/(2+10) + 2/(2+20) = 23/132, w_1 = 2/(2+4) + 4/(2+8) = 11/15
PLUS_PLUS = [[23 / 132, 2 * 23 / 132 + 11 / 15], [0.0, 4 * 23 / 132 + 2 * 11 / 15]]
# g_0 A_0 + g_1 A_1 = [[1, 0], [-3, 8]] + [[0, -2], [0, 8]]
PRODUCT = [[1.0, -2.0], [-3.0, 16.0]]
BY_HAND = {
    # <g> = 2/4, 4/4: 0.5 A_0 + 1 A_1
    "gradcam": [[0.5, 2.0], [0.5, 4.0]],
    "gradcam++": PLUS_PLUS,
    "smoothgradcam++": PLUS_PLUS,  # the same gradient at every noisy picture
    # S(g A) / S(A) = 6/10, 6/2; 1.8 - 3 at the third position
    "xgradcam": [[0.6, 4.2], [0.0, 8.4]],
    "hirescam": [[1.0, 0.0], [0.0, 16.0]],
    # relu of [[1, 0], [-3, 8]] and of [[0, -2], [0, 8]]
    "elementwise": [[1.0, 0.0], [0.0, 16.0]],
    # relu(g) = [[1, 0], [0, 2]], [[2, 0], [0, 4]]
    "layercam": [[1.0, 0.0], [0.0, 16.0]],
    "shapleycam": [[0.5, 2.0], [0.5, 4.0]],  # no second derivative
    # y = 12, without a channel 6: (A_0 + A_1) / 2
    "ablationcam": [[0.5, 1.5], [1.0, 3.0]],
    "reciprocam": PRODUCT,
    "saliency": [[2.0, 2.0], [1.0, 4.0]],
    "smoothgrad": [[2.0, 2.0], [1.0, 4.0]],
    "inputxgradient": PRODUCT,
    "integratedgradients": PRODUCT,
    # |g x| / 8, the two channels added; no biases
    "fullgrad": [[1 / 8, 2 / 8], [3 / 8, 16 / 8]],
}


@pytest.mark.parametrize("name", BY_HAND)
def test_by_hand(name):
    g = np.random.default_rng(0).standard_normal((8, 3))
    g[:, 0] = DA.reshape(-1)
    # The second picture is the first times 3: the first must not notice.
    x = np.stack([A, 3 * A])
    layer = {} if METHODS[name].at_picture else {"layer": "x"}
    added = explained(build(SUMS, g=g), method=name, emit=("cam",), **layer)
    got = run(added, {"x": x, "cam_class": np.array([[2, 0]])}, by="ref")["cam"]
    np.testing.assert_allclose(got[0, 1], BY_HAND[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", METHODS)
def test_docstring_gives_the_equation_and_the_year(name):
    assert any(str(year) in METHODS[name].summary for year in range(2013, 2027))
    assert METHODS[name].cost


def test_gradcam_plus_plus_of_a_zero_gradient_is_zero():
    added = explained(build(SUMS, g=np.zeros((8, 3))), method="gradcam++", layer="x", emit=("cam",))
    assert not run(added, {"x": A[None]}, by="ref")["cam"].any()


def all_classes(name):
    """The maps of all four classes of three pictures by HEAD, with the activations, in float64."""
    added = explained(model(HEAD), method=name, layer=LAYER, emit=("cam", "activations"))
    return added, run(added, {"x": pictures(), "cam_class": np.array([[0, 1, 2, 3]])}, by="ref")


def test_on_a_linear_head_the_maps_are_one_product_of_its_weights_and_the_activation():
    added, got = all_classes("cam")
    fc = Net(model(HEAD)).w["fc"].numpy()
    wanted = np.einsum("kc,nchw->nkhw", fc, got["cam_activations"])
    np.testing.assert_allclose(got["cam"], wanted, rtol=1e-6, atol=1e-7)
    operators = [node.op_type for node in added.graph.node]
    assert "Scan" not in operators
    # One product in the map for all classes; the reverse walk is a row of the weights.
    assert sum(n.op_type == "MatMul" and n.name.startswith("cam/cam/") for n in added.graph.node) == 1


@pytest.mark.parametrize("name", ["gradcam", "hirescam", "xgradcam", "shapleycam"])
def test_on_a_linear_head_these_are_cam(name):
    """Grad-CAM = HiResCAM = XGrad-CAM = ReLU(CAM) / hw."""
    got, plain = all_classes(name)[1]["cam"], all_classes("cam")[1]["cam"]
    np.testing.assert_allclose(got, np.maximum(plain, 0) / 12, rtol=1e-6, atol=1e-7)


def test_on_a_linear_head_ablationcam_has_a_closed_form():
    """y - y_k = W_ck <A_k>."""
    _, got = all_classes("ablationcam")
    a, net = got["cam_activations"], Net(model(HEAD))
    fc, y = net.w["fc"].numpy(), net.y(torch.tensor(pictures())).numpy()
    w = fc[None] * a.mean((2, 3))[:, None] / y[:, :, None]
    wanted = np.maximum(np.einsum("nkc,nchw->nkhw", w, a), 0)
    np.testing.assert_allclose(got["cam"], wanted, rtol=1e-6, atol=1e-6)


def test_classes_of_one_run_are_those_of_single_runs():
    """All classes' maps on a linear head, and in a loop, against one class at a time."""
    for text in (HEAD, None):
        proto = model(text, "float") if text else model(dtype="float")
        added = explained(proto, layer=LAYER, emit=("cam",))
        x = pictures(dtype=np.float32)
        together = run(added, {"x": x, "cam_class": CLASSES})["cam"]
        for n in range(3):
            for k in range(2):
                feeds = {"x": x[n : n + 1], "cam_class": CLASSES[n : n + 1, k : k + 1]}
                np.testing.assert_allclose(
                    together[n, k], run(added, feeds)["cam"][0, 0], rtol=2e-5, atol=1e-6
                )
