"""The files in models/: they are the ones listed, they are sound, and they say what their pictures show."""

import hashlib
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image

onnxruntime = pytest.importorskip("onnxruntime")

MODELS = Path(__file__).parent.parent / "models"
NOT_DATA = {"README.md", "SHA256SUMS", "recipe.py"}
ONNX_FILES = ["efficientnet_lite0.onnx", "pp_lcnet_orientation.onnx", "squeezenet1_1.onnx"]
EGYPTIAN_CAT, ESPRESSO = 285, 967


def read_sums():
    lines = (MODELS / "SHA256SUMS").read_text().splitlines()
    return {name: digest for digest, name in (line.split("  ") for line in lines)}


def prepared(name, size, *, shorter_edge=None, interpolation, bgr=False, scale=1.0, mean, std):
    """x = (pixel * scale - mean) / std of a picture stretched to ``size``, or cut from its middle."""
    with Image.open(MODELS / name) as opened:
        picture = opened.convert("RGB")
    if shorter_edge is None:
        picture = picture.resize((size, size), interpolation)
    else:
        factor = shorter_edge / min(picture.size)
        picture = picture.resize([round(edge * factor) for edge in picture.size], interpolation)
        left, top = (picture.width - size) // 2, (picture.height - size) // 2
        picture = picture.crop((left, top, left + size, top + size))
    pixels = np.asarray(picture, np.float32)
    if bgr:
        pixels = pixels[..., ::-1]
    x = (pixels * np.float32(scale) - np.float32(mean)) / np.float32(std)
    return np.ascontiguousarray(x.transpose(2, 0, 1)[np.newaxis], np.float32)


def for_lite0(name):
    bicubic = Image.Resampling.BICUBIC
    return prepared(name, 224, interpolation=bicubic, mean=[127] * 3, std=[128] * 3)


def for_squeezenet(name):
    mean = [104.006, 116.669, 122.679]
    return prepared(name, 227, interpolation=Image.Resampling.BILINEAR, bgr=True, mean=mean, std=[1] * 3)


def for_orientation(name):
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    bilinear = Image.Resampling.BILINEAR
    return prepared(name, 224, shorter_edge=256, interpolation=bilinear, scale=1 / 255, mean=mean, std=std)


def softmax(logits):
    grown = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return grown / grown.sum(axis=-1, keepdims=True)


def run(model, x):
    """All outputs of a model, given as a file's name or as bytes."""
    source = MODELS / model if isinstance(model, str) else model
    session = onnxruntime.InferenceSession(source, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x})


def lite0_probabilities(name):
    return softmax(run("efficientnet_lite0.onnx", for_lite0(name))[0])[0]


def test_sums_list_every_data_file():
    present = {path.name for path in MODELS.iterdir() if path.is_file() and not path.name.startswith(".")}
    assert set(read_sums()) == present - NOT_DATA


@pytest.mark.parametrize("name", sorted(read_sums()))
def test_file_is_the_listed_one(name):
    data = (MODELS / name).read_bytes()
    assert hashlib.sha256(data).hexdigest() == read_sums()[name]
    readme = (MODELS / "README.md").read_text()
    assert f"| `{name}` | {len(data):,} | `{read_sums()[name]}` |" in readme


@pytest.mark.parametrize("name", ONNX_FILES)
def test_model_is_valid_plain_onnx(name):
    onnx.checker.check_model(str(MODELS / name), full_check=True)
    model = onnx.load(MODELS / name)
    assert [opset.domain for opset in model.opset_import] == [""]
    assert not model.functions
    assert {node.domain for node in model.graph.node} == {""}
    assert not any(tensor.external_data for tensor in model.graph.initializer)


@pytest.mark.parametrize("name", ONNX_FILES)
def test_model_holds_no_path_of_the_machine_that_made_it(name):
    model = onnx.load(MODELS / name)
    for tensor in model.graph.initializer:
        tensor.ClearField("raw_data")  # random bytes may spell anything
    text = model.SerializeToString()
    assert len(text) > 1000
    for path in (b"/opt", b"/root", b"/tmp", b"/home", b"/usr", b"/work", b"site-packages", b'.py"'):
        assert path not in text


def test_lite0_keeps_only_the_module_path_of_each_node():
    nodes = onnx.load(MODELS / "efficientnet_lite0.onnx").graph.node
    keys = [[entry.key for entry in node.metadata_props] for node in nodes]
    assert keys == [["pkg.torch.onnx.name_scopes"]] * len(nodes)


