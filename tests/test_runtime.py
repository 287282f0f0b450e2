"""Explainer and Explanation: what goes in, what comes out, and what is refused."""

import dataclasses
import json
import os
import re
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper
from PIL import Image

import onnxcam.runtime
import onnxcam.sessions
from onnxcam.attaching import attach
from onnxcam.card import KEY, Card
from onnxcam.errors import OnnxcamError
from onnxcam.image import Viewport
from onnxcam.methods import METHODS
from onnxcam.runtime import MANY_RUNS, Explainer, Explanation, Prediction
from onnxcam.sessions import Plan
from tests.checks import quiet, relative_error
from tests.small import FACTS, classifier, floats

LABELS = ["cat", "dog", "Cow", "90"]


@pytest.fixture(scope="module")
def explainer(small_explained):
    return Explainer(small_explained)


@pytest.fixture(scope="module")
def best(explainer, photo):
    """The classes of the photo, best first."""
    return [p.index for p in explainer(photo).predictions]


def explained(folder, *, options=None, **model):
    path = folder / "explained.onnx"
    attach(classifier(**model), path, **{**FACTS, **(options or {})})
    return path


def refused(message, call, *arguments, **options):
    with pytest.raises(OnnxcamError) as caught:
        call(*arguments, **options)
    assert str(caught.value) == message


# The maps


def test_explanation_holds_what_the_model_says(explainer, photo, small_explained):
    found = explainer(photo, [2, 0])
    assert isinstance(found, Explanation)
    assert (found.cam.shape, found.heatmap.shape) == ((2, 8, 12), (2, 8, 12))
    assert (found.cam.dtype, found.heatmap.dtype) == (np.float32, np.float32)
    assert [c.index for c in found.classes] == [2, 0]
    assert [c.label for c in found.classes] == ["Cow", "cat"]
    assert len(found.predictions) == 4
    assert sum(p.score for p in found.predictions) == pytest.approx(1)
    assert [p.score for p in found.predictions] == sorted((p.score for p in found.predictions), reverse=True)
    assert found.image.size == (40, 30)
    assert (found.model, found.name) == (str(small_explained), str(photo))
    assert found.provider == "CPUExecutionProvider"
    x = np.asarray(Image.open(photo).resize((12, 8), Image.Resampling.BILINEAR), np.float32)
    feed = ((x / 255 - 0.5) / 0.5).transpose(2, 0, 1)[None].astype(np.float32)
    session = onnxruntime.InferenceSession(small_explained, quiet())
    scores, cam, heat = session.run(None, {"image": feed, "cam_class": np.array([[2, 0]])})
    np.testing.assert_allclose(found.cam, cam[0], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found.heatmap, heat[0], rtol=1e-4, atol=1e-6)
    weights = np.exp(scores[0] - scores[0].max())
    assert found.classes[0].score == pytest.approx(weights[2] / weights.sum(), rel=1e-5)


def test_plain_model_is_attached_in_memory(small, explainer, photo):
    before = small.read_bytes()
    plain = Explainer(small, preprocess=FACTS, labels=LABELS)
    assert plain.card == explainer.card
    np.testing.assert_array_equal(plain(photo, "top4").cam, explainer(photo, "top4").cam)
    assert plain(photo).model == str(small)
    assert small.read_bytes() == before
    assert {path.name for path in small.parent.iterdir()} == {"model.onnx", "explained.onnx"}


def test_options_reach_a_plain_model(small, photo):
    made = Explainer(small, preprocess=FACTS, layer="conv", method="hirescam", score="after", scores="scores")
    assert (made.card.layer, made.card.method, made.card.score) == ("conv", "hirescam", "after")
    assert made(photo).cam.shape == (1, 8, 12)
    with pytest.raises(OnnxcamError, match="the model has no layer 'cnv' \\(did you mean 'conv'"):
        Explainer(small, preprocess=FACTS, layer="cnv")


def test_options_of_the_map_reach_a_plain_model(small, photo):
    options = {"evidence": "against", "smooth": ["eigen"], "compat": "paper"}
    made = Explainer(small, preprocess=FACTS, layer=["conv", "features"], fuse="product", **options)
    card = made.card
    assert (card.layer, card.fuse, card.evidence) == ("conv, features", "product", "against")
    assert (card.smooth, card.compat) == (("eigen",), None)
    assert Explainer(small, preprocess=FACTS, layer=["conv"], fuse="max").card.fuse is None
    refused("no layer is given; leave it out for the default", Explainer, small, preprocess=FACTS, layer=[])


