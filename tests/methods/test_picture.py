"""Methods at the picture: what must add up, and what is refused."""

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from onnxcam import layers, onnxfile
from onnxcam.attaching import attach
from onnxcam.biases import biases
from onnxcam.emit import Emitter
from onnxcam.errors import OnnxcamError
from onnxcam.grid import Grid
from onnxcam.probe import Probe
from onnxcam.targets import add_seeds
from tests.checks import reference, relative_error
from tests.graphs import build, explained, run
from tests.methods.nets import CLASSES, Net, model, pictures
from tests.test_replay import TOKENS, tokens_in_torch

# Every kind of bias, in a net that is linear piece by piece.
BIASES = """(double[N,2,6,6] x) => (double[N,4] scores)
<double[3,2,3,3] w1, double[3] b1, double[3] scale, double[3] shift, double[3] mean, double[3] variance,
 double[3,4,2,2] w2, double[4] b2, double[4,1,1] added, double[1,4,1,1] taken, double[6] line, double[4,5] fc,
 double[5] c, double[5,4] last, double[4] bias, int64[1] one = {1}>
{
    c1 = Conv<kernel_shape=[3,3]>(x, w1, b1)
    n1 = BatchNormalization<epsilon=0.01>(c1, scale, shift, mean, variance)
    r1 = LeakyRelu(n1)
    m1 = MaxPool<kernel_shape=[2,2], strides=[2,2]>(r1)
    c2 = ConvTranspose<kernel_shape=[2,2], strides=[2,2]>(m1, w2, b2)
    s2 = Add(added, c2)
    s3 = Sub(s2, taken)
    r3 = Relu(s3)
    s4 = Sub(added, r3)
    s5 = Sum(s4, added, taken)
    p = GlobalAveragePool(s5)
    f = Flatten(p)
    g = Gemm<beta=0.5>(f, fc, c)
    r = Relu(g)
    h = MatMul(r, last)
    scores = Add(h, bias)
}"""
ADDING = ["c1", "n1", "c2", "s2", "s3", "s4", "s5", "g", "scores"]


def with_biases():
    rng = np.random.default_rng(2)
    given = {"variance": rng.uniform(0.5, 2, 3)}
    sizes = {"b1": 3, "shift": 3, "mean": 3, "b2": 4, "c": 5, "bias": 4, "added": (4, 1, 1)}
    given |= {name: rng.standard_normal(size) for name, size in sizes.items()}
    return build(BIASES, taken=rng.standard_normal((1, 4, 1, 1)), **given)


def test_the_biases_that_are_found():
    own = onnxfile.normalise(ir.from_proto(with_biases()))
    op = Emitter(own.graph, 18, "test")
    found = biases(op, layers.scores(own).logits, layers.picture(own))
    assert [value.name for value, _ in found] == ADDING


def test_input_times_gradient_and_all_biases_times_theirs_add_up_to_the_score():
    """The completeness of full gradients: Srinivas and Fleuret 2019, proposition 1."""
    own = onnxfile.normalise(ir.from_proto(with_biases()))
    op = Emitter(own.graph, 18, "test")
    x, scores = layers.picture(own), layers.scores(own).output
    seeds = add_seeds(op, "class", scores, scores, optional=False)
    probe = Probe(op, x, Grid("NCHW", 6, 6), x, Grid("NCHW", 6, 6), scores, seeds)
    found = probe.biases()
    assert [grid is None for _, _, grid in found] == [name in ("g", "scores") for name in ADDING]

    def of(dx, *dbs):
        parts = [
            op.Mul(dx, op.Unsqueeze(x, [1])),
            *(op.Mul(d, b) for d, (_, b, _) in zip(dbs, found, strict=True)),
        ]
        return [op.ReduceSum(op.Reshape(part, [0, 0, -1]), [2], keepdims=0) for part in parts]

    sums = probe.per_sum_at([x, *(value for value, _, _ in found)], of)
    for i, part in enumerate(sums):
        result = op.Identity(part)
        result.name = f"part{i}"
        own.graph.outputs.append(result)
    picture = np.random.default_rng(3).standard_normal((3, 2, 6, 6))
    y, *parts = reference(ir.to_proto(own)).run(None, {"x": picture, "cam_class": CLASSES})
    assert all(np.abs(part).max() > 1e-3 for part in parts), "every bias has a part in it"
    np.testing.assert_allclose(sum(parts), np.take_along_axis(y, CLASSES, 1), rtol=1e-12, atol=1e-13)


