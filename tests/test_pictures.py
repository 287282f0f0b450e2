"""Real weights on real photos: the maps lie where the things are."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from onnxcam.attaching import attach
from onnxcam.runtime import Explainer

MODELS = Path(__file__).parent.parent / "models"
EGYPTIAN_CAT, ESPRESSO = 285, 967


@pytest.fixture(scope="module")
def explainer(lite0):
    return Explainer(lite0)


@pytest.fixture(scope="module")
def pair(explainer):
    return explainer(MODELS / "cat_and_coffee.png", ["Egyptian cat", "espresso"])


def left_share(values):
    return values[:, : values.shape[1] // 2].sum() / values.sum()


def test_each_class_lights_up_its_own_half(pair):
    """Energy: `cam`, before any scaling, spread bilinearly over the 450 x 300 pixels of the photo."""
    assert pair.image.size == (450, 300)
    cat, coffee = (left_share(pair.viewport.to_picture(cam)[0]) for cam in pair.cam)
    assert cat >= 0.85
    assert 1 - coffee >= 0.65
    assert cat == pytest.approx(0.940, abs=0.01)  # the value of models/README.md
    assert 1 - coffee == pytest.approx(0.887, abs=0.01)


def test_scaled_maps_say_the_same(pair):
    cat, coffee = (left_share(heat) for heat in pair.heatmap)
    assert cat >= 0.85
    assert 1 - coffee >= 0.65


def test_peaks_lie_on_their_things(pair):
    """The face is left of the middle, the cup's inside at about (340, 100)."""
    (x, y), (across, down) = pair.peak(0), pair.peak(1)
    assert 20 < x < 225
    assert 20 < y < 280
    assert 235 < across < 400
    assert 20 < down < 160


def test_pictures_show_red_where_the_map_is_hot_and_the_photo_where_it_is_not(pair):
    photo = np.asarray(pair.image, float)
    for k, (other, hot) in enumerate([(slice(300, 440), (0, 225)), (slice(0, 140), (225, 450))]):
        pixels = np.asarray(pair.overlay(k), float)
        heat, _ = pair.viewport.to_picture(pair.heatmap[k])
        red, green, blue = pixels[heat > 0.95].mean(axis=0)
        assert red > 1.5 * green
        assert red > 1.5 * blue
        x, _ = pair.peak(k)
        assert hot[0] <= x < hot[1]
        # On the other thing the photo's own light and dark remain.
        mine, its = pixels[50:250, other].mean(axis=2), photo[50:250, other].mean(axis=2)
        assert np.corrcoef(mine.ravel(), its.ravel())[0, 1] > 0.9


def test_panel_shows_photo_and_both_maps(pair):
    panel = pair.panel()
    assert panel.mode == "RGB"
    assert panel.width > 3 * 400
    assert 300 < panel.height < 600


def test_chelsea_is_an_egyptian_cat(explainer):
    best = explainer(MODELS / "chelsea.png").predictions[0]
    assert (best.index, best.label) == (EGYPTIAN_CAT, "Egyptian cat")
    assert best.score == pytest.approx(0.77, abs=0.02)


def test_coffee_is_an_espresso(explainer):
    found = explainer(MODELS / "coffee.png")
    assert found.predictions[0].index == ESPRESSO
    assert found.predictions[0].score == pytest.approx(0.90, abs=0.02)
    x, y = found.peak(0)
    assert 200 < x < 420  # the cup
    assert 60 < y < 260


SQUEEZENET = {
    "color": "BGR",
    "scale": 1.0,
    "mean": [104.006, 116.669, 122.679],
    "std": [1],
    "resize": "stretch",
    "labels": (MODELS / "imagenet_labels.txt").read_text().splitlines(),
}
PP_LCNET = {
    "color": "RGB",
    "scale": 1 / 255,
    "mean": [0.485, 0.456, 0.406],
    "std": [0.229, 0.224, 0.225],
    "resize": "crop:256",
    "labels": (MODELS / "page_labels.txt").read_text().splitlines(),
}


@pytest.fixture(scope="module")
def squeezenet(tmp_path_factory):
    path = tmp_path_factory.mktemp("squeezenet") / "explained.onnx"
    attach(MODELS / "squeezenet1_1.onnx", path, **SQUEEZENET)
    return Explainer(path)


@pytest.mark.parametrize(
    ("photo", "label", "score"), [("chelsea.png", "Egyptian cat", 0.424), ("coffee.png", "espresso", 0.999)]
)
def test_squeezenet(squeezenet, photo, label, score):
    found = squeezenet(MODELS / photo, [label])
    assert found.predictions[0].label == found.classes[0].label == label
    assert found.predictions[0].score == pytest.approx(score, abs=0.02)
    assert found.note(0) is None
    assert found.overlay().size == found.image.size


def test_squeezenet_tells_the_halves_apart(squeezenet):
    found = squeezenet(MODELS / "cat_and_coffee.png", ["Egyptian cat", "espresso"])
    cat, coffee = (left_share(heat) for heat in found.heatmap)
    assert cat > 0.7 > 0.3 > coffee


def test_pp_lcnet(tmp_path):
    attach(MODELS / "pp_lcnet_orientation.onnx", tmp_path / "explained.onnx", **PP_LCNET)
    found = Explainer(tmp_path / "explained.onnx")(MODELS / "page.png", ["90", "top1"])
    assert found.card.labels == ("0", "90", "180", "270")
    assert [(c.index, c.label) for c in found.classes] == [(1, "90")]
    assert found.predictions[0].score == pytest.approx(0.927, abs=0.02)
    assert found.note(0) is None
    # What the crop left out is pale and grey.
    overlay = np.asarray(found.overlay(), int)
    margin = overlay[:, :40]
    assert np.ptp(margin, axis=-1).max() == 0
    assert margin.min() >= 114
    assert np.ptp(overlay[:, 300:340], axis=-1).max() > 40


def test_model_is_run_by_its_card_alone(lite0, tmp_path):
    """A copy of the file elsewhere needs nothing else."""
    copy = tmp_path / "copy.onnx"
    copy.write_bytes(lite0.read_bytes())
    with Image.open(MODELS / "chelsea.png") as photo:
        assert Explainer(copy)(photo, "EGYPTIAN CAT").classes[0].index == EGYPTIAN_CAT
