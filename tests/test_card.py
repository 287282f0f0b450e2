"""The card: what it says, what it refuses, and the way through JSON."""

import dataclasses
import json

import pytest

from onnxcam.card import FORMAT, KEY, Card, Preprocess
from onnxcam.errors import OnnxcamError, suggest

FULL = Preprocess(
    name="image",
    layout="NHWC",
    height=224,
    width=192,
    color="BGR",
    scale=1 / 255,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    resize="crop:256",
    interpolation="bicubic",
)
CARD = Card(
    input=FULL,
    scores="logits",
    scores_are="logits",
    layer="relu_7",
    method="gradcam",
    score="before",
    tool="onnxcam 0.1.0",
    module="layer4.2",
    labels=("chat égyptien", "кот", "猫"),
)
BARE = Card(
    input=Preprocess("x"),
    scores="y",
    scores_are="probabilities",
    layer="a",
    method="cam",
    score="after",
    tool="onnxcam 0.1.0",
)


SEVERAL = dataclasses.replace(
    CARD,
    layer="relu_3, relu_7",
    module=None,
    compat="captum",
    evidence="counterfactual",
    fuse="max",
    smooth=("augmentation", "eigen"),
)


def read(text):
    return Card.from_metadata({KEY: text})


def changed(**fields):
    """The JSON of CARD with other fields; those that are None are left out."""
    whole = json.loads(CARD.to_json()) | fields
    return json.dumps({name: value for name, value in whole.items() if value is not None})


def changed_input(**fields):
    return changed(input={**json.loads(CARD.to_json())["input"], **fields})


def test_title_says_what_the_map_is():
    assert CARD.title == "gradcam at layer4.2"
    assert BARE.title == "cam at a"
    smooth = "smoothed by augmentation and eigen"
    assert SEVERAL.title == f"gradcam as in captum at relu_3, relu_7, {smooth}"


@pytest.mark.parametrize("card", [CARD, BARE, SEVERAL])
def test_round_trip(card):
    text = card.to_json()
    assert "\n" not in text
    assert read(text) == card


def test_unknown_facts_are_left_out():
    fields = json.loads(BARE.to_json())
    assert fields["input"] == {"name": "x", "layout": "NCHW", "interpolation": "bilinear"}
    assert fields.keys() == {"format", "tool", "input", "scores", "scores_are", "layer", "method", "score"}
    assert fields["format"] == FORMAT == 1


def test_model_without_a_card():
    assert Card.from_metadata({}) is None
    assert Card.from_metadata({"author": "somebody"}) is None


def test_whole_numbers_do_for_mean_and_std():
    assert read(changed_input(mean=[0], std=[255])).input.std == (255.0,)


@pytest.mark.parametrize("version", [2, 0, "1", None])
def test_another_format_is_refused(version):
    with pytest.raises(OnnxcamError, match=f"card has format {version}; this onnxcam reads format 1"):
        read(changed(format=version))


def test_newer_format_is_refused_whatever_else_it_holds():
    with pytest.raises(OnnxcamError, match="card has format 7"):
        read(json.dumps({"format": 7, "something": "else"}))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "null",
        "[1]",
        '"text"',
        "[" * 10**5,
        changed(input=None),
        changed(input=[]),
        changed(input="image"),
        changed(input={}),
        changed(layer=None),
        changed(scores=None),
        changed(unheard_of=1),
        changed(layer=7),
        changed(scores_are="maybe"),
        changed(score="during"),
        changed(labels="abc"),
        changed(labels=[1, 2]),
        changed(labels={"0": "cat"}),
        changed_input(unheard_of=1),
        changed_input(name=1),
        changed_input(layout="HWC"),
        changed_input(height="224"),
        changed_input(height=224.5),
        changed_input(width=0),
        changed_input(scale="1/255"),
        changed_input(scale=[1]),
        changed_input(mean=0.5),
        changed_input(mean=["x"]),
        changed_input(mean=[]),
        changed_input(mean=[10**400]),
        changed_input(std=[0.1, 0.2]),
        changed_input(std=[float("nan")]),
        changed_input(resize=224),
        changed_input(interpolation="area"),
    ],
)
def test_damaged_card_is_one_line(text):
    with pytest.raises(OnnxcamError, match=r"^the model's card is damaged .*; attach the model again$"):
        read(text)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layout": "CHW"}, "layout is 'CHW'; it must be one of NCHW, NHWC"),
        ({"color": "rgb"}, "color is 'rgb'; it must be one of RGB, BGR, GRAY"),
        (
            {"interpolation": "area"},
            "interpolation is 'area'; it must be one of nearest, bilinear, bicubic, lanczos",
        ),
        ({"height": 0}, "height is 0; it must be a whole number of pixels, at least 1"),
        ({"width": -3}, "width is -3; it must be a whole number of pixels, at least 1"),
        ({"scale": 0.0}, "scale is 0.0; it must be a number other than zero"),
        ({"scale": float("inf")}, "scale is inf; it must be a number other than zero"),
        ({"mean": ()}, "mean is []; it must be one number, or one per channel"),
        ({"mean": (float("nan"),)}, "mean is [nan]; it must be one number, or one per channel"),
        ({"color": "RGB", "mean": (1.0, 2.0)}, "mean has 2 values; give one, or one for each channel of RGB"),
        (
            {"color": "GRAY", "std": (1.0, 2.0, 3.0)},
            "std has 3 values; give one, or one for each channel of GRAY",
        ),
        ({"std": (1.0, 0.0, 1.0)}, "std is [1.0, 0.0, 1.0]; every value must be above zero"),
        ({"resize": "fit"}, "resize is 'fit'; it must be stretch, crop or crop:PIXELS"),
        ({"resize": "stretch:256"}, "resize is 'stretch:256'; it must be stretch, crop or crop:PIXELS"),
        ({"resize": "crop:"}, "resize is 'crop:'; it must be stretch, crop or crop:PIXELS"),
        ({"resize": "crop:-1"}, "resize is 'crop:-1'; it must be stretch, crop or crop:PIXELS"),
        ({"resize": "crop:0"}, "resize is 'crop:0'; the crop itself needs 1 pixels"),
        (
            {"resize": "crop:200", "height": 224, "width": 192},
            "resize is 'crop:200'; the crop itself needs 224 pixels",
        ),
    ],
)
def test_facts_that_cannot_be(fields, message):
    with pytest.raises(OnnxcamError) as caught:
        Preprocess("x", **fields)
    assert str(caught.value) == message


def test_shorter_edge():
    edges = {
        rule: dataclasses.replace(FULL, resize=rule).shorter_edge
        for rule in ("stretch", "crop", "crop:256", None)
    }
    assert edges == {"stretch": None, "crop": 224, "crop:256": 256, None: None}


def test_missing_names_what_nobody_stated():
    assert FULL.missing() == []
    assert BARE.input.missing() == ["height", "width", "color", "scale", "mean", "std", "resize"]


def test_suggest():
    labels = ["Egyptian cat", "tiger cat", "tabby", "espresso", "espresso maker"]
    assert suggest("expresso", labels) == " (did you mean 'espresso' or 'espresso maker'?)"
    assert suggest("egyptian", labels) == " (did you mean 'Egyptian cat'?)"
    assert suggest("zzzzzz", labels) == ""
    assert suggest("", labels) == ""
    assert suggest("tabbi", [*labels, *labels]) == " (did you mean 'tabby'?)"
