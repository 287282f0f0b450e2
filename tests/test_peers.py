"""Maps against those of the peers, and of two codes for Keras: the same weights, the same pictures."""

import copy
import warnings

import cv2
import numpy as np
import onnx
import onnxruntime
import PIL.Image
import pytest
import torch

from onnxcam.attaching import attach
from onnxcam.dialects import DIALECTS
from onnxcam.errors import OnnxcamError
from onnxcam.methods import METHODS
from tests import peers
from tests.checks import quiet
from tests.graphs import run

CLASSES = [3, 0]
LAYERS = ["features.4", "features.6"]
"""A ReLU's output [12,12,12], with zeros in it, and a leaky ReLU's [40,12,12], signed."""
TOLERANCE = 2e-5
"""Of maps from 0 to 1; the largest difference measured is 4e-6, of Ablation-CAM."""


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
            torch.nn.Conv2d(12, 40, 3, padding=1),
            torch.nn.LeakyReLU(0.3),
            torch.nn.MaxPool2d(3, 2, 1),
        )
        self.head = torch.nn.Sequential(
            torch.nn.Flatten(), torch.nn.Linear(40 * 36, 20), torch.nn.Softplus(), torch.nn.Linear(20, 5)
        )

    def forward(self, x):
        return self.head(self.features(x))


class Linear(torch.nn.Module):
    """A convolution, pooled, and one linear layer: what CAM asks for."""

    def __init__(self):
        super().__init__()
        self.features = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, 2), torch.nn.ReLU())
        self.fc = torch.nn.Linear(8, 5)

    def forward(self, x):
        return self.fc(self.features(x).mean((2, 3)))


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    net = Net().eval()
    # So that in the Keras code the ones that the map starts from do not outweigh the rest.
    with torch.no_grad():
        net.features[5].weight.mul_(60)
        net.head[1].weight.mul_(0.1)
        net.head[3].weight.mul_(2)
    return net


@pytest.fixture(scope="module")
def pictures():
    return torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(1))


