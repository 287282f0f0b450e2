"""Filters and activations: the right numbers, in the right order, as the right colours."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper
from PIL import Image

from onnxcam.attaching import attach
from onnxcam.errors import OnnxcamError
from onnxcam.looking import Activations, Filters, activations, filters
from tests.checks import quiet
from tests.small import FACTS, classifier, floats

MODELS = Path(__file__).parent.parent / "models"


def weights(model, name="w1"):
    (found,) = (t for t in model.graph.initializer if t.name == name)
    return numpy_helper.to_array(found)


@pytest.mark.parametrize("nhwc", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_filters_are_the_first_weights_in_red_green_blue(nhwc, dtype):
    model = classifier(nhwc=nhwc, dtype=dtype)
    found = filters(model, "RGB")
    assert (found.node, found.weights.dtype) == ("conv1", np.float32)
    np.testing.assert_array_equal(found.weights, weights(model).astype(np.float32))
    np.testing.assert_array_equal(filters(model, "BGR").weights, found.weights[:, ::-1])
    assert str(found) == "6 colour filters 3x3 of conv1"


def test_filters_take_the_order_of_the_card(small_explained, small):
    np.testing.assert_array_equal(filters(small_explained).weights, filters(small, "RGB").weights)
    turned = attach(classifier(), **{**FACTS, "color": "BGR"})
    np.testing.assert_array_equal(filters(turned).weights, filters(small, "BGR").weights)


def test_filters_of_a_grey_model_need_no_order():
    found = filters(classifier(channels=1))
    assert found.weights.shape == (6, 1, 3, 3)
    assert str(found) == "6 grey filters 3x3 of conv1"
    assert found.grid().mode == "RGB"


def test_the_first_convolution_is_that_which_the_picture_reaches_first():
    """Another stands before it in the file, but reads something else."""
    model = classifier()
    other = helper.make_node("Conv", ["other", "w1"], ["aside"], "first in the file")
    model.graph.node.insert(0, other)
    model.graph.initializer.append(numpy_helper.from_array(np.ones((1, 3, 4, 4), np.float32), "other"))
    assert filters(model, "RGB").node == "conv1"


def test_filters_that_cannot_be_drawn():
    with pytest.raises(OnnxcamError, match=r"first convolution, are \[6, 5, 3, 3\]; only those of 1 or 3"):
        filters(classifier(channels=5), "RGB")
    with pytest.raises(OnnxcamError, match="give --color"):
        filters(classifier())
    computed = classifier()
    computed.graph.node.insert(0, helper.make_node("Neg", ["w1"], ["w"]))
    computed.graph.node[1].input[1] = "w"
    with pytest.raises(
        OnnxcamError, match="'conv1', the first convolution, are computed while the model runs"
    ):
        filters(computed, "RGB")
    graph = helper.make_graph(
        [helper.make_node("Flatten", ["x"], ["flat"]), helper.make_node("Gemm", ["flat", "w"], ["y"])],
        "mlp",
        [floats("x", ["N", 3, 4, 4])],
        [floats("y", ["N", 2])],
        [numpy_helper.from_array(np.ones((48, 2), np.float32), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    with pytest.raises(OnnxcamError, match="no convolution between the picture and its scores"):
        filters(model, "RGB")


def cells(monkeypatch, drawn):
    """The cells that `drawn` draws, and the words it puts above them."""
    import onnxcam.render

    seen = []
    monkeypatch.setattr(onnxcam.render, "grid", lambda *given: seen.append(given))
    drawn.grid()
    return seen[0]


def test_filters_are_scaled_by_their_own_largest_weight_and_zero_is_grey(monkeypatch):
    values = np.zeros((3, 3, 1, 2), np.float32)
    values[0, :, 0, 0] = 4, -2, 0
    values[1, :, 0, 1] = -0.1, 0.05, 0.1
    drawn, title, legend = cells(monkeypatch, Filters(values, "c"))
    grey = [128, 128, 128]
    assert drawn.shape == (3, 1, 2, 3)
    np.testing.assert_array_equal(drawn[0, 0], [[255, 64, 128], grey])
    np.testing.assert_array_equal(drawn[1, 0], [grey, [0, 191, 255]])
    np.testing.assert_array_equal(drawn[2, 0], [grey, grey])
    assert (title, legend) == (
        "3 colour filters 1x2 of c",
        "Each is scaled by its own largest weight; mid-grey is zero.",
    )
    drawn, _, _ = cells(monkeypatch, Filters(values[:, :1], "c"))
    np.testing.assert_array_equal(drawn[0, 0], [[255, 255, 255], grey])


def test_activations_are_those_of_the_model(small, small_explained, photo):
    x = np.asarray(Image.open(photo).resize((12, 8), Image.Resampling.BILINEAR), np.float32)
    feed = ((x / 255 - 0.5) / 0.5).transpose(2, 0, 1)[None].astype(np.float32)
    model = onnx.load(small)
    model.graph.output.extend([floats("conv", None), floats("features", None)])
    session = onnxruntime.InferenceSession(model.SerializeToString(), quiet())
    conv, features = session.run(["conv", "features"], {"image": feed})
    found = activations(small, photo, layer="conv", **FACTS)
    assert (found.layer, found.values.dtype) == ("conv", np.float32)
    np.testing.assert_allclose(found.values, conv[0], rtol=1e-5, atol=1e-6)
    # Without a layer it is the one that would be explained, or is.
    np.testing.assert_allclose(activations(small, photo, **FACTS).values, features[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(activations(small_explained, photo).values, features[0], rtol=1e-5, atol=1e-6)
    at_conv = attach(small, layer="conv", **FACTS)
    np.testing.assert_allclose(activations(at_conv, photo).values, conv[0], rtol=1e-5, atol=1e-6)
    several = attach(small, layer=["conv", "features"], **FACTS)
    assert activations(several, photo).layer == "features"


@pytest.mark.parametrize("options", [{"batch": 4}, {"dtype": np.float16}, {"nhwc": True}])
def test_activations_of_other_models(small, photo, options):
    found = activations(classifier(**options), photo, **FACTS)
    wanted = activations(small, photo, **FACTS)
    np.testing.assert_allclose(found.values, wanted.values, rtol=1e-2, atol=1e-2)


def test_activations_of_a_picture_in_memory(small, photo):
    with Image.open(photo) as opened:
        found = activations(small, np.asarray(opened), **FACTS)
    np.testing.assert_array_equal(found.values, activations(small, photo, **FACTS).values)


def test_an_operator_without_a_gradient_is_no_obstacle(small, photo):
    """Nor is one behind the layer that no runtime has."""
    extra = [helper.make_node("Wobble", ["features"], ["changed"], "wobbly", domain="com.example")]
    model = classifier(extra=extra)
    model.graph.value_info.append(floats("changed", ["N", 6, 8, 12]))
    found = activations(model, photo, layer="features", **FACTS)
    np.testing.assert_array_equal(found.values, activations(small, photo, **FACTS).values)


def test_activations_that_are_refused(small, small_explained, photo):
    for options, message in (
        ({"layer": "cnv"}, "no layer 'cnv' .did you mean 'conv'"),
        ({"layer": "flat"}, r"layer 'flat' is \[N,6\]; a map needs"),
        ({"height": 9}, "height is given as 9"),
        ({"std": None}, "std unknown; give --std"),
    ):
        with pytest.raises(OnnxcamError, match=message):
            activations(small, photo, **{**FACTS, **options})
    with pytest.raises(TypeError, match="unexpected argument 'colour'"):
        activations(small_explained, photo, colour="RGB")
    with pytest.raises(OnnxcamError, match="cannot read nowhere"):
        activations(small_explained, "nowhere.png")


def test_channels_are_scaled_by_their_own_range_and_flat_ones_are_blue(monkeypatch):
    values = np.float32([[[0, 5]], [[-3, -2]], [[7, 7]], [[np.nan, 1]], [[0, np.inf]], [[-1, 1]]])
    found = Activations(values, "relu (layer4)")
    np.testing.assert_array_equal(found.flat, [False, False, True, True, True, False])
    drawn, title, legend = cells(monkeypatch, found)
    for index in (0, 1, 5):
        np.testing.assert_array_equal(drawn[index, 0], [[0, 0, 0], [255, 255, 255]])
    for index in (2, 3, 4):
        assert (drawn[index] == (176, 198, 224)).all()
    assert title == "6 channels 1x2 of relu (layer4)"
    assert (
        legend == "Each from its least value (black) to its greatest (white); 3 that are flat are pale blue."
    )
    between = Activations(np.float32([[[0, 1, 4]]]), "x")
    np.testing.assert_array_equal(cells(monkeypatch, between)[0][0, 0, :, 0], [0, 64, 255])


def test_real_models():
    found = filters(MODELS / "squeezenet1_1.onnx", "BGR")
    assert (found.weights.shape, found.node) == ((64, 3, 3, 3), "conv1")
    facts = {"color": "RGB", "scale": 1, "mean": [127], "std": [128], "resize": "stretch"}
    cat = activations(MODELS / "efficientnet_lite0.onnx", MODELS / "chelsea.png", layer="_blocks.2", **facts)
    assert cat.values.shape[1:] == (56, 56)
    assert "(_blocks.2" in cat.layer
    assert np.isfinite(cat.values).all()
