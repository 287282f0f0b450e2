"""What is made of a method's map: evidence, smoothing, several layers; and what makes no sense."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from onnxcam.attaching import attach
from onnxcam.errors import OnnxcamError
from onnxcam.methods import METHODS
from tests.checks import relative_error
from tests.graphs import explained, run
from tests.methods.nets import CLASSES, LAYER, TEXT, Net, model, pictures
from tests.methods.test_values import EXPECTED, first_direction
from tests.test_attaching import check_added, every_node


def maps(by="ref", emit=("cam",), proto=None, classes=CLASSES, **options):
    """All outputs for three pictures and two classes of each, in float64 (onnx.reference) or float32."""
    dtype = {"ref": "double", "ort": "float"}[by]
    proto = model(dtype=dtype) if proto is None else proto
    if not METHODS[options["method"]].at_picture:
        options.setdefault("layer", LAYER)
    x = pictures(dtype=np.float64 if by == "ref" else np.float32)
    return run(explained(proto, emit=emit, **options), {"x": x, "cam_class": classes}, by=by)


def each_alone(expected):
    """``expected(net, x, k)`` for each picture and class by itself: [3,2,h,w]."""
    net, x = Net(model()), torch.tensor(pictures())
    found = [[expected(net, x[n : n + 1], k) for k in row] for n, row in enumerate(CLASSES)]
    return np.array([[np.asarray(cam) for cam in row] for row in found])


def weighed(net, x, k):
    """Grad-CAM's sum before the ReLU."""
    a, g = net.da(x, k)
    return (g.mean((1, 2), keepdim=True) * a).sum(0)


KEPT = {
    "for": lambda m: np.maximum(m, 0),
    "against": lambda m: np.minimum(m, 0),
    "both": lambda m: m,
    "counterfactual": lambda m: np.maximum(-m, 0),
}


@pytest.mark.parametrize("evidence", KEPT)
@pytest.mark.parametrize(
    ("method", "plain"),
    [
        ("gradcam", weighed),
        ("reciprocam", EXPECTED["reciprocam"]),
        ("inputxgradient", EXPECTED["inputxgradient"]),
    ],
)
def test_evidence(evidence, method, plain):
    got = maps(method=method, evidence=evidence)["cam"]
    wanted = KEPT[evidence](each_alone(plain))
    assert np.abs(wanted).max() > 0
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-7 * np.abs(wanted).max())


def test_heat_maps_of_both_signs_keep_zero_where_it_is():
    got = maps("ort", ("cam", "heatmap"), method="inputxgradient", evidence="both")
    largest = np.abs(got["cam"]).max((2, 3), keepdims=True)
    np.testing.assert_allclose(got["cam_heatmap"], got["cam"] / largest, rtol=1e-5, atol=1e-6)


UNSIGNED = [name for name, method in METHODS.items() if method.unsigned]


@pytest.mark.parametrize("method", UNSIGNED)
def test_there_is_nothing_against_a_class_in_a_map_without_sign(method):
    if method != "legrad":  # its own test needs a transformer; it is a mean of what a ReLU gives
        proto = model(dtype="float")
        layer = {} if METHODS[method].at_picture else {"layer": LAYER}
        with pytest.raises(OnnxcamError, match=f"{method} has no sign, .*'counterfactual'"):
            attach(proto, method=method, evidence="against", **layer)
        assert maps("ort", method=method, evidence="both")["cam"].min() >= 0


@pytest.mark.parametrize("method", [n for n, m in METHODS.items() if m.gives == "map" and n != "legrad"])
def test_a_map_that_is_no_sum_has_no_attributions_and_no_components(method):
    layer = {} if METHODS[method].at_picture else {"layer": LAYER}
    with pytest.raises(OnnxcamError, match=f"{method} is not a sum over channels: it has no attributions"):
        attach(model(), method=method, emit=["cam", "attributions"], **layer)
    with pytest.raises(
        OnnxcamError, match=f"{method} is not a sum over channels, which 'eigen' would smooth"
    ):
        attach(model(), method=method, smooth=["eigen"], **layer)


@pytest.mark.parametrize("method", ["gradcam", "saliency", "elementwise", "guidedgradcam"])
def test_eigen_smoothing_is_the_first_component_of_the_terms(method):
    got = maps(method=method, smooth=["eigen"], evidence="both", emit=("cam", "attributions"))
    terms = got["cam_attributions"]
    for i, cam in enumerate(got["cam"].reshape(6, *got["cam"].shape[2:])):
        assert relative_error(cam, first_direction(torch.tensor(terms[i]))) <= 1e-6


def test_eigen_smoothing_of_gradcam_against_torch():
    def smooth(net, x, k):
        a, g = net.da(x, k)
        return np.maximum(first_direction(g.mean((1, 2), keepdim=True) * a), 0)

    np.testing.assert_allclose(
        maps(method="gradcam", smooth=["eigen"])["cam"], each_alone(smooth), rtol=1e-5, atol=1e-8
    )


@pytest.mark.parametrize("method", ["gradcam", "reciprocam", "saliency", "scorecam"])
def test_smoothing_by_augmentation(method):
    """The mean over the picture and its mirror image, each at three strengths, mirrored back."""

    def smooth(net, x, k):
        found = []
        for factor in (0.9, 1.0, 1.1):
            found.append(np.asarray(EXPECTED[method](net, x * factor, k)))
            found.append(np.asarray(EXPECTED[method](net, x.flip(3) * factor, k))[:, ::-1])
        return np.mean(found, 0)

    wanted = each_alone(smooth)
    got = maps(method=method, smooth=["augmentation"])["cam"]
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-7 * np.abs(wanted).max())