def test_evidence_against_is_what_gradcam_leaves_out(small, photo):
    """gradcam = max(0, all); against = min(0, all); counterfactual = -min(0, all) at this linear head."""
    maps = {
        evidence: Explainer(small, preprocess=FACTS, layer="conv", evidence=evidence)(photo, "top4")
        for evidence in (None, "for", "against", "both", "counterfactual")
    }
    cam = {evidence: found.cam for evidence, found in maps.items()}
    assert (cam["both"] < 0).any()
    assert (cam["both"] > 0).any()
    np.testing.assert_array_equal(cam["for"], cam[None])
    np.testing.assert_array_equal(cam["for"], np.maximum(cam["both"], 0))
    np.testing.assert_array_equal(cam["against"], np.minimum(cam["both"], 0))
    np.testing.assert_allclose(cam["counterfactual"], -cam["against"], rtol=1e-4, atol=1e-6)
    # The heat map of both is as large as the picture's plane, so scaling is all that was done to it.
    largest = np.abs(cam["both"]).max(axis=(1, 2), keepdims=True)
    np.testing.assert_allclose(maps["both"].heatmap, cam["both"] / largest, rtol=1e-5, atol=1e-6)
    assert maps["against"].heatmap.max() == 0
    assert maps["against"].heatmap.min() == -1


def test_smoothings_of_an_explained_model_may_be_named_in_any_order(tmp_path):
    path = explained(tmp_path, options={"smooth": ["eigen", "augmentation"]})
    assert Explainer(path, smooth=["augmentation", "eigen"]).card.smooth == ("eigen", "augmentation")


@pytest.mark.parametrize(
    ("option", "known"), [("layer", "features"), ("method", "gradcam"), ("score", "before")]
)
def test_options_of_an_explained_model_must_be_those_of_its_card(small_explained, option, known):
    assert Explainer(small_explained, **{option: known}).card
    other = {"layer": "conv", "method": "hirescam", "score": "after"}[option]
    refused(
        f"{small_explained} is explained already, with {option} {known!r} instead of {other!r}; "
        "attach to the original model for another",
        Explainer,
        small_explained,
        **{option: other},
    )


def test_layer_may_be_given_by_its_module_path(lite0):
    assert Explainer(lite0, layer="_swish").card.layer == Explainer(lite0, layer="hardtanh_32").card.layer


def test_three_images_of_two_classes_equal_six_single_runs(small_explained):
    session = onnxruntime.InferenceSession(small_explained, quiet())
    x = np.random.default_rng(1).standard_normal((3, 3, 8, 12)).astype(np.float32)
    classes = np.array([[0, -1], [3, 1], [-4, 2]])
    whole = session.run(["cam", "cam_heatmap"], {"image": x, "cam_class": classes})
    for n in range(3):
        for k in range(2):
            one = session.run(
                ["cam", "cam_heatmap"], {"image": x[n : n + 1], "cam_class": classes[n : n + 1, k : k + 1]}
            )
            for batch, single in zip(whole, one, strict=True):
                assert relative_error(batch[n, k], single[0, 0]) < 1e-6


# Pictures


def test_a_picture_may_be_a_path_a_pillow_image_or_an_array(explainer, photo):
    with Image.open(photo) as opened:
        forms = [photo, str(photo), opened, opened.convert("RGBA"), np.asarray(opened)]
        found = [explainer(form) for form in forms]
    for other in found[1:]:
        np.testing.assert_array_equal(other.cam, found[0].cam)
        assert other.image.tobytes() == found[0].image.tobytes()
    assert [other.name for other in found] == [str(photo), str(photo), None, None, None]


def test_grey_array(explainer):
    grey = np.random.default_rng(0).integers(0, 256, (20, 10), np.uint8)
    found = explainer(grey)
    np.testing.assert_array_equal(found.image, np.repeat(grey[..., None], 3, axis=-1))


def test_rotated_photo_stands_upright_however_it_is_given(explainer, photo, tmp_path):
    with Image.open(photo) as opened:
        exif = opened.getexif()
        exif[0x0112] = 6
        opened.save(tmp_path / "turned.png", exif=exif)
        upright = opened.transpose(Image.Transpose.ROTATE_270)
    with Image.open(tmp_path / "turned.png") as turned:
        for form in (tmp_path / "turned.png", turned):
            found = explainer(form)
            assert found.image.tobytes() == upright.tobytes()
            assert found.overlay().size == (30, 40)


@pytest.mark.parametrize(
    ("picture", "what"),
    [
        (np.zeros((8, 8, 3), np.float32), r"float32 \[8, 8, 3\]"),
        (np.zeros((3, 8, 8), np.uint8), r"uint8 \[3, 8, 8\]"),
        (np.zeros((8, 8, 4), np.uint8), r"uint8 \[8, 8, 4\]"),
        (np.zeros((1, 8, 8, 3), np.uint8), r"uint8 \[1, 8, 8, 3\]"),
        (np.zeros((0, 8, 3), np.uint8), r"uint8 \[0, 8, 3\]"),
        (np.zeros(8, np.uint8), r"uint8 \[8\]"),
        (None, r"object \[\]"),
    ],
)
def test_arrays_that_are_no_picture(explainer, picture, what):
    with pytest.raises(OnnxcamError, match=rf"a picture must be a file, .*, not {what}$"):
        explainer(picture)


