import numpy as np
import pytest
import torch

from tests.checks import check_vjp

RNG = np.random.default_rng(1)


def normal(*shape):
    return RNG.standard_normal(shape)


@pytest.mark.parametrize(
    ("x", "w", "attributes"),
    [
        ((2, 3, 7, 6), (4, 3, 3, 2), {}),
        ((2, 4, 7, 6), (6, 2, 3, 3), {"group": 2, "strides": [2, 3], "pads": [1, 1, 1, 1]}),
        ((1, 4, 9, 8), (4, 1, 3, 3), {"group": 4, "dilations": [2, 1], "pads": [2, 1, 2, 1]}),
        ((1, 2, 9, 10), (3, 2, 4, 3), {"strides": [3, 2], "dilations": [2, 2], "pads": [3, 2, 3, 2]}),
        ((2, 3, 11), (4, 3, 4), {"strides": [3], "pads": [2, 2]}),
        ((1, 2, 5, 6, 4), (2, 2, 2, 3, 2), {"strides": [2, 1, 3], "pads": [0, 1, 1, 0, 1, 1]}),
    ],
)
@pytest.mark.parametrize("symbolic", [False, True])
def test_conv(x, w, attributes, symbolic):
    n = len(x) - 2
    functional = {
        1: torch.nn.functional.conv1d,
        2: torch.nn.functional.conv2d,
        3: torch.nn.functional.conv3d,
    }[n]

    def conv(x, w, b):
        return functional(
            x,
            w,
            b,
            stride=attributes.get("strides", 1),
            padding=attributes.get("pads", [0] * n)[:n],
            dilation=attributes.get("dilations", 1),
            groups=attributes.get("group", 1),
        )

    check_vjp(
        "Conv",
        [normal(*x), normal(*w), normal(w[0])],
        against=conv,
        symbolic=symbolic,
        kernel_shape=w[2:],
        **attributes,
    )


@pytest.mark.parametrize("auto_pad", ["SAME_UPPER", "SAME_LOWER", "VALID"])
@pytest.mark.parametrize("strides", [[1, 1], [2, 3]])
def test_conv_auto_pad(auto_pad, strides):
    check_vjp("Conv", [normal(1, 2, 7, 8), normal(3, 2, 4, 3)], auto_pad=auto_pad, strides=strides)


def test_conv_asymmetric_padding():
    check_vjp("Conv", [normal(1, 2, 6, 7), normal(3, 2, 3, 3)], pads=[0, 2, 1, 0], strides=[2, 2])
