"""Models for other runtimes: portable ones have the maps of the others, .ort files those of their .onnx."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from onnxcam.attaching import attach
from onnxcam.errors import OnnxcamError
from onnxcam.runtime import Explainer
from tests import graphs
from tests.checks import relative_error
from tests.graphs import EVERYTHING, build, explained, run
from tests.small import FACTS, LAYER, classifier

POOLED = """(T[N,3,12,12] x) => (T[N,5] scores) <T[4,3,3,3] w, T[4,4,3,3] v, T[4,4] fc1, T[4,5] fc2>
{
    c = Conv<kernel_shape=[3,3], pads=[1,1,1,1]>(x, w)
    r = Relu(c)
    m = MaxPool<kernel_shape=[3,3], strides=[2,2], pads=[1,1,1,1]>(r)
    d = Conv<kernel_shape=[3,3], pads=[1,1,1,1]>(m, v)
    s = Relu(d)
    p = GlobalAveragePool(s)
    f = Flatten(p)
    g = MatMul(f, fc1)
    h = Tanh(g)
    scores = MatMul(h, fc2)
}"""


def operators(model):
    """Those of all nodes, also of those within others."""
    found, waiting = set(), [model.graph]
    while waiting:
        for node in waiting.pop().node:
            found.add(node.op_type)
            waiting += [a.g for a in node.attribute if a.HasField("g")]
    return found


@pytest.mark.parametrize(
    ("graph", "options"),
    [
        (graphs.LINEAR, {}),
        (POOLED, {"layer": "r", "emit": EVERYTHING}),
        (POOLED, {"layer": "r", "target": "contrast", "emit": EVERYTHING}),
        (POOLED, {"layer": ["r", "s"], "method": "layercam"}),
        (POOLED, {"layer": "m", "method": "shapleycam"}),
        (POOLED, {"layer": "m", "method": "ablationcam"}),
        (POOLED, {"layer": "m", "method": "finercam"}),
        (POOLED, {"layer": "m", "method": "reciprocam"}),
        (POOLED, {"layer": "m", "method": "eigencam"}),
        (POOLED, {"method": "guidedbackprop"}),
        (POOLED, {"layer": "m", "smooth": ["augmentation"]}),
    ],
)
def test_the_maps_of_each_class_are_those_of_the_default_form(graph, options):
    """In float64, at a picture of few values, so that the max pool ties: the first takes the gradient."""
    model = build(graph, dtype="double")
    size = [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim[1:]]
    x = np.random.default_rng(0).integers(-1, 2, (2, *size)).astype(np.float64)
    options = {"emit": ("cam", "heatmap"), **options}
    default, portable = (explained(model, portable=form, **options) for form in (False, True))
    assert not operators(portable) & {"Scan", "If", "Loop", "ScatterElements"}
    asked = next(v for v in portable.graph.input if v.name == "cam_class").type.tensor_type.shape.dim
    assert asked[1].dim_value == 1
    wanted = run(default, {"x": x, "cam_class": np.array([[3, -1]])}, by="ref")
    for k, index in enumerate([3, -1]):
        got = run(portable, {"x": x, "cam_class": np.array([[index]])}, by="ref")
        assert got.keys() == wanted.keys()
        for name in ("cam", "cam_heatmap"):
            assert relative_error(got[name][:, 0], wanted[name][:, k]) <= 1e-6, name  # maps are float32
        if "cam_gradients" in wanted:
            assert relative_error(got["cam_gradients"], wanted["cam_gradients"][k::2]) <= 1e-12


def test_a_sum_that_a_seed_tells_needs_no_scan_either():
    model = explained(build(POOLED), layer="r", target="seed", emit=("cam",))
    assert "Scan" not in operators(model)


def test_with_a_batch_of_one_all_sizes_are_numbers():
    model = build(POOLED.replace("N,", "1,"))
    portable = explained(model, layer="r", portable=True, class_input="required", emit=("cam", "heatmap"))
    sizes = {
        v.name: [d.dim_value for d in v.type.tensor_type.shape.dim]
        for v in (*portable.graph.input, *portable.graph.output)
    }
    assert sizes["cam_class"] == [1, 1] and sizes["cam_heatmap"] == [1, 1, 12, 12]
    assert np.all([len(size) and 0 not in size for size in sizes.values()])


def test_too_many_parts_to_write_out_are_refused():
    model = build(graphs.LINEAR.replace("[4", "[65"))
    with pytest.raises(OnnxcamError, match="65 times, and a portable model has no loop"):
        attach(model, method="scorecam", layer="r", portable=True)
    with pytest.raises(OnnxcamError, match="an unknown number of times"):
        attach(build(POOLED.replace("12,12", "H,W")), method="reciprocam", layer="m", portable=True)


def test_the_explainer_asks_for_one_class_after_the_other(tmp_path, photo):
    paths = [tmp_path / "default.onnx", tmp_path / "portable.onnx"]
    for path, portable in zip(paths, (False, True), strict=True):
        attach(classifier(), path, portable=portable, **FACTS)
    default, one_by_one = (Explainer(path)(photo, classes=["top2", 0]) for path in paths)
    assert [c.index for c in one_by_one.classes] == [c.index for c in default.classes]
    for name in ("cam", "heatmap"):
        np.testing.assert_allclose(getattr(one_by_one, name), getattr(default, name), rtol=0, atol=1e-6)


def test_ort_files_keep_the_card_and_the_maps(tmp_path):
    path = tmp_path / "explained.onnx"
    attach(classifier(softmax=True), path, layer=LAYER, **FACTS)
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8))
    tool = [sys.executable, "-m", "onnxruntime.tools.convert_onnx_models_to_ort", str(path)]
    subprocess.run([*tool, "--optimization_style", "Fixed"], check=True, capture_output=True)
    config = (tmp_path / "explained.required_operators.config").read_text()
    assert "ai.onnx;18;" in config and "Resize" in config
    wanted, got = (Explainer(p)(photo, classes="top3") for p in (path, path.with_suffix(".ort")))
    assert got.card == wanted.card
    np.testing.assert_allclose(got.cam, wanted.cam, rtol=0, atol=1e-6 * np.abs(wanted.cam).max())