def test_pillow_image_whose_file_is_cut_short(explainer, photo, tmp_path):
    (tmp_path / "short.png").write_bytes(photo.read_bytes()[:2000])
    with Image.open(tmp_path / "short.png") as opened, pytest.raises(OnnxcamError, match="cannot be read"):
        explainer(opened)


# Classes


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        (2, [2]),
        (np.int64(2), [2]),
        ([0, 3], [0, 3]),
        ((1,), [1]),
        (np.array([1, 3]), [1, 3]),
        ("1", [1]),
        (" 1 ", [1]),
        ("dog", [1]),
        ("DOG", [1]),
        (" cow", [2]),
        ("90", [3]),
        (["cat", 3, "2"], [0, 3, 2]),
        ([3, "90", 3], [3]),
    ],
)
def test_forms_of_a_class(explainer, photo, request_, expected):
    assert [c.index for c in explainer(photo, request_).classes] == expected


@pytest.mark.parametrize(
    ("request_", "ranks"),
    [
        (-1, [0]),
        (-4, [3]),
        ("-2", [1]),
        ("top1", [0]),
        ("Top3", [0, 1, 2]),
        ("top4", [0, 1, 2, 3]),
        ([-2, "top2"], [1, 0]),
    ],
)
def test_classes_by_rank(explainer, photo, best, request_, ranks):
    found = explainer(photo, request_)
    assert [c.index for c in found.classes] == [best[rank] for rank in ranks]
    for k, prediction in enumerate(found.classes):
        np.testing.assert_allclose(found.cam[k], explainer(photo, prediction.index).cam[0], rtol=1e-5)


def test_best_class_is_explained_unless_asked_otherwise(explainer, photo, best):
    assert [c.index for c in explainer(photo).classes] == best[:1]


def test_a_class_asked_for_twice_is_explained_once(explainer, photo, best):
    found = explainer(photo, [best[0], -1, "top2", best[1]])
    assert [c.index for c in found.classes] == best[:2]
    assert found.cam.shape[0] == 2


@pytest.mark.parametrize("request_", [4, -5, "4", "-5", "top5", "top999999", [0, 4], 10**30, "1000"])
def test_class_out_of_range(explainer, photo, request_):
    with pytest.raises(
        OnnxcamError, match=r"^class -?\d+ is out of range: the model has 4 classes \(0 to 3,"
    ):
        explainer(photo, request_)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ("dgo", "no class is called 'dgo' (did you mean 'dog'?)"),
        ("zzzz", "no class is called 'zzzz'"),
        ("top0", "no class is called 'top0'"),
        ("9.5", "no class is called '9.5'"),
        ("", "a class is empty; give an index, a label or top3"),
        (["cat", "  "], "a class is empty; give an index, a label or top3"),
        ([], "no class to explain is given"),
        (1.0, "class 1.0 is neither an index nor a label"),
        (None, "class None is neither an index nor a label"),
    ],
)
def test_class_that_does_not_exist(explainer, photo, request_, message):
    refused(message, explainer, photo, request_)


def test_class_is_checked_before_the_picture_is_read(explainer):
    refused("no class is called 'dgo' (did you mean 'dog'?)", explainer, "no such file", "dgo")


def test_label_that_several_classes_have(small_explained):
    twice = Explainer(small_explained, labels=["crane", "cat", "Crane", "dog"])
    refused("2 classes are called 'crane'; give an index: 0, 2", twice.resolve, "crane")


def test_number_that_is_index_and_label_is_the_index(small_explained):
    turned = Explainer(small_explained, labels=["0", "90", "180", "270"])
    assert turned.resolve(["0", "90", "180", "270", "3"]) == [0, 1, 2, 3, 3]
    refused(
        "class 45 is out of range: the model has 4 classes (0 to 3, or -1 to -4 by rank)",
        turned.resolve,
        "45",
    )


def test_model_without_labels(small, photo):
    plain = Explainer(small, preprocess=FACTS)
    assert [p.label for p in plain(photo, [1, 0]).classes] == ["1", "0"]
    refused(
        "the model has no labels, so 'cat' is unknown; give a class index or --labels", plain, photo, "cat"
    )


@pytest.mark.parametrize("labels", [["a"], [], list("abcde")])
def test_labels_must_be_as_many_as_the_classes(small, small_explained, labels):
    message = f"there are {len(labels)} labels for 4 classes"
    refused(message, Explainer, small_explained, labels=labels)
    refused(message, Explainer, small, labels=labels, preprocess=FACTS)