def exported(module, pictures, path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dynamic = ({0: torch.export.Dim("N")},)
        torch.onnx.export(
            module, (pictures,), path, input_names=["x"], dynamic_shapes=dynamic, dynamo=True, verbose=False
        )
    return path


@pytest.fixture(scope="module")
def file(net, pictures, tmp_path_factory):
    return exported(net, pictures, tmp_path_factory.mktemp("peers") / "net.onnx")


def explained(file, pictures, *outputs, **options):
    """Attach and run; return the outputs for `CLASSES`."""
    path = file.with_name("explained.onnx")
    attach(file, path, emit=[name.removeprefix("cam_") for name in outputs], **options)
    session = onnxruntime.InferenceSession(path, quiet())
    return session.run(list(outputs), {"x": pictures.numpy(), "cam_class": np.array([CLASSES])})


def unit(maps):
    """Scale each map to [0,1]."""
    maps = maps - maps.min((2, 3), keepdims=True)
    return maps / maps.max((2, 3), keepdims=True)


def everywhere(dialect, *left_out):
    """Each method of a dialect at each of `LAYERS`, or at the picture alone."""
    return [
        (name, layer)
        for name, method in DIALECTS[dialect].methods.items()
        if name not in left_out
        for layer in ([None] if method.at_picture else LAYERS)
    ]


@pytest.mark.parametrize(("method", "layer"), everywhere("pytorch-grad-cam", "guidedbackprop"))
def test_pytorch_grad_cam(net, pictures, file, method, layer):
    (maps,) = explained(file, pictures, "cam_heatmap", method=method, layer=layer, compat="pytorch-grad-cam")
    modules = [] if layer is None else [net.get_submodule(layer)]
    for k, index in enumerate(CLASSES):
        expected = peers.by_pytorch_grad_cam(method, net, modules, pictures, index)
        assert expected.max() > 0.9
        np.testing.assert_allclose(maps[:, k], expected, atol=TOLERANCE)


@pytest.mark.parametrize("method", ["gradcam", "elementwise", "eigencam"])
def test_pytorch_grad_cam_averages_layers(net, pictures, file, method):
    (maps,) = explained(file, pictures, "cam_heatmap", method=method, layer=LAYERS, compat="pytorch-grad-cam")
    modules = [net.get_submodule(layer) for layer in LAYERS]
    for k, index in enumerate(CLASSES):
        expected = peers.by_pytorch_grad_cam(method, net, modules, pictures, index)
        np.testing.assert_allclose(maps[:, k], expected, atol=TOLERANCE)


def test_pytorch_grad_cam_multiplies_layers(net, pictures, file):
    options = {"method": "gradcam++", "layer": LAYERS, "compat": "pytorch-grad-cam", "fuse": "product"}
    (maps,) = explained(file, pictures, "cam_heatmap", **options)
    modules = [net.get_submodule(layer) for layer in LAYERS]
    for k, index in enumerate(CLASSES):
        expected = peers.refined_by_pytorch_grad_cam("gradcam++", net, modules, pictures, index)
        np.testing.assert_allclose(maps[:, k], expected, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("method", "smooth"),
    [
        ("gradcam", ["augmentation"]),
        ("gradcam", ["eigen"]),
        ("hirescam", ["eigen"]),
        ("elementwise", ["eigen"]),
        ("layercam", ["augmentation", "eigen"]),
    ],
)
def test_pytorch_grad_cam_smooths(net, pictures, file, method, smooth):
    (maps,) = explained(
        file,
        pictures,
        "cam_heatmap",
        method=method,
        layer=LAYERS[1],
        smooth=smooth,
        compat="pytorch-grad-cam",
    )
    asked = {"aug_smooth": "augmentation" in smooth, "eigen_smooth": "eigen" in smooth}
    for k, index in enumerate(CLASSES):
        module = net.get_submodule(LAYERS[1])
        expected = peers.by_pytorch_grad_cam(method, net, [module], pictures, index, **asked)
        np.testing.assert_allclose(maps[:, k], expected, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("method", "layer"),
    [
        *everywhere("torchcam", "cam", "legrad", "smoothgradcam++", "sscam", "iscam"),
        ("sscam", LAYERS[0]),  # 35 and 10 runs for each channel
        ("iscam", LAYERS[0]),
    ],
)
def test_torchcam(net, pictures, file, method, layer):
    (maps,) = explained(file, pictures, "cam", method=method, layer=layer, compat="torchcam")
    for k, index in enumerate(CLASSES):
        (expected,) = peers.by_torchcam(method, net, [net.get_submodule(layer)], pictures, index)
        assert expected.max() > 0.9
        np.testing.assert_allclose(maps[:, k], expected, atol=TOLERANCE)


def test_torchcams_smooth_gradcam_plus_plus(net, pictures, tmp_path):
    """In float64: where the two terms of the denominator cancel, float32 is off by up to 4e-3."""
    double, x = copy.deepcopy(net).double(), pictures.double()
    file = exported(double, x, tmp_path / "double.onnx")
    for layer in LAYERS:
        path = tmp_path / "explained.onnx"
        attach(file, path, emit=["cam"], method="smoothgradcam++", layer=layer, compat="torchcam")
        got = run(onnx.load(path), {"x": x.numpy(), "cam_class": np.array([CLASSES])}, by="ref")["cam"]
        for k, index in enumerate(CLASSES):
            module = double.get_submodule(layer)
            (expected,) = peers.by_torchcam("smoothgradcam++", double, [module], x, index)
            np.testing.assert_allclose(got[:, k], expected, atol=2e-6)  # 5e-7 measured: cam is float32


def test_torchcams_legrad(tmp_path):
    """Whose score is the head's on the mean of each layer's tokens; the model's own gives another map."""
    from torchvision.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    module = VisionTransformer(24, 8, num_layers=2, num_heads=2, hidden_dim=12, mlp_dim=16, num_classes=5)
    torch.nn.init.normal_(module.heads.head.weight)  # torchvision starts at zero, without any gradient
    x = torch.randn(2, 3, 24, 24)
    file = exported(module.eval(), x, tmp_path / "vit.onnx")
    own, paper = (
        explained(file, x, "cam", method="legrad", compat=name)[0] for name in ("torchcam", "paper")
    )
    for k, index in enumerate(CLASSES):
        (expected,) = peers.by_torchcam("legrad", module, None, x, index)
        np.testing.assert_allclose(own[:, k], expected, atol=TOLERANCE)
    assert np.abs(own - unit(paper)).max() > 50 * TOLERANCE


def test_torchcams_cam(pictures, tmp_path):
    torch.manual_seed(0)
    module = Linear().eval()
    file = exported(module, pictures, tmp_path / "linear.onnx")
    (maps,) = explained(file, pictures, "cam", method="cam", layer="features.1", compat="torchcam")
    for k, index in enumerate(CLASSES):
        (expected,) = peers.by_torchcam("cam", module, ["features.1"], pictures, index, head="fc")
        np.testing.assert_allclose(maps[:, k], expected, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("method", "fusion"), [("gradcam", "max"), ("layercam", "max"), ("layercam", "product")]
)
def test_torchcam_fuses(net, pictures, file, method, fusion):
    """By the maximum, in LayerCAM of tanh(2 cam); by RefineCAM's product."""
    import torchcam.methods

    layers = ["features.1", "features.6"]
    options = {} if fusion == "max" else {"fuse": fusion}
    (maps,) = explained(file, pictures, "cam", method=method, layer=layers, compat="torchcam", **options)
    assert maps.shape[2:] == (24, 24)
    kind = getattr(torchcam.methods, peers.TORCHCAM[method])
    joins = kind if fusion == "max" else torchcam.methods.RefineCAM
    for k, index in enumerate(CLASSES):
        cams = peers.by_torchcam(method, net, layers, pictures, index)
        expected = joins.fuse_cams([torch.from_numpy(cam) for cam in cams])
        np.testing.assert_allclose(maps[:, k], expected, atol=TOLERANCE)


def test_torchcams_overlay(net, pictures, file):
    """The heat map is what overlay_mask colours: with a colour map of greys it is seen in 255ths."""
    from matplotlib.colors import ListedColormap
    from torchcam.utils import overlay_mask

    greys = ListedColormap(np.repeat(np.linspace(0, 1, 256)[:, None], 3, axis=1))
    cam, heat = explained(
        file, pictures, "cam", "cam_heatmap", method="gradcam", layer="features.7", compat="torchcam"
    )
    assert cam.shape[2:] == (6, 6)
    black = PIL.Image.new("RGB", (24, 24))
    for n, k in np.ndindex(2, 2):
        shown = overlay_mask(black, PIL.Image.fromarray(cam[n, k]), colormap=greys, alpha=0.0)
        seen = np.asarray(shown)[..., 0] / 255
        np.testing.assert_allclose(heat[n, k], seen, atol=2 / 255)  # 256 colours, cut to bytes twice
        full = np.asarray(PIL.Image.fromarray(cam[n, k]).resize((24, 24), PIL.Image.Resampling.BICUBIC))
        np.testing.assert_allclose(heat[n, k], np.minimum(full**2, 1), atol=1e-6)


@pytest.mark.parametrize(("evidence", "relu"), [(None, False), ("both", False), ("for", True)])
def test_captum(net, pictures, file, evidence, relu):
    from captum.attr import LayerAttribution

    cam, heat = explained(
        file, pictures, "cam", "cam_heatmap", layer="features.7", compat="captum", evidence=evidence
    )
    for k, index in enumerate(CLASSES):
        expected = peers.by_captum("gradcam", net, net.features[7], pictures, index, relu)
        largest = float(expected.abs().max())
        np.testing.assert_allclose(cam[:, k], expected[:, 0], atol=1e-5 * largest)
        full = LayerAttribution.interpolate(expected, (24, 24))
        np.testing.assert_allclose(heat[:, k], full[:, 0], atol=1e-5 * largest)


@pytest.mark.parametrize(
    ("dialect", "method", "layer"),
    [
        ("pytorch-grad-cam", "guidedbackprop", None),
        *(("captum", *row) for row in everywhere("captum", "gradcam")),
    ],
)
def test_attributions_to_each_channel(net, pictures, file, dialect, method, layer):
    """What the peer returns, and of captum the map, which is their sum over the channels."""
    cam, found = explained(
        file, pictures, "cam", "cam_attributions", method=method, layer=layer, compat=dialect
    )
    found = found.reshape(2, 2, *found.shape[1:])
    for k, index in enumerate(CLASSES):
        if dialect == "captum":
            module = None if layer is None else net.get_submodule(layer)
            expected = peers.by_captum(method, net, module, pictures, index).numpy()
            np.testing.assert_allclose(cam[:, k], expected.sum(1), atol=1e-5 * np.abs(cam).max())
        else:
            expected = peers.by_pytorch_grad_cam(method, net, [], pictures, index)
        np.testing.assert_allclose(found[:, k], expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("dialect", ["pytorch-grad-cam", "torchcam"])
def test_counterfactual_is_the_map_of_the_negative_score(net, pictures, file, dialect):
    out = peers.RETURNED[dialect]
    (maps,) = explained(file, pictures, out, layer=LAYERS[1], compat=dialect, evidence="counterfactual")
    by = peers.by_pytorch_grad_cam if dialect == "pytorch-grad-cam" else peers.by_torchcam
    for k, index in enumerate(CLASSES):
        found = by("gradcam", net, [net.get_submodule(LAYERS[1])], pictures, index, sign=-1)
        expected = found[0] if isinstance(found, list) else found
        np.testing.assert_allclose(maps[:, k], expected, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("dialect", "method"),
    [
        ("pytorch-grad-cam", "gradcam++"),
        ("pytorch-grad-cam", "eigencam"),
        ("pytorch-grad-cam", "ablationcam"),
        ("pytorch-grad-cam", "scorecam"),
        ("pytorch-grad-cam", "finercam"),
        ("pytorch-grad-cam", "fullgrad"),
        ("torchcam", "gradcam++"),
        ("torchcam", "scorecam"),
        ("torchcam", "iscam"),
        ("torchcam", "finercam"),
        ("captum", "saliency"),
        ("captum", "integratedgradients"),
        ("captum", "smoothgrad"),
        ("captum", "guidedgradcam"),
    ],
)
def test_a_dialects_own_form_is_another_map_than_the_papers(pictures, file, dialect, method):
    """So the comparisons above would see the paper's form in its place."""
    layer = None if METHODS[method].at_picture else LAYERS[1]
    own, paper = (
        explained(file, pictures, "cam", method=method, layer=layer, compat=compat)[0]
        for compat in (dialect, "paper")
    )
    assert np.abs(unit(own) - unit(paper)).max() > 50 * TOLERANCE


@pytest.mark.parametrize("dialect", peers.PEERS)
def test_every_method_of_a_dialect_is_compared(dialect):
    assert set(DIALECTS[dialect].methods) == set(peers.PEERS[dialect])


def of_the_probability(net, pictures, layer):
    """Yield activation and gradient, float64 [h,w,C] as Keras has them, for each picture and class."""
    double = Net().double().eval()
    double.load_state_dict(net.state_dict())
    kept = []
    hook = double.get_submodule(layer).register_forward_hook(lambda _m, _i, output: kept.append(output))
    for n in range(len(pictures)):
        for k, index in enumerate(CLASSES):
            probability = torch.softmax(double(pictures[n : n + 1].double()), 1)[0, index]
            (g,) = torch.autograd.grad(probability, kept[-1])
            a, g = (x[0].detach().permute(1, 2, 0).numpy() for x in (kept[-1], g))
            yield n, k, a, g
    hook.remove()


def test_keras_book(net, pictures, file):
    """Listings 5.42 to 5.44 of Deep Learning with Python, 2017, in float64."""
    cam, heat = explained(file, pictures, "cam", "cam_heatmap", layer=LAYERS[1], compat="keras-book")
    for n, k, a, g in of_the_probability(net, pictures, LAYERS[1]):
        pooled = g.mean((0, 1))
        expected = (a * pooled).mean(-1)
        assert expected.min() < 0 < expected.max()
        expected = np.maximum(expected, 0)
        expected /= expected.max()
        np.testing.assert_allclose(cam[n, k], expected, atol=1e-5)
        np.testing.assert_allclose(heat[n, k], cv2.resize(expected, (24, 24)), atol=1e-5)


def test_keras_grad_cam(net, pictures, file):
    """grad_cam of jacobgil/keras-grad-cam in float64."""
    cam, heat = explained(file, pictures, "cam", "cam_heatmap", layer=LAYERS[1], compat="keras-grad-cam")
    for n, k, a, g in of_the_probability(net, pictures, LAYERS[1]):
        g = g / (np.sqrt((g**2).mean()) + 1e-5)
        expected = 1 + (g.mean((0, 1)) * a).sum(-1)
        assert expected.min() < 0 < expected.max()
        np.testing.assert_allclose(cam[n, k], expected, atol=1e-5 * np.abs(expected).max())
        full = np.maximum(cv2.resize(expected, (24, 24)), 0)
        np.testing.assert_allclose(heat[n, k], full / full.max(), atol=1e-5)


@pytest.mark.parametrize("dialect", ["keras-book", "keras-grad-cam"])
def test_keras_dialects_explain_the_probability_and_say_so(net, pictures, file, dialect, tmp_path):
    explained_file = tmp_path / "explained.onnx"
    model = attach(file, explained_file, compat=dialect, layer=LAYERS[1])
    assert '"score": "after"' in model.metadata_props["onnxcam"]
    attach(file, compat=dialect, layer=LAYERS[1], score="after")
    with pytest.raises(OnnxcamError, match=f"{dialect} explains the score after the softmax, not before"):
        attach(file, compat=dialect, layer=LAYERS[1], score="before")


@pytest.fixture(scope="module")
def flat(pictures, tmp_path_factory):
    """A model whose head has weights of zero, so that no map has anything to show."""
    module = Linear().eval()
    with torch.no_grad():
        module.fc.weight.zero_()
    return exported(module, pictures, tmp_path_factory.mktemp("flat") / "flat.onnx")


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_map_of_zeros_is_zero_not_a_division_by_nothing(dialect, flat, pictures):
    both = explained(flat, pictures, "cam", "cam_heatmap", layer="features.1", compat=dialect)
    level = 1.0 if dialect == "keras-grad-cam" else 0.0  # which starts at ones
    for maps in both:
        np.testing.assert_allclose(maps, np.full_like(maps, level), atol=1e-6 * level)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compat": "pytorch"}, "compat is 'pytorch'; it must be one of paper, pytorch-grad-cam, torchcam"),
        (
            {"compat": "captum", "method": "layercam"},
            "captum has no method 'layercam'; it has: inputxgradient",
        ),
        ({"compat": "pytorch-grad-cam", "method": "cam"}, "pytorch-grad-cam has no method 'cam'; it has: "),
        (
            {"compat": "pytorch-grad-cam", "evidence": "both"},
            "pytorch-grad-cam gives no evidence 'both' in gradcam, only for or counterfactual",
        ),
        ({"compat": "keras-grad-cam", "evidence": "for"}, "gives no evidence 'for' in gradcam, only both"),
        (
            {"compat": "torchcam", "smooth": ["eigen"]},
            "torchcam has no smoothing 'eigen'; it has no smoothing",
        ),
        ({"compat": "torchcam", "fuse": "mean"}, "torchcam joins layers only by max or product, not by mean"),
        (
            {"compat": "torchcam", "method": "xgradcam", "target": "rivals"},
            "torchcam explains the target rivals only by finercam, gradcam, gradcam++, layercam",
        ),
        (
            {"compat": "pytorch-grad-cam", "method": "finercam", "smooth": ["augmentation"]},
            "pytorch-grad-cam has no smoothing 'augmentation' of the target rivals",
        ),
        ({"compat": "captum", "fuse": "max"}, "captum joins layers in no way, not by max"),
        ({"compat": "captum", "layer": LAYERS}, "captum does not join the maps of several layers"),
        (
            {"compat": "pytorch-grad-cam", "method": "fem", "smooth": ["eigen"]},
            "fem is not a sum over channels, which 'eigen' would smooth",
        ),
        ({"method": "eigencam", "emit": ["attributions"]}, "eigencam is not a sum over channels"),
    ],
)
def test_what_a_dialect_lacks_is_one_clear_line(file, options, message):
    with pytest.raises(OnnxcamError) as raised:
        attach(file, **{"layer": LAYERS[1], **options})
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