@pytest.mark.parametrize(("name", "size"), [("efficientnet_lite0.onnx", 224), ("squeezenet1_1.onnx", 227)])
def test_classifier_shapes(name, size):
    graph = onnx.load(MODELS / name).graph
    shapes = [
        [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    ]
    assert shapes == [["N", 3, size, size], ["N", 1000]]
    (output,) = run(name, np.zeros((3, 3, size, size), np.float32))
    assert output.shape == (3, 1000)


@pytest.mark.parametrize(
    ("picture", "label", "probability"),
    [("chelsea.png", EGYPTIAN_CAT, 0.7709), ("coffee.png", ESPRESSO, 0.9002)],
)
def test_lite0_prediction(picture, label, probability):
    probabilities = lite0_probabilities(picture)
    assert probabilities.argmax() == label
    assert probabilities[label] == pytest.approx(probability, abs=0.02)


@pytest.mark.parametrize(
    ("picture", "label", "probability"),
    [("chelsea.png", EGYPTIAN_CAT, 0.4238), ("coffee.png", ESPRESSO, 0.9993)],
)
def test_squeezenet_prediction(picture, label, probability):
    (probabilities,) = run("squeezenet1_1.onnx", for_squeezenet(picture))
    assert probabilities.sum() == pytest.approx(1, abs=1e-4)
    assert probabilities[0].argmax() == label
    assert probabilities[0, label] == pytest.approx(probability, abs=0.02)


@pytest.mark.parametrize("quarter_turns", range(4))
def test_orientation_prediction(quarter_turns):
    labels = (MODELS / "page_labels.txt").read_text().splitlines()
    turned = np.rot90(for_orientation("page.png"), -quarter_turns, axes=(2, 3))  # further clockwise
    (probabilities,) = run("pp_lcnet_orientation.onnx", np.ascontiguousarray(turned))
    clockwise = (90 + 90 * quarter_turns) % 360
    assert labels[probabilities[0].argmax()] == str(clockwise)
    assert probabilities[0].max() == pytest.approx(0.925, abs=0.02)


def test_page_labels_are_the_model_s_own():
    model = onnx.load(MODELS / "pp_lcnet_orientation.onnx")
    own = {entry.key: entry.value.split() for entry in model.metadata_props}["character"]
    assert (MODELS / "page_labels.txt").read_text().splitlines() == own == ["0", "90", "180", "270"]


def test_imagenet_labels():
    labels = (MODELS / "imagenet_labels.txt").read_text().splitlines()
    assert len(labels) == 1000
    assert labels[EGYPTIAN_CAT] == "Egyptian cat"
    assert labels[ESPRESSO] == "espresso"
    assert all(label and label == label.strip() for label in labels)


def test_both_classes_lead_on_the_pair():
    probabilities = lite0_probabilities("cat_and_coffee.png")
    assert probabilities.argsort()[::-1][:2].tolist() == [EGYPTIAN_CAT, ESPRESSO]
    assert probabilities[EGYPTIAN_CAT] == pytest.approx(0.2925, abs=0.02)
    assert probabilities[ESPRESSO] == pytest.approx(0.1098, abs=0.02)


def test_pair_meets_in_the_middle():
    with Image.open(MODELS / "cat_and_coffee.png") as opened:
        pixels = np.asarray(opened.convert("L"), np.int32)
    assert pixels.shape == (300, 450)
    steps = np.abs(np.diff(pixels, axis=1)).mean(axis=0)
    assert steps.argmax() == 224  # from column 224 to column 225
    with Image.open(MODELS / "chelsea.png") as opened:
        cat = np.asarray(opened.convert("L"), np.int32)
    assert np.array_equal(pixels[:, :225], cat[:, 113:338])


@pytest.mark.parametrize(
    ("label", "half", "share"),
    [(EGYPTIAN_CAT, slice(None, 112), 0.940), (ESPRESSO, slice(112, None), 0.887)],
)
def test_map_lies_on_its_half_of_the_pair(label, half, share):
    """Behind the last activation lie only a mean and a Gemm, so Grad-CAM needs no gradient."""
    model = onnx.load(MODELS / "efficientnet_lite0.onnx")
    gemm, mean = model.graph.node[-1], model.graph.node[-3]
    assert (gemm.op_type, mean.op_type) == ("Gemm", "ReduceMean")
    model.graph.output.append(onnx.helper.make_tensor_value_info(mean.input[0], onnx.TensorProto.FLOAT, None))
    activation = run(model.SerializeToString(), for_lite0("cat_and_coffee.png"))[1][0]
    assert activation.shape == (1280, 7, 7)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    weights = onnx.numpy_helper.to_array(tensors[gemm.input[1]])[label]
    cells = np.maximum(np.tensordot(weights, activation, axes=1), 0).astype(np.float32)
    heat = np.asarray(Image.fromarray(cells).resize((224, 224), Image.Resampling.BILINEAR))
    assert heat[:, half].sum() / heat.sum() == pytest.approx(share, abs=0.01)
