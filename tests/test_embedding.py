"""The picture as the model's input: the same pixels, predictions and maps as by Pillow."""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from PIL import Image

from onnxcam.attaching import attach
from onnxcam.card import INTERPOLATIONS, Preprocess
from onnxcam.embedding import Embedded
from onnxcam.emit import Emitter
from onnxcam.errors import OnnxcamError
from onnxcam.image import prepare
from onnxcam.render import overlay
from onnxcam.runtime import Explainer
from tests.checks import quiet
from tests.small import FACTS, classifier
from tests.test_pictures import PP_LCNET, SQUEEZENET

MODELS = Path(__file__).parent.parent / "models"
RNG_SEED = 0
EMIT = ("cam", "heatmap", "overlay")


def preparing(facts):
    """Return a session that does nothing but prepare a picture, and spreads a map over it."""
    channels = facts.channels
    shape = [1, channels, facts.height, facts.width]
    if facts.layout == "NHWC":
        shape = [1, facts.height, facts.width, channels]
    x = ir.Value(name="x", shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))
    heat = ir.Value(
        name="heat",
        shape=ir.Shape([1, 1, facts.height, facts.width]),
        type=ir.TensorType(ir.DataType.FLOAT),
    )
    graph = ir.Graph([x, heat], [], nodes=[], opset_imports={"": 18}, name="g")
    op = Emitter(graph, 18, "cam")
    embedded = Embedded.add(op, x, facts)
    prepared = op.Identity(x)
    graph.outputs.extend([prepared, embedded.spread(op, heat), embedded.seen(op)])
    embedded.feed(op, x)
    graph.sort()
    for value, name in zip(graph.outputs, ("prepared", "spread", "seen"), strict=True):
        value.name = name
    model = ir.to_proto(ir.Model(graph, ir_version=9))
    onnx.checker.check_model(model)
    return session(model)


def session(model):
    """Open a model, given in memory or as a file."""
    given = model.SerializeToString() if isinstance(model, onnx.ModelProto) else str(model)
    return onnxruntime.InferenceSession(given, quiet())


SIZES = ((24, 30), (48, 60), (37, 101), (203, 64), (9, 7), (1, 5), (400, 33), (33, 400), (31, 31), (240, 320))


def resized(pixels, size, picture, facts):
    """The length that a side has before the crop."""
    edge = facts.shorter_edge
    return size if edge is None else pixels * edge // min(picture)


def between(pixels, size, picture, facts):
    """Which pixels of a side of the input fall between two of the picture's."""
    whole = resized(pixels, size, picture, facts)
    start = round((whole - size) / 2)
    return (2 * (np.arange(size) + start) + 1) * pixels % (2 * whole) == 0


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize(
    ("resize", "color", "layout"),
    [("stretch", "RGB", "NCHW"), ("crop", "BGR", "NHWC"), ("crop:31", "GRAY", "NCHW")],
)
def test_pixels_and_places_are_those_of_pillow(interpolation, resize, color, layout):
    """Sizes that shrink, grow and stay, ratios that end in one half, odd and even rests of the crop.

    A sum within 1e-4 of a half, float32's precision, may round to the other neighbour, in each of the two
    passes; one level, of which a weight beyond 1 can make two. Where Pillow 13 begins with the
    columns, its rounding between the passes is another: more pixels, and with weights below 0 more levels.
    Of two pixels that are equally near, Pillow's nearest takes the one that its sums of doubles fall on.
    """
    facts = Preprocess(
        "x", layout, 24, 30, color, 1.0, (0.0,), (1.0,), resize=resize, interpolation=interpolation
    )
    prepares = preparing(facts)
    rng = np.random.default_rng(RNG_SEED)
    heat = rng.random((24, 30), np.float32)
    levels = []
    for height, width in SIZES:
        pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
        expected, view = prepare(Image.fromarray(pixels), facts)
        found, spread, seen = prepares.run(None, {"cam_picture": pixels[None], "heat": heat[None, None]})
        assert found.shape == expected.shape
        differs = np.abs(found - expected).reshape(-1, 24, 30, 1 if layout == "NCHW" else 3)
        if interpolation == "nearest":
            differs[:, between(height, 24, (height, width), facts)] = 0
            differs[:, :, between(width, 30, (height, width), facts)] = 0
        down, across = (resized(*side, (height, width), facts) for side in ((height, 24), (width, 30)))
        if height > down and height / down > width / across:
            assert differs.max() <= 1 or interpolation in ("bicubic", "lanczos")
            assert differs.mean() < 1
        else:
            levels.append(differs.ravel())
        over, touched = view.to_picture(heat)
        np.testing.assert_array_equal(seen, touched)
        np.testing.assert_allclose(spread[0, 0], over, atol=2e-6)
    differing = np.concatenate(levels)
    assert differing.max() <= 2
    assert (differing > 0).mean() < 1e-2  # in simple ratios of small pictures many sums are near a half