def disguise(monkeypatch, place, **fields):
    """Let onnxruntime's sessions state something else of their first input or output."""

    class Session(onnxruntime.InferenceSession):
        pass

    def told(self):
        first, *others = getattr(onnxruntime.InferenceSession, place)(self)
        known = {"name": first.name, "shape": first.shape, "type": first.type}
        return [SimpleNamespace(**{**known, **fields}), *others]

    setattr(Session, place, told)
    monkeypatch.setattr(onnxcam.sessions, "_session", lambda path, *_: Session(path, quiet()))


def test_number_of_classes_that_the_graph_leaves_open(small, small_explained, monkeypatch, photo):
    disguise(monkeypatch, "get_outputs", shape=["N", "M"])
    open_ = Explainer(small, preprocess=FACTS)
    assert [c.index for c in open_(photo, [3]).classes] == [3]
    for wrong in (4, "-5", "top5"):
        with pytest.raises(OnnxcamError, match="out of range: the model has 4 classes"):
            open_(photo, wrong)
    named = Explainer(small_explained)
    assert named.resolve(["cow", "-4"]) == [2, -4]
    with pytest.raises(OnnxcamError, match="class 4 is out of range"):
        named.resolve(4)
    refused("there are 3 labels for 4 classes", Explainer(small_explained, labels=list("abc")), photo)


# Facts


def test_missing_facts_are_listed_with_their_options(small):
    refused(
        "the model does not say how a picture becomes its input: color, scale, mean, std, resize unknown; "
        "give --color, --scale, --mean, --std, --resize",
        Explainer,
        small,
    )
    refused(
        "the model does not say how a picture becomes its input: std unknown; give --std",
        Explainer,
        small,
        preprocess={**FACTS, "std": None},
    )


def test_facts_of_the_card_are_replaced_by_those_given(small_explained, photo):
    other = Explainer(small_explained, preprocess={"mean": [0.1, 0.2, 0.3], "interpolation": "nearest"})
    assert other.card.input.mean == (0.1, 0.2, 0.3)
    assert other.card.input.std == (0.5,)
    assert not np.array_equal(other(photo).cam, Explainer(small_explained)(photo).cam)
    assert Explainer(small_explained, preprocess={"mean": np.array([0.5])}).card.input.mean == (0.5,)


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"height": 16}, "height is given as 16, but the model's input has 8"),
        ({"width": 8}, "width is given as 8, but the model's input has 12"),
        ({"layout": "NHWC"}, "layout is given as NHWC, but the model's input has NCHW"),
        ({"color": "GRAY"}, "color is GRAY, but the model's input has 3 channels"),
        ({"std": [1, 2]}, "std has 2 values; give one, or one for each channel of RGB"),
    ],
)
def test_facts_that_do_not_fit_the_model(small_explained, facts, message):
    refused(message, Explainer, small_explained, preprocess=facts)


# Models


def test_half_precision(tmp_path, photo, explainer):
    found = Explainer(explained(tmp_path, dtype=np.float16))(photo, [0, 1, 2, 3])
    expected = explainer(photo, [0, 1, 2, 3])
    assert found.cam.dtype == found.heatmap.dtype == np.float32
    assert relative_error(found.cam, expected.cam) < 1e-2
    assert [p.index for p in found.predictions] == [p.index for p in expected.predictions]


def test_double_precision_input(tmp_path, photo, explainer):
    model = classifier()
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.DOUBLE
    model.graph.node[0].input[0] = "single"
    model.graph.node.insert(0, helper.make_node("Cast", ["image"], ["single"], to=TensorProto.FLOAT))
    attach(model, tmp_path / "x.onnx", **FACTS)
    found = Explainer(tmp_path / "x.onnx")(photo, "top4")
    np.testing.assert_allclose(found.cam, explainer(photo, "top4").cam, rtol=1e-4, atol=1e-6)


def test_branch_that_onnxruntime_cannot_run(small, monkeypatch):
    """It may lack a kernel that the gradient needs and the model does not."""
    real = onnxcam.sessions._session

    def session(path, provider, plan):
        if path != str(small):
            raise RuntimeError("no implementation of Where")
        return real(path, provider, plan)

    monkeypatch.setattr(onnxcam.sessions, "_session", session)
    said = f"onnxruntime cannot load {small} with its maps: no implementation of Where"
    with pytest.raises(OnnxcamError, match=f"^{re.escape(said)}$"):
        Explainer(small, preprocess=FACTS)


def test_precision_that_onnxruntime_lacks(tmp_path, capfd):
    """Its Conv has no double precision on a CPU."""
    path = explained(tmp_path, dtype=np.float64)
    with pytest.raises(OnnxcamError, match=r"^onnxruntime cannot load .* implementation for Conv.* 'conv1'$"):
        Explainer(path)
    assert capfd.readouterr().err == ""