def at(layer, net, x, k):
    """Grad-CAM at any of the net's values."""
    v = net.values(x.clone().requires_grad_())
    v |= net.rest(v["r2"])
    a = v[layer]
    (g,) = torch.autograd.grad(v["scores"][0, k], a)
    return F.relu((g.mean((2, 3), keepdim=True) * a).sum(1))[0].detach()


@pytest.mark.parametrize("fuse", ["mean", "max", "product"])
def test_the_maps_of_several_layers_are_scaled_resized_and_joined(fuse):
    def joined(net, x, k):
        cams = [at(layer, net, x, k) for layer in ("n1", "r2", "c3")]
        full = [
            F.interpolate((c / c.max().clamp(min=1e-300))[None, None], (6, 8), mode="bilinear")[0, 0]
            for c in cams
        ]
        stacked = torch.stack(full)
        return {"mean": stacked.mean(0), "max": stacked.amax(0), "product": stacked.prod(0)}[fuse]

    wanted = each_alone(joined)
    got = maps(method="gradcam", layer=["n1", "r2", "c3"], fuse=fuse)["cam"]
    np.testing.assert_allclose(got, wanted, rtol=0, atol=2e-7)


def test_several_layers_at_the_size_of_the_picture():
    """Guided Grad-CAM's maps have it whatever the layers' sizes."""
    got = maps("ort", method="guidedgradcam", layer=["r2", "c3"], fuse="max", emit=("cam", "heatmap"))
    alone = [maps("ort", method="guidedgradcam", layer=layer)["cam"] for layer in ("r2", "c3")]
    scaled = [cam / np.maximum(cam.max((2, 3), keepdims=True), 1e-30) for cam in alone]
    np.testing.assert_allclose(got["cam"], np.maximum(*scaled), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["gradients", "attributions", "activations"])
def test_what_belongs_to_one_layer_is_refused_for_several(kind):
    with pytest.raises(OnnxcamError, match="one layer"):
        attach(model(), method="gradcam", layer=["n1", "r2"], emit=["cam", kind])


@pytest.mark.parametrize(
    "method",
    [
        "eigencam",
        "kpcacam",
        "fem",
        "scorecam",
        "reciprocam",
        "fullgrad",
        "saliency",
        "guidedgradcam",
        "gradcam",
    ],
)
def test_a_class_that_does_not_exist_has_no_map(method):
    emit = ("cam", "heatmap", "gradients") + (() if METHODS[method].gives == "map" else ("attributions",))
    wrong = CLASSES.copy()
    wrong[1, 0] = 99
    got, right = (maps("ort", emit, method=method, classes=c) for c in (wrong, CLASSES))
    for name, value in got.items():
        if name == "scores":
            continue
        rows = value.reshape(6, *value.shape[-3 if "gra" in name or "attr" in name else -2 :])
        others = right[name].reshape(rows.shape)
        assert (rows[2] == 0).all() if name == "cam_heatmap" else np.isnan(rows[2]).all(), name
        keep = [0, 1, 3, 4, 5]
        np.testing.assert_array_equal(rows[keep], others[keep], name)


@pytest.mark.parametrize("method", [name for name in EXPECTED if name not in ("cam", "sscam")])
def test_open_height_and_width(method):
    open_text = TEXT.replace("[N,2,6,8]", "[N,2,H,W]")
    got = maps("ort", ("cam", "heatmap"), model(open_text, "float"), method=method)
    wanted = maps("ort", ("cam", "heatmap"), method=method)
    for name in ("cam", "cam_heatmap"):
        assert got[name].shape == wanted[name].shape
        assert relative_error(got[name], wanted[name]) <= 2e-5, name


@pytest.mark.parametrize("method", [name for name in METHODS if name not in ("cam", "legrad")])
def test_every_method_writes_standard_operators_that_are_all_read(method):
    proto = model(dtype="float")
    layer = {} if METHODS[method].at_picture else {"layer": LAYER}
    added = explained(proto, method=method, **layer)
    check_added(added, proto, cam_on_picture=METHODS[method].full_size)
    random = {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli"}
    assert not random & {node.op_type for node in every_node(added.graph.node)}


# What needs random numbers has the same ones whichever way the picture lies.
@pytest.mark.parametrize("method", [name for name in EXPECTED if name not in ("cam", "sscam")])
def test_channels_last_pictures(method):
    text = TEXT.replace("[N,2,6,8] x", "[N,6,8,2] photo").replace(
        "c1 =", "x = Transpose<perm=[0,3,1,2]>(photo) c1 ="
    )
    proto = model(text, "float")
    layer = {} if METHODS[method].at_picture else {"layer": LAYER}
    added = explained(proto, method=method, emit=("cam",), layout="NHWC", **layer)
    x = pictures(dtype=np.float32)
    got = run(added, {"photo": np.ascontiguousarray(x.transpose(0, 2, 3, 1)), "cam_class": CLASSES})["cam"]
    assert relative_error(got, maps("ort", method=method)["cam"]) <= 2e-5


@pytest.mark.parametrize("method", [name for name in EXPECTED if name not in ("cam", "sscam")])
def test_half_precision(method):
    """Measured: 1e-3 for most, 3e-3 where scores are subtracted; 9e-3 for noise, which moves the kinks."""
    added = explained(
        model(dtype="float16"),
        method=method,
        emit=("cam", "heatmap"),
        **({} if METHODS[method].at_picture else {"layer": LAYER}),
    )
    got = run(added, {"x": pictures(dtype=np.float16), "cam_class": CLASSES})
    assert got["cam"].dtype == np.float32
    assert np.isfinite(got["cam"]).all()
    wanted = maps("ort", method=method)["cam"]
    assert relative_error(got["cam"], wanted) <= 0.01