@pytest.mark.parametrize(
    ("size", "interpolation", "resize"),
    [(227, "bilinear", "stretch"), (224, "bicubic", "stretch"), (224, "bilinear", "crop:256")],
)
@pytest.mark.parametrize("photo", ["cat_and_coffee.png", "chelsea.png", "coffee.png", "page.png"])
def test_few_values_of_a_photo_have_another_level(photo, size, interpolation, resize):
    """As docs/format.md says; the most is 2.3 of 1,000, for the page with its wide white."""
    facts = Preprocess(
        "x", "NCHW", size, size, "RGB", 1.0, (0.0,), (1.0,), resize=resize, interpolation=interpolation
    )
    image = Image.open(MODELS / photo).convert("RGB")
    expected, _ = prepare(image, facts)
    feeds = {"cam_picture": np.asarray(image)[None], "heat": np.zeros((1, 1, size, size), np.float32)}
    (found,) = preparing(facts).run(["prepared"], feeds)
    differs = np.abs(found - expected)
    assert differs.max() <= 1
    assert (differs > 0).mean() <= 3e-3


LITE0 = {**SQUEEZENET, "color": "RGB", "mean": [127], "std": [128], "interpolation": "bicubic"}
CASES = {"efficientnet_lite0": LITE0, "squeezenet1_1": SQUEEZENET, "pp_lcnet_orientation": PP_LCNET}


@pytest.mark.parametrize("name", CASES)
def test_photos_get_the_predictions_and_maps_of_the_python_path(name, tmp_path):
    """One level in at most 2 of 1,000 pixels moves a score by up to 1.1e-3 (SqueezeNet, the others 2e-4)."""
    plain, whole = tmp_path / "plain.onnx", tmp_path / "whole.onnx"
    model = MODELS / f"{name}.onnx"
    attach(model, plain, **CASES[name])
    attach(model, whole, embed_preprocess=True, emit=EMIT, **CASES[name])
    by_python, by_graph = Explainer(plain), Explainer(whole)
    draws = session(whole)
    for photo in ("cat_and_coffee.png", "chelsea.png", "coffee.png"):
        expected, found = (explainer(MODELS / photo, "top2") for explainer in (by_python, by_graph))
        assert [p.index for p in found.predictions] == [p.index for p in expected.predictions]
        for mine, its in zip(found.predictions, expected.predictions, strict=True):
            assert mine.score == pytest.approx(its.score, abs=2e-3)
        assert found.heatmap.shape == (2, found.image.height, found.image.width)
        assert found.viewport == expected.viewport
        np.testing.assert_allclose(found.cam, expected.cam, atol=2e-3 * np.abs(expected.cam).max())
        for k in range(2):
            (heat, seen), (its_heat, its_seen) = found.heat(k), expected.heat(k)
            np.testing.assert_array_equal(seen, its_seen)
            np.testing.assert_allclose(heat, its_heat, atol=2e-3)
            assert found.peak(k) == pytest.approx(expected.peak(k), abs=2)
        pixels = np.asarray(found.image)[None]
        classes = np.array([[c.index for c in found.classes]])
        (drawn,) = draws.run(["cam_overlay"], {"cam_picture": pixels, "cam_class": classes})
        assert drawn.dtype == np.uint8
        assert drawn.shape == (1, 2, *pixels.shape[1:])
        for k in range(2):
            # Three: the heat map's own level may be the neighbour's, and Pillow rounds three times.
            assert np.abs(drawn[0, k].astype(int) - np.asarray(found.overlay(k)).astype(int)).max() <= 3