def test_precision_that_cannot_be_fed(monkeypatch, small_explained):
    disguise(monkeypatch, "get_inputs", type="tensor(bfloat16)")
    with pytest.raises(
        OnnxcamError, match=r"takes tensor\(bfloat16\); onnxcam feeds tensor\(float\), tensor"
    ):
        Explainer(small_explained)


@pytest.mark.parametrize("batch", [1, 4])
def test_fixed_batch(tmp_path, photo, explainer, batch):
    found = Explainer(explained(tmp_path, batch=batch))(photo, "top3")
    np.testing.assert_allclose(found.cam, explainer(photo, "top3").cam, rtol=1e-5, atol=1e-6)
    assert [p.index for p in found.predictions] == [p.index for p in explainer(photo).predictions]


def test_channels_last(tmp_path, photo, explainer):
    model = Explainer(explained(tmp_path, nhwc=True))
    assert (model.card.input.layout, model.card.input.height, model.card.input.width) == ("NHWC", 8, 12)
    found = model(photo, "top4")
    np.testing.assert_allclose(found.cam, explainer(photo, "top4").cam, rtol=1e-5, atol=1e-6)
    assert found.overlay().size == (40, 30)


def test_grey_model(tmp_path, photo):
    path = explained(tmp_path, channels=1, options={"color": None})
    model = Explainer(path)
    assert model.card.input.color == "GRAY"
    assert model(photo).image.mode == "RGB"
    refused(
        "color is RGB, but the model's input has 1 channels", Explainer, path, preprocess={"color": "RGB"}
    )


def test_size_that_the_graph_leaves_open(tmp_path, photo, explainer):
    path = explained(tmp_path, size=("H", "W"))
    refused(
        "the model does not say how a picture becomes its input: height, width unknown; give --size",
        Explainer,
        path,
    )
    found = Explainer(path, preprocess={"height": 8, "width": 12})(photo, "top2")
    np.testing.assert_allclose(found.cam, explainer(photo, "top2").cam, rtol=1e-5, atol=1e-6)
    larger = Explainer(path, preprocess={"height": 16, "width": 20})(photo)
    assert larger.heatmap.shape == (1, 16, 20)


def test_probabilities_are_the_models_own(tmp_path, photo, explainer):
    model = Explainer(explained(tmp_path, softmax=True))
    assert model.card.scores_are == "probabilities"
    for mine, other in zip(model(photo).predictions, explainer(photo).predictions, strict=True):
        assert mine.index == other.index
        assert mine.score == pytest.approx(other.score, rel=1e-5)
    # Before the softmax is found: the map is that of the logits.
    np.testing.assert_allclose(model(photo).cam, explainer(photo).cam, rtol=1e-5, atol=1e-6)


def test_score_after_softmax_is_another_map(tmp_path, photo, explainer):
    after = Explainer(explained(tmp_path, options={"score": "after"}))
    assert relative_error(after(photo, 0).cam, explainer(photo, 0).cam) > 0.01


def test_required_class_input(tmp_path, photo, explainer):
    model = Explainer(explained(tmp_path, options={"class_input": "required"}))
    np.testing.assert_array_equal(model(photo).cam, explainer(photo).cam)


@pytest.mark.parametrize(("emit", "lacking"), [(["cam"], "cam_heatmap"), (["heatmap", "gradients"], "cam")])
def test_model_that_lacks_an_output(tmp_path, emit, lacking):
    path = explained(tmp_path, options={"emit": emit})
    refused(f"{path} has no output {lacking!r}; attach again with --emit cam,heatmap", Explainer, path)


def test_card_that_names_another_input(tmp_path, small_explained):
    model = onnx.load(small_explained)
    card = json.loads(Card.from_metadata({p.key: p.value for p in model.metadata_props}).to_json())
    card["input"]["name"] = "picture"
    del model.metadata_props[:]
    helper.set_model_props(model, {KEY: json.dumps(card)})
    onnx.save(model, tmp_path / "x.onnx")
    with pytest.raises(OnnxcamError, match=r"has no input 'picture'; attach again"):
        Explainer(tmp_path / "x.onnx")


def test_card_that_is_damaged(tmp_path, small):
    model = onnx.load(small)
    helper.set_model_props(model, {KEY: '{"format": 1}'})
    onnx.save(model, tmp_path / "x.onnx")
    with pytest.raises(OnnxcamError, match="card is damaged"):
        Explainer(tmp_path / "x.onnx")