def test_integrated_gradients_add_up_to_the_difference_of_the_scores():
    """Sundararajan et al. 2017, proposition 1; with kinks the rule of 50 steps leaves a few thousandths."""
    proto, x = model(), pictures()
    added = explained(proto, method="integratedgradients", emit=("cam", "attributions"))
    got = run(added, {"x": x, "cam_class": CLASSES}, by="ref")
    net = Net(proto)
    rise = (net.y(torch.tensor(x)) - net.y(torch.zeros(1, *x.shape[1:], dtype=torch.float64))).numpy()
    wanted = np.take_along_axis(rise, CLASSES, 1)
    np.testing.assert_allclose(got["cam"].sum((2, 3)), wanted, atol=5e-3)
    np.testing.assert_allclose(got["cam_attributions"].reshape(3, 2, 2, 6, 8).sum(2), got["cam"], atol=1e-6)


SMOOTH = """(double[N,2,6,8] x) => (double[N,4] scores) <double[3,2,3,3] w1, double[3,4] fc>
{
    c1 = Conv<kernel_shape=[3,3]>(x, w1)
    s1 = Tanh(c1)
    p = GlobalAveragePool(s1)
    f = Flatten(p)
    scores = MatMul(f, fc)
}"""


def test_integrated_gradients_of_a_smooth_net_add_up_closely():
    """The midpoint rule errs by about the third derivative / (24 * 50^2)."""
    added = explained(build(SMOOTH), method="integratedgradients", emit=("cam",))
    got = run(added, {"x": pictures(), "cam_class": CLASSES}, by="ref")
    wanted = np.take_along_axis(got["scores"], CLASSES, 1)  # y(0) = 0
    np.testing.assert_allclose(got["cam"].sum((2, 3)), wanted, atol=2e-4 * np.abs(wanted).max())


@pytest.mark.parametrize(
    "method",
    ["saliency", "smoothgrad", "guidedbackprop", "deconvnet", "guidedgradcam"],
)
def test_attributions_are_signed_and_the_map_is_the_largest_over_the_channels(method):
    layer = {"layer": "r2"} if method == "guidedgradcam" else {}
    added = explained(model(dtype="float"), method=method, emit=("cam", "attributions"), **layer)
    x = pictures(dtype=np.float32)
    got = run(added, {"x": x, "cam_class": CLASSES})
    terms = got["cam_attributions"]
    assert terms.shape == (6, 2, 6, 8)
    assert (terms < 0).any()
    assert (terms > 0).any()
    np.testing.assert_allclose(np.abs(terms).max(1).reshape(3, 2, 6, 8), got["cam"], rtol=1e-6)


@pytest.mark.parametrize("method", ["guidedbackprop", "deconvnet", "guidedgradcam"])
def test_without_a_rectifier_nothing_would_be_guided(method):
    with pytest.raises(OnnxcamError, match=f"{method} needs a rectifier .*but there is none; use smoothgrad"):
        attach(build(SMOOTH), method=method)


def test_a_layer_of_the_users_is_refused_where_the_method_looks_at_the_picture():
    for method in ("saliency", "fullgrad"):
        with pytest.raises(OnnxcamError, match=f"{method} looks at the picture itself; leave the layer out"):
            attach(model(), method=method, layer="r2")


def test_a_bias_inside_an_operator_is_refused_by_fullgrad():
    proto = model(dtype="float")
    proto.graph.node[4].domain = "com.microsoft"
    proto.graph.node[4].op_type = "FusedConv"
    proto.opset_import.add(domain="com.microsoft", version=1)
    with pytest.raises(
        OnnxcamError, match=r"fullgrad needs .*\(FusedConv\) keeps one inside; use inputxgrad"
    ):
        attach(proto, method="fullgrad")