OTHER_COSTS = [
    ("torchcam", "legrad"),
    ("torchcam", "smoothgradcam++"),
    ("torchcam", "iscam"),
    ("captum", "smoothgrad"),
]
"""What takes another number of samples or steps than the paper."""


def test_own_forms_say_their_formula():
    for dialect in DIALECTS.values():
        for name, method in dialect.methods.items():
            assert method.name == name
            assert method.summary, (dialect.name, name)
            if method is not METHODS[name] and (dialect.name, name) not in OTHER_COSTS:
                assert method.cost == METHODS[name].cost


def test_shapleycam_looks_twice_through_attention(tmp_path):
    """H A of a model whose Softmax and products of two activations bend, against torch."""

    class Attending(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.features = torch.nn.Conv2d(3, 6, 3, padding=1)
            self.head = torch.nn.Linear(6, 5)

        def forward(self, x):
            return self.after(self.features(x))

        def after(self, a):
            tokens = a.flatten(2)
            mixed = torch.softmax(tokens @ tokens.transpose(1, 2), -1) @ tokens
            return self.head(mixed.mean(2))

    torch.manual_seed(0)
    module = Attending().eval()
    pictures = torch.randn(2, 3, 4, 4)
    file = exported(module, pictures, tmp_path / "attending.onnx")
    (maps,) = explained(file, pictures, "cam", method="shapleycam", layer="features")
    double = module.double()
    a = double.features(pictures.double()).detach().requires_grad_()
    scores = double.after(a)
    for k, index in enumerate(CLASSES):
        (g,) = torch.autograd.grad(scores[:, index].sum(), a, create_graph=True)
        (curved,) = torch.autograd.grad(g, a, a.detach(), retain_graph=True)
        assert float((curved.abs().max() / g.abs().max()).detach()) > 0.1
        weights = (g - curved / 2).mean((2, 3), keepdim=True)
        expected = torch.relu((weights * a).sum(1)).detach()
        np.testing.assert_allclose(maps[:, k], expected, atol=1e-5 * float(expected.max()))
