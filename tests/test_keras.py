"""Files of tf2onnx, channels last, of open size: gradients against TensorFlow's GradientTape (tests/data)."""

import hashlib
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnxcam import onnxfile
from onnxcam.attaching import attach
from onnxcam.card import Card
from onnxcam.layers import explainable, picture, scores
from tests.checks import relative_error
from tests.graphs import EVERYTHING, run

DATA = Path(__file__).parent / "data"
TENSORFLOW = np.load(DATA / "keras_cnn.npz")
OPSETS = (9, 13, 18)
CLASSES = np.array([[0, 3], [4, 1]])


def test_files_are_the_ones_listed():
    readme = (DATA / "README.md").read_text()
    for path in [*DATA.glob("*.onnx"), *DATA.glob("*.npz")]:
        assert f"| `{path.name}` |" in readme
        assert f"| `{hashlib.sha256(path.read_bytes()).hexdigest()}` |" in readme


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("layer", ["image", None])
def test_gradients_equal_tensorflows(opset, layer):
    """Of two sizes by the same file; onnxruntime's float32 against TensorFlow's is off by 2e-7."""
    plain = onnx.load(DATA / f"keras_cnn_{opset}.onnx")
    explained = ir.to_proto(attach(plain, layer=layer, emit=EVERYTHING))
    for i in range(2):
        image = TENSORFLOW[f"x_{i}"]
        got = run(explained, {"image": image, "cam_class": CLASSES})
        assert relative_error(got[plain.graph.output[0].name], TENSORFLOW[f"scores_{i}"]) <= 2e-6
        wanted = TENSORFLOW[f"at_{'image' if layer else 'last'}_{i}"]
        assert relative_error(got["cam_gradients"].transpose(0, 2, 3, 1), wanted) <= 2e-6
        activation = image if layer else TENSORFLOW[f"last_{i}"]
        assert relative_error(got["cam_activations"].transpose(0, 2, 3, 1), activation) <= 2e-6
        assert got["cam_heatmap"].shape == (2, 2, *image.shape[1:3])


@pytest.mark.parametrize("opset", OPSETS)
def test_what_is_found_in_it(opset):
    model = onnxfile.normalise(onnxfile.load(DATA / f"keras_cnn_{opset}.onnx"))
    found = scores(model)
    assert found.are == "probabilities"
    names = [layer.name for layer in explainable(picture(model), found.logits)]
    assert len(names) >= 15
    for part in ("depthwise", "conv2d_1", "Relu6", "MaxPool", "AvgPool", "add"):
        assert any(part in name for name in names), part
    card = Card.from_metadata(attach(model).metadata_props)
    assert card.layer.endswith("/Relu6:0")
    assert (card.input.layout, card.scores_are, card.grid) == ("NHWC", "probabilities", None)