@pytest.mark.parametrize("rule", ["guided", "deconvnet"])
@pytest.mark.parametrize("high", ["", ", six"])
def test_clip_from_zero_is_a_rectifier(rule, high):
    """ReLU6: guided where 0 < z < 6 too, deconvnet wherever what comes back is positive."""
    text = f"""(double[N,1,1,4] x) => (double[N,2] scores)
    <double[4,2] fc, double zero = {{0}}, double six = {{6}}>
    {{ s = Clip(x, zero{high}) f = Flatten(s) scores = MatMul(f, fc) }}"""
    fc = np.array([[1.0, -1.0], [-2.0, 2.0], [3.0, -3.0], [4.0, 0.0]])
    method = {"guided": "guidedbackprop"}.get(rule, rule)
    added = explained(build(text, fc=fc), method=method, emit=("cam",))
    x = np.array([-1.0, 2, 3, 7]).reshape(1, 1, 1, 4)
    got = run(added, {"x": x, "cam_class": np.array([[0]])}, by="ref")["cam"].reshape(4)
    wanted = {"guided": [0, 0, 3, 0 if high else 4], "deconvnet": [1, 0, 3, 4]}[rule]
    np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("method", ["guidedbackprop", "deconvnet"])
def test_what_lets_both_signs_pass_keeps_its_gradient(method):
    """LeakyRelu and a Clip from -1, behind a Relu."""
    text = """(double[N,1,1,4] x) => (double[N,2] scores) <double[4,2] fc, double low = {-1}, double[4,4] eye>
    { r = Relu(x) l = LeakyRelu<alpha=0.5>(r) m = MatMul(l, eye) c = Clip(m, low) f = Flatten(c)
      scores = MatMul(f, fc) }"""
    fc = np.array([[1.0, 0], [-2.0, 0], [3.0, 0], [4.0, 0]])
    eye = np.diag([1.0, -1.0, -1.0, 1.0])
    added = explained(build(text, fc=fc, eye=eye), method=method, emit=("cam",))
    x = np.array([-1.0, 0.5, 0.25, 3]).reshape(1, 1, 1, 4)
    got = run(added, {"x": x, "cam_class": np.array([[0]])}, by="ref")["cam"].reshape(4)
    # Before the Relu 1, 2, -3, 4 arrive; at its zero LeakyRelu has the slope 1/2.
    np.testing.assert_array_equal(got, [0 if method == "guidedbackprop" else 0.5, 2, 0, 4])


def test_fullgrad_of_tokens_drops_those_beside_the_plane():
    """The one bias is a layer normalisation's; a class token comes before the 4 x 3 of the plane."""
    proto = build(TOKENS, dtype="double", scale=np.linspace(0.5, 2, 5), shift=np.linspace(-1, 1, 5))
    x = np.random.default_rng(0).standard_normal((3, 2, 8, 6))
    added = explained(proto, method="fullgrad", emit=("cam",))
    got = run(added, {"x": x, "cam_class": CLASSES}, by="ref")["cam"]

    def psi(t):
        t = t.abs()
        t = (t - t.min()) / (t.max() - t.min())
        return F.interpolate(t[None], (8, 6), mode="bilinear", align_corners=False)[0].sum(0)

    for n in range(3):
        for k, c in enumerate(CLASSES[n]):
            one = torch.tensor(x[n : n + 1]).requires_grad_()
            layer, tail = tokens_in_torch(proto, one)
            dx, dl = torch.autograd.grad(tail(layer)[0, c], [one, layer])
            terms = dl[0, 1:] * torch.linspace(-1, 1, 5, dtype=torch.float64)
            wanted = psi((dx * one)[0].detach()) + psi(terms.T.reshape(5, 4, 3))
            assert relative_error(got[n, k], wanted) <= 1e-7
