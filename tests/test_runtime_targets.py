"""Contrasts, seeds and masks as a person asks for them, from Python and the command line."""

import numpy as np
import onnx
import pytest
from PIL import Image

from onnxcam.attaching import attach
from onnxcam.errors import OnnxcamError
from onnxcam.runtime import Explainer
from tests.graphs import build
from tests.small import FACTS
from tests.test_cli import call  # noqa: F401 - a fixture
from tests.test_targets import DENSE


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    path = tmp_path_factory.mktemp("dense") / "dense.onnx"
    onnx.save(build(DENSE), path)
    return path


def cams(model, photo, target, **given):
    explainer = Explainer(model, preprocess=FACTS, target=target)
    return explainer(photo, **given)


def test_a_contrast_is_the_difference_of_two_weighted_sums(small, photo):
    """On a linear head the weights are rows of the matrix, so that signed maps subtract."""
    explainer = Explainer(small, preprocess=FACTS, evidence="both")
    alone = explainer(photo, classes=[0, 1])
    compared = Explainer(small, preprocess=FACTS, evidence="both", target="contrast")(
        photo, classes=[0], against=1
    )
    np.testing.assert_allclose(compared.cam[0], alone.cam[0] - alone.cam[1], rtol=1e-4, atol=1e-6)
    assert compared.against is not None
    assert compared.against.index == 1
    assert compared.to_dict()["explanations"][0]["against"] == 1
    assert [column.note for column in compared.columns((40, 40))[1]] == ["compared with 1"]


def test_a_seed_is_any_sum(small, photo):
    weights = np.array([0.5, -2.0, 0.0, 1.0])
    alone = Explainer(small, preprocess=FACTS, evidence="both")(photo, classes=[0, 1, 3])
    summed = Explainer(small, preprocess=FACTS, evidence="both", target="seed")(photo, seed=weights)
    want = np.tensordot(weights[[0, 1, 3]], alone.cam, 1)
    np.testing.assert_allclose(summed.cam[0], want, rtol=1e-4, atol=1e-6)
    assert [c.index for c in summed.classes] == [-1]


def test_a_mask_chooses_places(dense, photo):
    """The places of two masks add up to those of none."""
    explainer = Explainer(dense, preprocess=FACTS, scores="scores", evidence="both", layer="r")
    left = np.zeros((8, 10))
    left[:, :4] = 1
    whole, one, other = (explainer(photo, classes=[2], **m) for m in ({}, {"mask": left}, {"mask": 1 - left}))
    np.testing.assert_allclose(one.cam + other.cam, whole.cam, rtol=1e-4, atol=1e-5)
    assert np.abs(one.cam).max() > 0


@pytest.mark.parametrize(
    ("target", "given", "message"),
    [
        ("contrast", {"classes": [2], "against": 2}, "'2' is compared with itself; choose another --against"),
        ("contrast", {"classes": [-1], "against": -1}, "is compared with itself"),
        ("contrast", {"against": 9}, "class 9 is out of range"),
        ("class", {"against": 1}, "explains the target class, which compares no classes"),
        ("class", {"seed": np.ones(4)}, "explains the target class, which takes no seed"),
        ("seed", {}, "explains the target seed: the weight of each score is needed"),
        ("seed", {"seed": np.ones(3)}, r"the seed is \[3\], but the scores of one picture are \[4\]"),
        ("seed", {"seed": np.ones((4, 1))}, r"the seed is \[4,1\], but the scores of one picture are \[4\]"),
        ("seed", {"seed": np.ones(4), "classes": [1]}, "the target seed, a sum over all classes; give none"),
        ("class", {"mask": np.ones((8, 12))}, "has no dense scores to put a mask over"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_clear_line(small, photo, target, given, message):
    with pytest.raises(OnnxcamError, match=message):
        cams(small, photo, target, **given)


def test_a_mask_of_another_size(dense, photo):
    explainer = Explainer(dense, preprocess=FACTS, scores="scores", layer="r")
    with pytest.raises(
        OnnxcamError, match=r"the mask is \[3,3\], but the places that have scores are \[8,10\]"
    ):
        explainer(photo, mask=np.ones((3, 3)))


def test_from_the_command_line(call, small, dense, photo, tmp_path):  # noqa: F811
    facts = ["--color", "rgb", "--scale", "1/255", "--mean", "0.5", "--std", "0.5", "--resize", "stretch"]
    out = ["--output", str(tmp_path / "out")]
    code, text, err = call("run", small, photo, "--class", "0", "--against", "1", "--json", *facts, *out)
    assert (code, err) == (0, "")
    assert '"against": 1' in text
    code, _, err = call("run", small, photo, "--class", "1", "--against", "1", *facts, *out)
    assert code == 2
    assert err == "onnxcam: class '1' is compared with itself; choose another --against\n"
    np.save(tmp_path / "seed.npy", np.ones(4))
    code, text, err = call("run", small, photo, "--seed", tmp_path / "seed.npy", *facts, *out)
    assert (code, err) == (0, "")
    assert "weighted sum of scores" in text
    code, _, err = call("run", small, photo, "--seed", photo, *facts, *out)
    assert (code, err) == (2, f"onnxcam: {photo} is not a .npy file of numbers\n")
    Image.new("L", (10, 8), 255).save(tmp_path / "mask.png")
    code, _, err = call(
        "run",
        dense,
        photo,
        "--scores",
        "scores",
        "--layer",
        "r",
        "--mask",
        tmp_path / "mask.png",
        *facts,
        *out,
    )
    assert (code, err) == (0, "")


def test_an_explained_model_says_its_target(small, photo, tmp_path):
    path = tmp_path / "contrast.onnx"
    attach(small, path, target="contrast", class_input="required", **FACTS)
    assert Explainer(path).card.target == "contrast"
    with pytest.raises(OnnxcamError, match="explained already, with target 'contrast' instead of 'class'"):
        Explainer(path, target="class")
    assert Explainer(path)(photo).against is not None