def test_model_with_a_further_input(tmp_path, photo, capfd):
    extra = [helper.make_node("Mul", ["features", "factor"], ["changed"])]
    path = explained(tmp_path, extra=extra, inputs=[floats("factor", [1])])
    with pytest.raises(OnnxcamError, match=r"^onnxruntime cannot run .*factor"):
        Explainer(path)(photo)
    assert capfd.readouterr().err == ""


def test_picture_that_the_model_cannot_take(tmp_path, photo, capfd):
    """Its sizes are open, but a constant wants 8 x 12."""
    wants = onnx.numpy_helper.from_array(np.zeros((1, 6, 8, 12), np.float32), "wants")
    extra = [helper.make_node("Add", ["features", "wants"], ["changed"], "picky")]
    path = explained(tmp_path, size=("H", "W"), extra=extra, weights=[wants])
    with pytest.raises(OnnxcamError, match=r"^onnxruntime cannot run .*picky"):
        Explainer(path, preprocess={"height": 9, "width": 12})(photo)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_scores_that_are_not_finite(tmp_path, photo, bad):
    factor = onnx.numpy_helper.from_array(np.float32([bad]), "factor")
    extra = [helper.make_node("Mul", ["features", "factor"], ["changed"])]
    path = explained(tmp_path, extra=extra, weights=[factor])
    refused(
        f"{path} gives {photo} scores that are not finite; "
        "check how the picture is prepared (scale, mean, std)",
        Explainer(path),
        photo,
    )


def test_running_warns_of_nothing(small_explained, photo, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Explainer(small_explained)(photo)
    assert capfd.readouterr() == ("", "")


# Providers


def test_provider_that_is_not_available(small_explained):
    refused(
        "provider 'cuda' is not available; this onnxruntime has: cpu; "
        "for CUDA: pip uninstall onnxruntime && pip install 'onnxcam[gpu]'",
        Explainer,
        small_explained,
        provider="cuda",
    )
    refused(
        "provider 'tpu' is not available; this onnxruntime has: cpu",
        Explainer,
        small_explained,
        provider="tpu",
    )


def test_provider_that_does_not_start(small_explained, monkeypatch):
    """onnxruntime then falls back to the CPU without an error; onnxcam does not."""
    both = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: both)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(
            OnnxcamError, match="onnxruntime has CUDAExecutionProvider but cannot start it here"
        ):
            Explainer(small_explained, provider="cuda")


def test_broken_runtime(small_explained, monkeypatch):
    """What is left of the shared folder after one of onnxruntime and onnxruntime-gpu was uninstalled."""
    monkeypatch.delattr(onnxruntime, "get_available_providers")
    with pytest.raises(
        OnnxcamError, match=r"installed but broken .* uninstall onnxruntime and onnxruntime-gpu"
    ):
        Explainer(small_explained)


# What an Explanation makes of its maps


def made(cam, heatmap=None, size=(40, 20), **changes):
    cam = np.asarray(cam, np.float32)[None]
    card = dataclasses.replace(
        Card.from_metadata({KEY: json.dumps({**json.loads(CARD), "input": {"name": "x", "layout": "NCHW"}})}),
        **changes,
    )
    prediction = Prediction(1, "dog", 0.75)
    return Explanation(
        image=Image.new("RGB", size, (100, 150, 200)),
        viewport=Viewport(0, 0, *size, *size),
        predictions=(prediction,),
        classes=(prediction,),
        cam=cam,
        heatmap=np.zeros_like(cam) if heatmap is None else np.asarray(heatmap, np.float32)[None],
        card=card,
        model="m.onnx",
        provider="CPUExecutionProvider",
        name="a.png",
    )


CARD = json.dumps(
    {
        "format": 1,
        "scores": "y",
        "scores_are": "logits",
        "layer": "relu",
        "method": "gradcam",
        "score": "before",
        "tool": "onnxcam 0",
    }
)


@pytest.mark.parametrize(
    ("cam", "note"),
    [
        ([[0, 0], [0, 0]], "all zero"),
        ([[2, 2], [2, 2]], "flat"),
        ([[0, np.nan], [1, 2]], "not finite"),
        ([[0, np.inf], [1, 2]], "not finite"),
        ([[0, -1], [-2, -3]], "all negative"),
        ([[0, 0], [0, 1e-9]], None),
        ([[-1, 0], [0, 1e-9]], None),
    ],
)
def test_note_says_why_a_map_shows_nothing(cam, note):
    found = made(cam, np.zeros((2, 2)) if note else [[0, 0], [0, 1]])
    assert found.note(0) == note
    row = found.to_dict()["explanations"][0]
    assert row["note"] == note
    assert (row["peak"] is None) == (note is not None)
    json.dumps(found.to_dict(), allow_nan=False)
    assert found.overlay().size == found.image.size
    assert found.panel().width > found.image.width


