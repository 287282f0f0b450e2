"""Maps on demand: none where they are not asked for, the same ones where they are."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from onnxcam.attaching import attach
from onnxcam.runtime import Explainer
from tests import checks, graphs
from tests.small import FACTS, classifier

EMIT = ("cam", "heatmap", "activations", "gradients")
RNG_SEED = 0


def run(model, feeds, names=None):
    session = onnxruntime.InferenceSession(model.SerializeToString(), checks.quiet())
    return session.run(names, feeds)


def proto(*arguments, **options):
    model = ir.to_proto(attach(*arguments, **options))
    onnx.checker.check_model(model, full_check=True)
    return model


@pytest.mark.parametrize(
    ("graph", "layer"), [(graphs.LINEAR, "r"), (graphs.DEEP, "r")], ids=["linear", "deep"]
)
@pytest.mark.parametrize("method", ["gradcam", "reciprocam", "eigencam"])
def test_maps_are_the_same_or_none(graph, layer, method):
    emit = EMIT if method == "gradcam" else EMIT[:2]
    model = graphs.build(graph)
    always = proto(model, layer=layer, method=method, emit=emit)
    demanded = proto(model, layer=layer, method=method, emit=emit, on_demand=True)
    feeds = {"x": graphs.picture(2), "cam_class": np.array([[0, 1], [1, -1]])}
    expected = run(always, feeds)
    for by in (run, lambda *given: checks.reference(given[0]).run(None, given[1])):
        found = by(demanded, {**feeds, "cam_wanted": np.array(True)})
        for mine, its in zip(found, expected, strict=True):
            np.testing.assert_allclose(mine, its, atol=2e-6)
        nothing = by(demanded, {**feeds, "cam_wanted": np.array(False)})
        np.testing.assert_allclose(nothing[0], expected[0], atol=1e-6)
        assert [(n.size, n.ndim) for n in nothing[1:]] == [(0, e.ndim) for e in expected[1:]]


def test_a_portable_model_gives_zeros_of_the_same_sizes():
    """tract and OpenCV refuse branches of other sizes."""
    model = proto(graphs.build(graphs.DEEP.replace("N,", "1,")), layer="r", on_demand=True, portable=True)
    feeds = {"x": graphs.picture(1), "cam_class": np.array([[1]])}
    maps, zeros = (run(model, {**feeds, "cam_wanted": np.array(wanted)})[1:] for wanted in (True, False))
    for made, zero, declared in zip(maps, zeros, model.graph.output[1:], strict=True):
        assert made.any() and not zero.any()
        assert made.shape == zero.shape == tuple(d.dim_value for d in declared.type.tensor_type.shape.dim)


def test_only_what_the_model_needs_is_outside():
    """The model's own nodes, the If, and what prepares the picture; nothing else is computed unasked."""
    model = proto(classifier(), on_demand=True, embed_preprocess=True, emit=("cam", "overlay"), **FACTS)
    outside = [n for n in model.graph.node if n.name.startswith("cam/")]
    assert [n.op_type for n in outside if not n.name.startswith("cam/picture/")] == ["If"]
    own = [n.name for n in model.graph.node if not n.name.startswith("cam/")]
    assert own == [n.name for n in ir.to_proto(attach(classifier())).graph.node if "cam/" not in n.name]
    assert [i.name for i in model.graph.input] == ["cam_picture", "cam_class", "cam_wanted"]


def test_predictions_alone_unless_asked():
    model = proto(classifier(), on_demand=True)
    x = np.random.default_rng(RNG_SEED).standard_normal((1, 3, 8, 12)).astype(np.float32)
    scores, cam, heatmap = run(model, {"image": x})
    assert (scores.shape, cam.size, heatmap.size) == ((1, 4), 0, 0)


def test_explainer_asks(tmp_path, photo):
    always, demanded = tmp_path / "always.onnx", tmp_path / "demanded.onnx"
    attach(classifier(), always, **FACTS)
    attach(classifier(), demanded, on_demand=True, **FACTS)
    expected, found = (Explainer(path)(photo, [1, 3]) for path in (always, demanded))
    np.testing.assert_array_equal(found.cam, expected.cam)
    np.testing.assert_array_equal(found.heatmap, expected.heatmap)
    assert found.card.on_demand
