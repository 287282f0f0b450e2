"""Comparing methods: each row is what the method alone gives, and what cannot be applied is named."""

import dataclasses

import numpy as np
import pytest

from onnxcam.comparing import compare
from onnxcam.errors import OnnxcamError
from onnxcam.methods import METHODS
from onnxcam.runtime import Explainer
from tests.small import FACTS


def test_each_row_is_what_the_method_alone_gives(small, photo):
    names = ["gradcam++", "eigencam", "gradcam++", "gradcam"]
    options = {"preprocess": FACTS, "evidence": "both", "labels": ["a", "b", "c", "d"]}
    found = compare(small, photo, names, ["top2", "d"], layer="conv", **options)
    assert found.methods == ("gradcam++", "eigencam", "gradcam")
    assert not found.reasons
    assert found.explanations.keys() == found.seconds.keys() == set(found.methods)
    assert found.title == "model.onnx on photo.png"
    for name, explanation in found.explanations.items():
        alone = Explainer(small, method=name, layer="conv", pictures=1, **options)(photo, ["top2", "d"])
        np.testing.assert_array_equal(explanation.cam, alone.cam)
        assert explanation.classes == alone.classes
        assert explanation.card == alone.card


def test_the_sheet_shows_the_overlays_of_each(small, photo, monkeypatch):
    found = compare(small, photo, ["gradcam", "eigencam"], [0, 1], preprocess=FACTS, evidence="against")
    shown = drawn(monkeypatch, found, 0.9)
    assert shown[2:] == ("Against the class: model.onnx on photo.png", "against")
    np.testing.assert_array_equal(shown[0], found.explanations["gradcam"].image)
    for row in shown[1]:
        alone = found.explanations[row.name]
        for k, column in enumerate(row.columns):
            np.testing.assert_array_equal(column.picture, alone.overlay(k, 0.9))
            assert (column.label, column.score) == (str(k), alone.classes[k].score)


def test_a_signed_map_beside_others_says_what_its_colors_mean(small, photo, monkeypatch):
    found = compare(small, photo, ["gradcam", "inputxgradient"], preprocess=FACTS)
    assert [e.card.evidence for e in found.explanations.values()] == [None, "both"]
    signed = found.explanations["inputxgradient"]
    assert signed.heatmap.min() < 0 < signed.heatmap.max()
    rows, title, evidence = drawn(monkeypatch, found)[1:]
    assert ["red: for, blue: against" in row.facts for row in rows] == [False, True]
    assert (title, evidence) == ("model.onnx on photo.png", None)
    alone = compare(small, photo, ["inputxgradient"], preprocess=FACTS)
    rows, title, evidence = drawn(monkeypatch, alone)[1:]
    assert "red: for, blue: against" not in rows[0].facts
    assert (title, evidence) == ("For and against the class: model.onnx on photo.png", "both")


def test_another_target(small, photo):
    names = ["gradcam", "finercam"]
    options = {"preprocess": FACTS, "layer": "conv", "target": "contrast"}
    found = compare(small, photo, names, 0, against=2, **options)
    assert found.reasons == {
        "finercam": "finercam explains the target rivals, not contrast; use gradcam for that"
    }
    alone = Explainer(small, method="gradcam", **options)(photo, 0, against=2)
    np.testing.assert_array_equal(found.explanations["gradcam"].cam, alone.cam)
    other = Explainer(small, method="gradcam", **options)(photo, 0, against=1)
    assert np.abs(other.cam - alone.cam).max() > 0


def drawn(monkeypatch, found, *options):
    """What a comparison hands over to be drawn."""
    seen = []
    monkeypatch.setattr("onnxcam.comparing.comparison", lambda *given: seen.append(given))
    found.sheet(*options)
    return seen[0]


def test_a_method_that_cannot_be_applied_is_on_the_sheet_with_its_reason(small, photo, monkeypatch):
    found = compare(small, photo, ["cam", "fem"], preprocess=FACTS, layer="conv")
    assert list(found.explanations) == ["fem"]
    assert found.reasons.keys() == {"cam"}
    assert found.reasons["cam"].startswith("cam needs a head")
    rows = drawn(monkeypatch, found)[1]
    assert [(row.name, bool(row.columns), row.reason) for row in rows] == [
        ("cam", False, found.reasons["cam"]),
        ("fem", True, ""),
    ]
    assert rows[1].facts == ["at conv", "cost: none"]


def test_the_layer_is_for_methods_that_look_at_one(small, photo, monkeypatch):
    monkeypatch.setitem(METHODS, "at picture", dataclasses.replace(METHODS["hirescam"], at_picture=True))
    found = compare(small, photo, ["at picture", "hirescam"], preprocess=FACTS, layer="conv")
    assert [e.card.layer for e in found.explanations.values()] == ["image", "conv"]


def test_what_is_refused(small, small_explained, photo):
    def refused(message, model=small, image=photo, methods=("gradcam",), classes=-1, **options):
        with pytest.raises(OnnxcamError, match=message):
            compare(model, image, methods, classes, **{"preprocess": FACTS, **options})

    refused("no method 'gradcan' .did you mean 'gradcam'", methods=["gradcam", "gradcan"])
    refused("^no method to compare is given", methods=[])
    refused("is explained already, with gradcam alone; give the original model", model=small_explained)
    refused("^cannot read nowhere.png", image="nowhere.png")
    refused("does not exist", model="nowhere.onnx")
    # What is wrong with all of them is said once; otherwise each has its own reason.
    refused("^class 9 is out of range", methods=["gradcam", "fem"], classes=9)
    refused(
        "^cam: cam needs a head .*; fem: the model has no labels, so 'x' is unknown",
        methods=["cam", "fem"],
        classes="x",
        layer="conv",
    )