@pytest.mark.parametrize(
    ("evidence", "cam", "note", "remark"),
    [
        (None, [[0, 0]], "all zero", "the map is all zero: nothing speaks for the class"),
        ("for", [[0, 0]], "all zero", "the map is all zero: nothing speaks for the class"),
        ("against", [[0, 0]], "all zero", "the map is all zero: nothing speaks against the class"),
        ("counterfactual", [[0, 0]], "all zero", "the map is all zero: nothing speaks against the class"),
        ("both", [[0, 0]], "all zero", "the map is all zero: nothing speaks for or against the class"),
        ("both", [[-2, -1]], "all negative", "the map is all negative: nothing speaks for the class"),
        ("against", [[-2, -1]], None, ""),
        ("both", [[-1, 1]], None, ""),
        ("both", [[np.nan, 1]], "not finite", "the map is not finite"),
    ],
)
def test_remark_says_it_for_a_person(evidence, cam, note, remark):
    found = made(cam, evidence=evidence)
    assert (found.note(0), found.remark(0)) == (note, remark)


def test_evidence_against_has_a_peak_where_it_is_strongest():
    heat = np.zeros((4, 4))
    heat[3, 1] = -1
    heat[0, 0] = 0.5
    assert made(heat, heat, evidence="both").peak(0) == (15, 17)
    assert made(np.minimum(heat, 0), np.minimum(heat, 0), evidence="against").peak(0) == (15, 17)
    all_negative = made(heat - 1, heat - 1, evidence="both")
    assert all_negative.note(0) == "all negative"
    assert all_negative.peak(0) == (15, 17)


def test_overlay_shows_evidence_against_in_blue_and_for_in_red():
    heat = np.array([[-1, 0, 0, 1]])
    for evidence, values in (
        ("both", heat),
        ("against", np.minimum(heat, 0)),
        ("counterfactual", np.maximum(-heat, 0)),
    ):
        pixels = np.asarray(made(values, values, evidence=evidence).overlay(0), int)[10]
        left, middle, right = pixels[0], pixels[20], pixels[39]
        assert left[2] > 1.5 * left[0], evidence
        assert np.ptp(middle) <= 1, evidence  # the photo's own grey
        if evidence == "both":
            assert right[0] > 1.5 * right[2]
        else:
            np.testing.assert_array_equal(right, middle)


@pytest.mark.parametrize(
    ("evidence", "start"),
    [
        (None, "gradcam at relu"),
        ("for", "For the class: gradcam"),
        ("against", "Against the class: gradcam"),
        ("both", "For and against the class: gradcam"),
        ("counterfactual", "Counterfactual, against the class: gradcam"),
    ],
)
def test_panel_says_which_evidence_it_shows(monkeypatch, evidence, start):
    seen = []
    monkeypatch.setattr(onnxcam.runtime, "panel", lambda *given: seen.append(given))
    made([[0, 0]], evidence=evidence).panel()
    ((_, (column,), title, shown),) = seen
    assert title.startswith(start)
    assert shown == evidence
    assert column.note.startswith("the map is all zero: nothing speaks")


def test_peak_is_in_pixels_of_the_photo():
    heat = np.zeros((4, 4))
    heat[3, 1] = 1
    assert made(heat, heat).peak(0) == (15, 17)  # the centre of a cell of 10 x 5 pixels
    heat[3, 1], heat[0, 0] = 0, 1
    assert made(heat, heat, size=(1, 1)).peak(0) == (0, 0)


def test_peak_in_a_crop():
    heat = np.zeros((4, 4))
    heat[0, 3] = 1
    cropped = dataclasses.replace(made(heat, heat), viewport=Viewport(10, 0, 30, 20, 40, 20))
    assert cropped.peak(0) == (27, 2)


def test_dict_has_all_that_json_shows(explainer, photo, small_explained):
    found = explainer(photo, ["cat", -1])
    row = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert row.keys() == {"image", "predictions", "explanations", "model", "provider"}
    assert row["predictions"] == [dataclasses.asdict(p) for p in found.predictions]
    first = row["explanations"][0]
    assert first["minimum"] == found.cam[0].min()
    assert first["maximum"] == found.cam[0].max()
    assert first["peak"] == list(found.peak(0))
    assert (first["class"], first["label"], first["method"], first["layer"]) == (
        0,
        "cat",
        "gradcam",
        "features",
    )
    assert (row["image"], row["model"]) == (str(photo), str(small_explained))


def test_overlay_is_hottest_at_the_peak(explainer, photo):
    found = explainer(Image.new("RGB", (1200, 800), (128, 128, 128)), "top4")
    for k in range(4):
        if found.note(k) is None:
            pixels = np.asarray(found.overlay(k), int)
            x, y = found.peak(k)
            redness = pixels[..., 0] - pixels[..., 1]
            assert redness[y, x] >= 0.95 * redness.max()


