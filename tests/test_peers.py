"""Maps against those of pytorch-grad-cam and torch-cam, on the same weights and the same input."""

import warnings

import cv2
import numpy as np
import onnxruntime
import pytest
import torch

from onnxcam.attaching import attach
from tests.checks import quiet

CLASSES = [3, 0]
LAYER = "features.6"


class Net(torch.nn.Module):
    """Two stages and a head of two linear layers, so that the gradient differs from place to place."""

    def __init__(self):
        super().__init__()
        self.features = torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 3, padding=1),
            torch.nn.ReLU(),
            torch.nn.MaxPool2d(2),
            torch.nn.Conv2d(8, 12, 3, padding=1),
            torch.nn.ReLU(),
            torch.nn.Conv2d(12, 12, 3, padding=1),
            torch.nn.ReLU(),
            torch.nn.MaxPool2d(3, 2, 1),
        )
        self.head = torch.nn.Sequential(
            torch.nn.Flatten(), torch.nn.Linear(12 * 36, 20), torch.nn.ReLU(), torch.nn.Linear(20, 5)
        )

    def forward(self, x):
        return self.head(self.features(x))


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    # Larger weights than usual: peers add an epsilon to powers of the gradient in Grad-CAM++.
    net = Net().eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(3)
        net.head[3].weight.mul_(100)
    return net


@pytest.fixture(scope="module")
def picture():
    return torch.randn(1, 3, 24, 24, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def explain(net, picture, tmp_path_factory):
    path = tmp_path_factory.mktemp("peers") / "net.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(net, (picture,), path, dynamo=True, input_names=["x"], verbose=False)

    def run(method):
        explained = path.with_name("explained.onnx")
        attach(path, explained, layer=LAYER, method=method, emit=["cam", "activations", "gradients"])
        session = onnxruntime.InferenceSession(explained, quiet())
        outputs = ["cam", "cam_activations", "cam_gradients"]
        cam, a, g = session.run(outputs, {"x": picture.numpy(), "cam_class": np.array([CLASSES])})
        return cam[0], a, g

    return run


def scaled(cam, epsilon):
    """Scale to [0,1] as both peers do: minus the minimum, over what is then the maximum plus epsilon."""
    cam = cam - cam.min()
    return cam / (cam.max() + epsilon)


def by_pytorch_grad_cam(name, net, picture, index):
    import pytorch_grad_cam
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    with getattr(pytorch_grad_cam, name)(net, [net.features[6]]) as cam:
        return cam(picture, [ClassifierOutputTarget(index)])[0]


def as_pytorch_grad_cam_shows(cam):
    """Scale at the layer's resolution, resize with OpenCV, scale again: what its call returns."""
    return scaled(cv2.resize(scaled(cam, 1e-7), (24, 24)), 1e-7)


def by_torchcam(name, net, picture, index):
    import torchcam.methods

    with getattr(torchcam.methods, name)(net, net.features[6]) as extractor:
        return extractor(index, net(picture), normalized=False)[0][0].numpy()


@pytest.mark.parametrize(
    ("method", "peer"), [("gradcam", "GradCAM"), ("hirescam", "HiResCAM"), ("gradcam++", "GradCAMPlusPlus")]
)
def test_pytorch_grad_cam(net, picture, explain, method, peer):
    cam, _, _ = explain(method)
    for k, index in enumerate(CLASSES):
        expected = by_pytorch_grad_cam(peer, net, picture, index)
        assert expected.max() > 0.9
        np.testing.assert_allclose(as_pytorch_grad_cam_shows(cam[k]), expected, atol=1e-4)


def test_pytorch_grad_cams_epsilon_in_gradcam_plus_plus(net, picture, explain):
    """It adds 1e-6 to the denominator, which matters where g^2 is small: with small weights maps differ."""
    with torch.no_grad():
        net.head[3].weight.mul_(1e-3)
    try:
        index = CLASSES[0]
        expected = by_pytorch_grad_cam("GradCAMPlusPlus", net, picture, index)
        _, a, g = explain("gradcam++")
        # The explained file still has the large weights; its gradients are 1000 times those of `net`.
        g = g[:1].astype(np.float64) * 1e-3
        a = a.astype(np.float64)
        total = a.sum((2, 3), keepdims=True)
        for epsilon, agrees in ((1e-6, True), (0.0, False)):
            quotient = np.divide(g**2, 2 * g**2 + total * g**3 + epsilon, where=g != 0, out=np.zeros_like(g))
            weights = (quotient * np.maximum(g, 0)).sum((2, 3), keepdims=True)
            shown = as_pytorch_grad_cam_shows(np.maximum((weights * a).sum(1)[0], 0).astype(np.float32))
            assert (np.abs(shown - expected).max() < 1e-4) == agrees
    finally:
        with torch.no_grad():
            net.head[3].weight.mul_(1e3)


def test_torchcam_gradcam(net, picture, explain):
    cam, _, _ = explain("gradcam")
    for k, index in enumerate(CLASSES):
        expected = by_torchcam("GradCAM", net, picture, index)
        assert expected.max() > 0
        np.testing.assert_allclose(cam[k], expected, rtol=1e-4, atol=1e-4 * expected.max())


def test_torchcams_gradcam_plus_plus_is_another_formula(net, picture, explain):
    """torch-cam 0.5 divides a copy, so that its weights are S(relu(g)^3) instead of the paper's."""
    cam, a, g = explain("gradcam++")
    for k, index in enumerate(CLASSES):
        expected = by_torchcam("GradCAMpp", net, picture, index)
        weights = (np.maximum(g[k : k + 1], 0) ** 3).sum((2, 3), keepdims=True)
        np.testing.assert_allclose(
            np.maximum((weights * a).sum(1)[0], 0), expected, rtol=1e-4, atol=1e-4 * expected.max()
        )
        assert np.abs(scaled(cam[k], 0) - scaled(expected, 0)).max() > 0.01
