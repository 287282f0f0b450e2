"""A few of the zoo's models, one of each style; ``make zoo`` runs them all."""

import pytest

from benchmarks.zoo import examine

STYLES = [
    ("torchvision/resnet18", 64),
    ("torchvision/mobilenet_v3_small", 64),
    ("torchvision/shufflenet_v2_x0_5", 64),
    ("torchvision/squeezenet1_1", 64),
    ("torchvision/vit_b_32", None),
    ("torchvision/swin_t", 64),
]


@pytest.mark.parametrize(("name", "size"), STYLES)
def test_model(name, size):
    result = examine(name, size)
    assert result.agrees, result