@pytest.mark.parametrize("evidence", ["against", "both", "counterfactual"])
@pytest.mark.parametrize("color", ["RGB", "BGR", "GRAY"])
def test_overlay_without_the_picture_is_drawn_over_the_models_input(evidence, color, tmp_path):
    facts = {**FACTS, "color": color, "mean": [0.4], "std": [0.3]}
    path = tmp_path / "explained.onnx"
    attach(classifier(channels=1 if color == "GRAY" else 3), path, evidence=evidence, emit=EMIT, **facts)
    explainer = Explainer(path)
    card = explainer.card.input
    pixels = np.random.default_rng(RNG_SEED).integers(0, 256, (card.height, card.width, 3), np.uint8)
    image = Image.fromarray(pixels)
    found = explainer(image, [1, 2])
    x, _ = prepare(image, card)
    feeds = {card.name: x, "cam_class": np.array([[1, 2]])}
    (drawn,) = session(path).run(["cam_overlay"], feeds)
    seen = image.convert("L") if color == "GRAY" else image
    for k in range(2):
        expected = np.asarray(overlay(seen, found.heatmap[k], evidence=evidence)).astype(int)
        assert np.abs(drawn[0, k].astype(int) - expected).max() <= 3


def test_batches_of_pictures(tmp_path):
    path = tmp_path / "explained.onnx"
    attach(classifier(), path, embed_preprocess=True, emit=EMIT, **FACTS)
    runs = session(path)
    pictures = np.random.default_rng(RNG_SEED).integers(0, 256, (3, 17, 23, 3), np.uint8)
    together = runs.run(None, {"cam_picture": pictures, "cam_class": np.array([[0, 2]] * 3)})
    for n in range(3):
        alone = runs.run(None, {"cam_picture": pictures[n : n + 1], "cam_class": np.array([[0, 2]])})
        for all_rows, row in zip(together, alone, strict=True):
            np.testing.assert_allclose(all_rows[n].astype(float), row[0].astype(float), atol=1e-5)


def test_half_precision_and_declared_names(tmp_path):
    path = tmp_path / "explained.onnx"
    attach(classifier(dtype=np.float16), path, embed_preprocess=True, **FACTS)
    opened = session(path)
    assert [(i.name, i.type, i.shape[1:]) for i in opened.get_inputs()] == [
        ("cam_picture", "tensor(uint8)", ["cam_height", "cam_width", 3])
    ]
    assert opened.get_outputs()[-1].shape[2:] == ["cam_height", "cam_width"]
    found = Explainer(path)(Image.new("RGB", (20, 30), "teal"))
    assert found.heatmap.shape == (1, 30, 20)


def test_facts_must_be_known():
    with pytest.raises(OnnxcamError, match="color, scale, mean, std, resize unknown; give --color"):
        attach(classifier(), embed_preprocess=True)
    with pytest.raises(OnnxcamError, match="color, scale, mean, std unknown; give --color"):
        attach(classifier(), emit=["overlay"])


def test_facts_cannot_be_replaced_when_it_runs(tmp_path):
    path = tmp_path / "explained.onnx"
    attach(classifier(), path, embed_preprocess=True, **FACTS)
    with pytest.raises(OnnxcamError, match="prepares the picture itself, as its card says; to change mean"):
        Explainer(path, preprocess={"mean": [0.5]})


def test_what_was_cropped_is_grey_and_pale(tmp_path):
    """What the model did not see is grey and pale in the drawing, and 0 in the heat map."""
    path = tmp_path / "explained.onnx"
    attach(classifier(), path, embed_preprocess=True, emit=EMIT, **{**FACTS, "resize": "crop"})
    pixels = np.zeros((1, 20, 200, 3), np.uint8)
    pixels[..., 0] = 200
    _, _, heat, drawn = session(path).run(None, {"cam_picture": pixels})
    assert not heat[..., :40].any()
    grey = round(0.55 * 0.299 * 200 + 0.45 * 255)
    assert (drawn[..., :40, :] == grey).all()


def test_runtimes_without_overridable_initializers(tmp_path):
    """Nothing but required inputs is left where that is asked for."""
    model = attach(classifier(), class_input="required", embed_preprocess=True, on_demand=True, **FACTS)
    graph = ir.to_proto(model).graph
    assert [i.name for i in graph.input] == ["cam_picture", "cam_class", "cam_wanted"]
    assert not {i.name for i in graph.input} & {t.name for t in graph.initializer}