def test_panel_of_a_large_photo_is_the_panel_of_its_overlays(explainer):
    photo = Image.effect_mandelbrot((1500, 1000), (-2, -1.2, 1, 1.2), 60).convert("RGB")
    found = explainer(photo, 0)
    quick = np.asarray(found.panel(), int)
    slow = onnxcam.runtime.panel(
        photo,
        [onnxcam.runtime.Column(found.overlay(0), found.classes[0].label, found.classes[0].score)],
        "gradcam at features",
    )
    assert quick.shape == np.shape(slow)
    assert np.abs(quick - np.asarray(slow, int)).mean() < 1


# Many pictures


def test_many_pictures_come_in_order_each_as_alone(explainer, photo):
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (9 + i, 12, 3), np.uint8) for i in range(7)]
    found = list(explainer.many([photo, *pictures], [2, 0]))
    for mine, picture in zip(found, [photo, *pictures], strict=True):
        alone = explainer(picture, [2, 0])
        np.testing.assert_array_equal(mine.cam, alone.cam)
        assert mine.image.size == alone.image.size
        assert mine.predictions == alone.predictions


def test_many_stop_at_a_picture_that_cannot_be_read(explainer, photo, tmp_path):
    found = explainer.many([photo, tmp_path / "none.png", photo])
    next(found)
    with pytest.raises(OnnxcamError, match="none\\.png"):
        next(found)


def test_no_more_pictures_are_read_than_are_needed_soon(explainer, photo):
    read = []
    found = explainer.many(photo for n in range(50) if not read.append(n))
    next(found)
    assert len(read) <= 4
    found.close()
    assert len(read) <= 4


def test_few_pictures_get_the_same_maps(lite0, monkeypatch):
    levels = []
    real = onnxcam.sessions._session

    def session(path, provider, plan):
        opened = real(path, provider, plan)
        levels.append(opened.get_session_options().graph_optimization_level)
        return opened

    monkeypatch.setattr(onnxcam.sessions, "_session", session)
    photo = Image.open(Path(__file__).parents[1] / "models" / "chelsea.png")
    many, few = (Explainer(lite0, pictures=n)(photo, ["top2", 0]) for n in (None, 5))
    level = onnxruntime.GraphOptimizationLevel
    assert levels == [level.ORT_ENABLE_ALL, level.ORT_ENABLE_EXTENDED]
    assert [c.index for c in few.classes] == [c.index for c in many.classes]
    np.testing.assert_allclose(few.heatmap, many.heatmap, atol=1e-5)


@pytest.mark.parametrize(
    ("pictures", "cores", "plan"),
    [
        (None, 4, Plan(blocked=True, at_once=2, threads=None)),
        (1, 4, Plan(blocked=False, at_once=1, threads=None)),
        (3, 4, Plan(blocked=False, at_once=3, threads=2)),
        (6, 4, Plan(blocked=True, at_once=4, threads=1)),
        (500, 2, Plan(blocked=True, at_once=2, threads=1)),
        (500, 1, Plan(blocked=True, at_once=1, threads=None)),
        (500, 20, Plan(blocked=True, at_once=8, threads=13)),
        (0, 4, Plan(blocked=False, at_once=1, threads=None)),
    ],
)
def test_cores_are_shared_among_the_pictures_at_work(pictures, cores, plan, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)), raising=False)
    assert Plan.of(pictures) == plan


def test_several_pictures_get_the_same_maps(lite0, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1}, raising=False)
    photo = Image.open(Path(__file__).parents[1] / "models" / "chelsea.png")
    pictures = [photo.rotate(angle) for angle in range(0, 70, 10)]
    told = Explainer(lite0, pictures=len(pictures))
    assert told._session.get_session_options().intra_op_num_threads == 1
    for mine, alone in zip(told.many(pictures), map(Explainer(lite0), pictures), strict=True):
        assert mine.classes[0].index == alone.classes[0].index
        np.testing.assert_allclose(mine.heatmap, alone.heatmap, atol=1e-5)


def test_a_method_of_many_runs_is_opened_for_many(small, tmp_path, monkeypatch):
    cheap = ("none", "1 backward", "2 backward")
    assert set(MANY_RUNS) == {name for name, method in METHODS.items() if method.cost not in cheap}
    chosen = []
    real = onnxcam.sessions._session

    def session(path, provider, plan):
        chosen.append(plan.blocked)
        return real(path, provider, plan)

    monkeypatch.setattr(onnxcam.sessions, "_session", session)
    Explainer(small, method="scorecam", pictures=1, preprocess=FACTS)
    assert chosen == [False, True]
    attach(small, tmp_path / "explained.onnx", method="scorecam", **FACTS)
    Explainer(tmp_path / "explained.onnx", pictures=1)
    assert chosen == [False, True, False, True]
