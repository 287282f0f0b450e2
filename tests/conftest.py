"""What several test modules share: explained models and a photo."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from onnxcam.attaching import attach
from tests import vision  # noqa: F401
from tests.small import FACTS, saved

MODELS = Path(__file__).parent.parent / "models"

torch.set_num_threads(1)  # the tests themselves run side by side


@pytest.fixture(scope="session")
def lite0(tmp_path_factory):
    """EfficientNet-Lite0, explained as `make demo` does it."""
    path = tmp_path_factory.mktemp("lite0") / "explained.onnx"
    attach(
        MODELS / "efficientnet_lite0.onnx",
        path,
        color="RGB",
        scale=1.0,
        mean=[127],
        std=[128],
        resize="stretch",
        interpolation="bicubic",
        labels=(MODELS / "imagenet_labels.txt").read_text().splitlines(),
    )
    return path


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """A small classifier of four classes, plain."""
    return saved(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="session")
def small_explained(small):
    """The same, explained."""
    path = small.with_name("explained.onnx")
    attach(small, path, labels=["cat", "dog", "Cow", "90"], **FACTS)
    return path


@pytest.fixture(scope="session")
def photo(tmp_path_factory):
    """A photo, 40 x 30 pixels."""
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path
