"""exporting: what is written agrees with torch, means what torch's modules mean, and tells nothing else."""

import contextlib
import copy
import dataclasses
import importlib.util
import pickle
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F  # noqa: N812
import torchvision
from torch import nn
from typer.testing import CliRunner

from onnxcam import exporting
from onnxcam.card import EMITS, KEY, Card
from onnxcam.cli import app
from onnxcam.errors import OnnxcamError
from onnxcam.exporting import example, export, load_module
from onnxcam.methods import METHODS
from onnxcam.vjp import RULES
from tests.checks import quiet, relative_error

SMALL = torch.zeros(1, 3, 16, 16)
BATCH_NORMS = 20  # in ResNet-18
TENSORS = tuple(name for name in EMITS if name != "overlay")  # which needs facts about the picture


class Net(nn.Module):
    """A small CNN; its ReLU works in place and is called twice."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.MaxPool2d(2))
        self.relu = nn.ReLU(inplace=True)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(8, 5)
        self.spare = nn.Conv2d(8, 8, 1)
        self.stem[1].running_var.uniform_(0.5, 2)

    def features(self, x):
        x = self.relu(self.stem(x))
        return self.relu(self.conv(x) + x)

    def forward(self, x):
        return self.fc(self.drop(self.features(x)).mean((2, 3)))


class TwoMaps(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        x = self.conv(x)
        return x, x.sigmoid()


class Paired(Net):
    def __init__(self):
        super().__init__()
        self.pair = TwoMaps()
        self.last = nn.Linear(4, 5)

    def forward(self, x):
        return self.last(self.pair(x)[1].mean((2, 3)))


class Early(nn.Module):
    """Returns what it computed first."""

    def __init__(self):
        super().__init__()
        self.main, self.side = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
        self.gate = None

    def forward(self, x):
        y = self.main(x)
        self.gate = self.side(x).tanh()
        return y


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.fc = Early(), nn.Linear(4, 5)

    def forward(self, x):
        y = self.body(x) * self.body.gate
        self.body.gate = None
        return self.fc(y.mean((2, 3)))


class Functional(nn.Module):
    """Has parameters, but no modules in it."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(8, 3, 3, 3)), nn.Parameter(torch.randn(8, 8, 3, 3))
        self.c = nn.Parameter(torch.randn(5, 8))

    def forward(self, x):
        x = F.max_pool2d(F.relu(F.conv2d(x, self.a)), 2)
        x = F.hardswish(F.conv2d(x, self.b))
        return F.adaptive_avg_pool2d(x, 1).flatten(1) @ self.c.t()


class Ending(Net):
    def __init__(self, end):
        super().__init__()
        self.end = end

    def forward(self, x):
        return self.end(super().forward(x))


class Changed(Net):
    """Net with another step before it."""

    def __init__(self, change):
        super().__init__()
        self.change = change

    def forward(self, x):
        return super().forward(self.change(x))


def seeded(make, *args, **options):
    torch.manual_seed(0)
    return make(*args, **options)


def resnet18():
    return seeded(torchvision.models.resnet18)


def pictures(n, size=16, seed=3, dtype=torch.float32):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def run(model, x, classes=None):
    """All outputs of an explained model or file, by name."""
    source = model if isinstance(model, Path) else ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(source, quiet(), providers=["CPUExecutionProvider"])
    names = [v.name for v in session.get_outputs()]
    feeds = {"image": np.asarray(x.detach() if isinstance(x, torch.Tensor) else x)}
    if classes is not None:
        feeds["cam_class"] = np.asarray(classes, np.int64)
    return dict(zip(names, session.run(names, feeds), strict=True))


def card_of(model):
    return Card.from_metadata(model.metadata_props)


def in_torch(module, layer, x, classes):
    """Scores, and a submodule's activations and gradients [N*K,...], found by hooks and autograd alone."""
    module = copy.deepcopy(module).eval()
    seen = []

    def hook(_module, _args, output):
        seen.append(output)
        return output.clone()

    module.get_submodule(layer).register_forward_hook(hook)
    scores = module(x)
    picked = [
        torch.autograd.grad(scores[n, k], seen[-1], retain_graph=True)[0][n]
        for n, row in enumerate(classes)
        for k in row
    ]
    return scores.detach().numpy(), seen[-1].detach().numpy(), torch.stack(picked).numpy()


def agrees(model, module, layer, x, classes=((0, 3), (4, 1)), tolerance=1e-4):
    got = run(model, x, classes)
    want = in_torch(module, layer, x, classes)
    for name, values in zip(("scores", "cam_activations", "cam_gradients"), want, strict=True):
        assert np.abs(values).max() > 0
        assert relative_error(got[name], values) <= tolerance, name


# What is written


@pytest.fixture(scope="module")
def net():
    return seeded(Net)


@pytest.fixture(scope="module")
def explained(net, tmp_path_factory):
    path = tmp_path_factory.mktemp("export") / "net.onnx"
    facts = {"color": "RGB", "scale": 1 / 255, "mean": (0.5,), "std": (0.5,), "resize": "stretch"}
    model = export(net, SMALL, path, emit=TENSORS, labels=list("abcde"), **facts)
    assert ir.to_proto(model) == onnx.load(path)
    return path


def test_file_is_a_drop_in_classifier(explained, net):
    model = onnx.load(explained)
    onnx.checker.check_model(model, full_check=True)
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 18)]
    assert model.ir_version <= 10
    assert {node.domain for node in model.graph.node} == {""}
    assert [v.name for v in model.graph.input] == ["image", "cam_class"]
    assert model.graph.output[0].name == "scores"
    shapes = [
        [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim]
        for v in (model.graph.input[0], model.graph.output[0])
    ]
    assert shapes == [["N", 3, 16, 16], ["N", 5]]
    for n in (1, 2, 5):
        x = pictures(n)
        want = copy.deepcopy(net).eval()(x).detach().numpy()
        assert relative_error(run(explained, x)["scores"], want) <= 1e-5


def test_card_says_what_was_given(explained):
    card = Card.from_metadata({p.key: p.value for p in onnx.load(explained).metadata_props})
    assert (card.input.name, card.input.height, card.input.width) == ("image", 16, 16)
    assert (card.input.color, card.input.mean, card.labels) == ("RGB", (0.5,), tuple("abcde"))
    assert (card.scores, card.module, card.method) == ("scores", "relu", "gradcam")
    assert card.input.missing() == []


def test_three_pictures_of_two_classes_equal_six_single_runs(explained):
    x, classes = pictures(3), np.array([[0, 4], [2, -1], [-2, 1]])
    together = run(explained, x, classes)
    for n in range(3):
        for k in range(2):
            alone = run(explained, x[n : n + 1], classes[n : n + 1, k : k + 1])
            for name in ("cam", "cam_heatmap"):
                np.testing.assert_allclose(together[name][n, k], alone[name][0, 0], rtol=1e-6, atol=1e-6)
            gradient = together["cam_gradients"][2 * n + k]
            np.testing.assert_allclose(gradient, alone["cam_gradients"][0], rtol=1e-6, atol=1e-6)


def test_nothing_of_the_machine_is_in_the_file(explained):
    model = onnx.load(explained)
    for tensor in model.graph.initializer:
        tensor.ClearField("raw_data")  # random bytes may spell anything
    data = model.SerializeToString()
    assert len(data) > 1000
    here = (sys.prefix, str(Path.cwd()), str(Path(__file__).parent), str(explained.parent), str(Path.home()))
    for text in (
        *here,
        "site-packages",
        "/opt",
        "/root",
        "/home",
        "/tmp",
        ".py",
        "test_exporting",
        "File ",
        "x =",
    ):
        assert text.encode() not in data, text
    keys = {p.key for node in model.graph.node for p in node.metadata_props}
    assert keys == {"pkg.torch.onnx.name_scopes"}
    assert [p.key for p in model.metadata_props] == [KEY]
    assert not model.graph.metadata_props
    assert not any(
        v.metadata_props for v in (*model.graph.input, *model.graph.output, *model.graph.value_info)
    )
    assert not any(x.doc_string for x in (model, model.graph, *model.graph.node, *model.graph.input))


def test_module_paths_stay(explained):
    scopes = {
        node.op_type: p.value
        for node in onnx.load(explained).graph.node
        for p in node.metadata_props
        if not node.name.startswith("cam/")
    }
    assert "'stem', 'stem.1'" in scopes["BatchNormalization"]
    assert "'fc'" in scopes["Gemm"]


# The layer is torch's module


@pytest.fixture(scope="module", params=["layer4.1.conv2", "layer4", None])
def exported_resnet18(request, tmp_path_factory):
    """The module, the layer asked for, and the file."""
    module, path = resnet18(), tmp_path_factory.mktemp("export") / "resnet18.onnx"
    model = export(module, torch.zeros(1, 3, 64, 64), path, layer=request.param, emit=TENSORS)
    assert card_of(model).module == (request.param if request.param == "layer4.1.conv2" else "layer4.1.relu")
    return module, request.param, path


def test_resnet18(exported_resnet18):
    module, layer, path = exported_resnet18
    agrees(path, module, layer or "layer4", pictures(2, 64))


def test_batch_norms_are_left_to_the_runtime(exported_resnet18, tmp_path):
    path = exported_resnet18[2]
    count = Counter(node.op_type for node in onnx.load(path).graph.node if "cam/" not in node.name)
    assert (count["Conv"], count["BatchNormalization"]) == (20, BATCH_NORMS)
    assert not {"Shape", "CastLike", "Expand", "Constant"} & count.keys()
    options, optimised = quiet(), tmp_path / "optimised.onnx"
    options.optimized_model_filepath = str(optimised)
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    assert "BatchNormalization" not in {node.op_type for node in onnx.load(optimised).graph.node}


def test_mobilenet_v3_small():
    module = seeded(torchvision.models.mobilenet_v3_small)
    model = export(module, torch.zeros(1, 3, 64, 64), emit=TENSORS)
    assert card_of(model).module == "features.12.2"
    agrees(model, module, "features.12", pictures(2, 64))


@pytest.mark.parametrize(
    ("layer", "value"),
    [
        ("stem.0", "conv2d"),
        ("stem.1", "getitem"),
        ("conv", "conv2d_1"),
        ("relu", "relu_1"),  # its last call
        ("drop", "clone"),  # what it is in evaluation mode
    ],
)
def test_layer_by_module_path(net, layer, value):
    model = export(net, SMALL, layer=layer, emit=TENSORS)
    assert card_of(model).layer == value
    agrees(model, net, layer, pictures(2))


def test_layer_that_is_not_the_last_that_its_module_computes():
    module = seeded(Gated)
    model = export(module, SMALL, layer="body", emit=TENSORS)
    assert (card_of(model).layer, card_of(model).module) == ("conv2d", "body.main")
    agrees(model, module, "body", pictures(2))


class ChannelsLast(nn.Module):
    """Cuts a window out of a channels-last map; onnxruntime moves the two Transposes around it."""

    def __init__(self):
        super().__init__()
        self.conv, self.next, self.fc = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3), nn.Linear(8, 5)
        self.norm = nn.LayerNorm(8)

    def forward(self, x):
        x = self.conv(x).permute(0, 2, 3, 1)[:, 1:, 2:].permute(0, 3, 1, 2)
        x = self.norm(self.next(x).permute(0, 2, 3, 1)).sigmoid()
        return self.fc(x.mean((1, 2)))


def test_gradient_through_a_channels_last_map():
    module = seeded(ChannelsLast)
    model = export(module, SMALL, layer="conv", emit=TENSORS)
    agrees(model, module, "conv", pictures(2))


@pytest.mark.parametrize("layer", [None, "encoder.layers.encoder_layer_0.mlp"])
def test_tokens(layer):
    sizes = {
        "image_size": 24,
        "patch_size": 8,
        "num_layers": 2,
        "num_heads": 2,
        "hidden_dim": 16,
        "mlp_dim": 32,
    }
    module = seeded(torchvision.models.VisionTransformer, **sizes, num_classes=5)
    nn.init.normal_(module.heads.head.weight)
    model = export(module, torch.zeros(1, 3, 24, 24), layer=layer, emit=TENSORS)
    card = card_of(model)
    assert card.grid == "tokens 1 to 9 as 3x3"
    x = pictures(2, 24)
    got = run(model, x, [[0, 3], [4, 1]])
    at = layer or "encoder.layers.encoder_layer_1.ln_1"
    for name, tokens in zip(
        ("cam_activations", "cam_gradients"), in_torch(module, at, x, [[0, 3], [4, 1]])[1:], strict=True
    ):
        assert relative_error(got[name], tokens[:, 1:].swapaxes(1, 2).reshape(-1, 16, 3, 3)) <= 1e-4


def test_channels_last_layer():
    module = seeded(ChannelsLast)
    model = export(module, SMALL, layer="norm", emit=TENSORS)
    assert card_of(model).grid == "channels last"
    got, (_, *want) = run(model, pictures(1), [[1]]), in_torch(module, "norm", pictures(1), [[1]])
    assert relative_error(got["cam_activations"], want[0].transpose(0, 3, 1, 2)) <= 1e-4
    assert relative_error(got["cam_gradients"], want[1].transpose(0, 3, 1, 2)) <= 1e-4


@pytest.mark.parametrize("layer", ["relu", "node_relu"])
def test_layer_by_the_name_of_a_value_or_node(layer):
    module = seeded(Functional)
    model = export(module, SMALL, layer=layer, emit=TENSORS)
    assert card_of(model).layer == layer.removeprefix("node_")


def test_several_layers_are_each_checked(net, monkeypatch):
    seen = []
    verify = exporting._verify

    def noted(checked, *others):
        seen.append((Card.from_metadata(checked.metadata_props).layer, others[3]))
        verify(checked, *others)

    monkeypatch.setattr(exporting, "_verify", noted)
    options = {"evidence": "both", "fuse": "max", "smooth": ("eigen",), "compat": "paper"}
    made = export(net, SMALL, layer=["stem.0", "conv2d_1", "stem.0", "conv2d"], **options)
    card = Card.from_metadata(made.metadata_props)
    values = card.layer.split(", ")
    assert values == ["conv2d", "conv2d_1"]
    assert seen == [(values[0], "stem.0"), (values[1], None)]
    assert (card.evidence, card.fuse, card.smooth, card.compat) == ("both", "max", ("eigen",), None)


@pytest.mark.parametrize("wrong", ["stem.0", "conv2d_1"])
def test_a_wrong_gradient_at_one_of_several_layers_is_refused(net, monkeypatch, wrong):
    verify = exporting._verify
    monkeypatch.setitem(RULES, ("", "Relu"), wrong_relu(1.01))
    layers = ["stem.0", "conv2d_1"]

    def only(checked, *others):
        name = "stem.0" if others[3] == "stem.0" else "conv2d_1"
        if name == wrong:
            verify(checked, *others)

    monkeypatch.setattr(exporting, "_verify", only)
    with pytest.raises(OnnxcamError, match="does not agree with torch"):
        export(net, SMALL, layer=layers)


def test_a_method_that_looks_at_the_picture_is_checked_there(net, monkeypatch):
    function = METHODS["gradcam"].function
    monkeypatch.setitem(
        METHODS, "at picture", dataclasses.replace(METHODS["gradcam"], function=function, at_picture=True)
    )
    made = export(net, SMALL, method="at picture")
    assert Card.from_metadata(made.metadata_props).layer == "image"
    with pytest.raises(OnnxcamError, match="looks at the picture itself; leave the layer out"):
        export(net, SMALL, method="at picture", layer="stem.0")
    monkeypatch.setitem(RULES, ("", "Relu"), wrong_relu(1.01))
    with pytest.raises(OnnxcamError, match="does not agree with torch"):
        export(net, SMALL, method="at picture")


def test_layer_may_be_the_picture_itself(net):
    model = export(net, SMALL, layer="image", emit=TENSORS)
    x = pictures(1).requires_grad_()
    copy.deepcopy(net).eval()(x)[0, 2].backward()
    assert relative_error(run(model, x, [[2]])["cam_gradients"], x.grad.numpy()) <= 1e-4


def test_functional_net():
    module = seeded(Functional)
    model = export(module, SMALL, emit=TENSORS)
    card = card_of(model)
    assert (card.layer, card.module) == ("hardswish", None)
    x = pictures(2)
    map_ = F.hardswish(F.conv2d(F.max_pool2d(F.relu(F.conv2d(x, module.a)), 2), module.b)).detach()
    got = run(model, x, [[2], [0]])
    assert relative_error(got["cam_activations"], map_.numpy()) <= 1e-5
    slope = (module.c[[2, 0]] / map_[0, 0].numel()).detach().numpy()
    want = np.broadcast_to(slope[:, :, None, None], map_.shape)
    assert relative_error(got["cam_gradients"], want) <= 1e-5


@pytest.mark.parametrize("score", ["before", "after"])
@pytest.mark.parametrize(
    ("end", "layer"),
    [(nn.Softmax(1), "conv"), (nn.LogSoftmax(1), None), (nn.Sigmoid(), None)],
    ids=lambda v: type(v).__name__,
)
def test_ends_in_a_probability(end, score, layer):
    module = seeded(Ending, end)
    model = export(module, SMALL, layer=layer, score=score, emit=TENSORS)
    x, at = pictures(2), layer or "relu"
    got = run(model, x, [[1], [3]])
    inner = Ending(nn.Identity()) if score == "before" else Ending(nn.Softmax(1))
    if score == "after" and isinstance(end, nn.Sigmoid):
        inner = Ending(end)
    inner.load_state_dict(module.state_dict())
    _, activations, gradients = in_torch(inner, at, x, [[1], [3]])
    assert relative_error(got["scores"], copy.deepcopy(module).eval()(x).detach().numpy()) <= 1e-5
    assert relative_error(got["cam_activations"], activations) <= 1e-5
    assert relative_error(got["cam_gradients"], gradients) <= 1e-4


# The module comes back as it was


def state_of(module):
    return {
        "modes": [part.training for part in module.modules()],
        "hooks": [len(part._forward_hooks) for part in module.modules()],
        "weights": {name: value.clone() for name, value in module.state_dict().items()},
        "gradients": [p.grad for p in module.parameters()],
        "needed": [p.requires_grad for p in module.parameters()],
    }


@pytest.mark.parametrize(
    ("layer", "fails"), [("conv", False), (None, False), ("spare", True), ("nowhere", True)]
)
def test_module_comes_back_as_it_was(layer, fails):
    module = seeded(Net).train()
    module.stem[1].eval()  # as when fine-tuning
    module.conv.requires_grad_(False)
    before = state_of(module)
    with pytest.raises(OnnxcamError) if fails else contextlib.nullcontext():
        export(module, SMALL, layer=layer)
    after = state_of(module)
    weights = before.pop("weights"), after.pop("weights")
    assert before == after
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_says_nothing(capfd):
    export(Changed(lambda x: print("tracing") or x), SMALL)
    with pytest.raises(OnnxcamError):
        export(Branching(), SMALL)
    assert capfd.readouterr() == ("", "")


# The check


def wrong_relu(factor):
    right = RULES["", "Relu"]

    def rule(op, node, arriving):
        return [None if dx is None else op.Mul(dx, factor) for dx in right(op, node, arriving)]

    return rule


@pytest.mark.parametrize(("factor", "layer"), [(0.5, "stem.0"), (1.01, "conv2d")])
def test_wrong_gradient_is_refused(net, monkeypatch, tmp_path, factor, layer):
    monkeypatch.setitem(RULES, ("", "Relu"), wrong_relu(factor))
    with pytest.raises(
        OnnxcamError, match=r"does not agree with torch: .* gradients by at least \d"
    ) as caught:
        export(net, SMALL, tmp_path / "net.onnx", layer=layer)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_wrong_scores_are_refused(net, monkeypatch, tmp_path):
    cleaned = exporting._cleaned

    def spoilt(model, *args):
        bias = model.graph.initializers["fc.bias"]
        bias.const_value = type(bias.const_value)(bias.const_value.raw + 0.01, name="fc.bias")
        return cleaned(model, *args)

    monkeypatch.setattr(exporting, "_cleaned", spoilt)
    with pytest.raises(
        OnnxcamError, match="does not agree with torch: scores and activations are off by up to"
    ):
        export(net, SMALL, tmp_path / "net.onnx")
    assert list(tmp_path.iterdir()) == []


def test_module_that_is_random_is_refused():
    with pytest.raises(OnnxcamError, match="does not agree with torch"):
        export(Changed(lambda x: F.dropout(x, 0.5, training=True)), SMALL)


@pytest.mark.parametrize(("own", "agrees"), [(0.01, True), (0.001, False), (0.2, False)])
def test_gradient_may_vary_as_torch_s_own_does(net, monkeypatch, own, agrees):
    """Where rounding decides, another runtime may find another gradient, as torch does after rounding."""
    gradient, runtime, calls = exporting._gradient, exporting._runtime, []
    error = max(own, 0.01)

    def nudged(*args):
        calls.append(args)
        return gradient(*args) * (1 if len(calls) % 2 else 1 + own)

    def other(*args):
        run = runtime(*args)
        return lambda *given: [v * (1 + error * (i == 2)) for i, v in enumerate(run(*given))]

    monkeypatch.setattr(exporting, "_gradient", nudged)
    monkeypatch.setattr(exporting, "_runtime", other)
    with contextlib.nullcontext() if agrees else pytest.raises(OnnxcamError, match=f"vary by {own:.2g}"):
        export(net, SMALL)
    assert len(calls) == (2 if agrees else 2 * exporting._DRAWS)


def test_checks_without_onnxruntime(net, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else found(name)
    )
    export(net, SMALL)
    export(net, SMALL, layer="conv")
    monkeypatch.setitem(RULES, ("", "Relu"), wrong_relu(2.0))
    with pytest.raises(OnnxcamError, match="does not agree with torch"):
        export(net, SMALL, layer="conv")


@pytest.mark.parametrize(
    ("dtype", "layer"), [(torch.float64, "stem.0"), (torch.float16, "stem.0"), (torch.float16, None)]
)
def test_other_dtypes(dtype, layer):
    module = seeded(Net).to(dtype)
    model = export(module, example(module, 3, 16, 16), layer=layer, emit=TENSORS)
    kinds = {str(v.dtype) for v in (model.graph.inputs[0], *model.graph.outputs)}
    assert kinds == {"DOUBLE" if dtype == torch.float64 else "FLOAT16", "FLOAT"}


def test_example_fits_the_module():
    picture = example(seeded(Net).double(), 1, 5, 7)
    assert (picture.dtype, list(picture.shape)) == (torch.float64, [1, 1, 5, 7])
    assert example(nn.Identity(), 3, 2, 2).dtype == torch.float32


# Clear errors


class Branching(Net):
    def forward(self, x):
        return super().forward(x * 2 if x.sum() > 0 else x)


class Frozen(Net):
    def forward(self, x):
        with torch.no_grad():
            x = self.features(x)
        return self.fc(x.mean((2, 3)))


class Dictionary(Net):
    def forward(self, x):
        return {"logits": super().forward(x)}


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (Net, {"layer": "con"}, r"has no layer 'con' \(did you mean 'conv'"),
        (Net, {"layer": "fc"}, r"layer 'linear' (is \[N,5\]|comes after the scores)"),
        (Net, {"layer": "mean"}, r"layer 'mean' is \[N,8\]; a map needs an activation"),
        (Net, {"layer": "spare"}, "does not run its part 'spare' in evaluation mode"),
        (Paired, {"layer": "pair"}, "layer 'pair' returns a tuple, not one tensor"),
        (Frozen, {"layer": "conv"}, "torch finds no gradient at layer 'conv2d_1': does forward"),
        (Dictionary, {}, "the module returns a dict; it must return one tensor"),
        (Branching, {}, "torch cannot export the module: .*data-dependent"),
        (lambda: Changed(lambda x: x.reshape(2, 3, 16, 16)), {}, "torch cannot export the module"),
        (lambda: nn.Conv2d(3, 4, 3), {}, "no output of class scores"),
        (Net, {"opset": 17}, "opset is 17; it must be at least 18"),
        (Net, {"opset": 99}, "cannot write opset 99"),
        (Net, {"method": "nope"}, "there is no method 'nope'"),
        (Net, {"color": "GRAY"}, "color is GRAY, but the model's input has 3 channels"),
    ],
    ids=lambda v: v if isinstance(v, str) else None,
)
def test_what_cannot_be_exported(make, options, message, tmp_path):
    with pytest.raises(OnnxcamError, match=message) as caught:
        export(make(), SMALL, tmp_path / "x.onnx", **options)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((SMALL, SMALL), "must be one tensor, the picture; there are 2"),
        ((), "there are 0"),
        (SMALL[0], r"is torch.float32 \[3, 16, 16\]"),
        (SMALL.int(), "is torch.int32"),
        (SMALL.bfloat16(), "is torch.bfloat16"),
        (SMALL.half(), "the module fails on an input .*Half"),
        (torch.zeros(1, 4, 16, 16), r"the module fails on an input \[2, 4, 16, 16\]: RuntimeError"),
    ],
)
def test_inputs_that_are_no_picture(net, inputs, message):
    with pytest.raises(OnnxcamError, match=message):
        export(net, inputs)


def test_tuple_of_one_picture(net):
    assert card_of(export(net, (SMALL,))).module == "relu"


def test_folder_that_does_not_exist(net, tmp_path):
    with pytest.raises(OnnxcamError, match="cannot be written"):
        export(net, SMALL, tmp_path / "nowhere" / "net.onnx")


# Modules and weights by name

FACTORY = """
import torch
def small(weights="DEFAULT", pretrained=True):
    assert weights is None and pretrained is False, "this would download something"
    return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Flatten())
def classifier():
    layers = torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()
    return torch.nn.Sequential(*layers, torch.nn.Linear(4, 2))
class Holder:
    Net = torch.nn.Identity
def broken():
    raise RuntimeError("out of\\norder")
def text():
    return "no module"
def needs(argument):
    pass
number = 3
"""
SPEC = "onnxcam_test_factory:small"


@pytest.fixture
def factory(tmp_path, monkeypatch):
    (tmp_path / "onnxcam_test_factory.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("onnxcam_test_factory", None)


def weights_of(module):
    return {name: value + 1 for name, value in module.state_dict().items()}


@pytest.mark.parametrize("wrap", [dict, lambda s: {"state_dict": s, "epoch": 3}, lambda s: {"model": s}])
@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
def test_weights(factory, wrap, prefix, name):
    state = {prefix + key: value for key, value in weights_of(load_module(SPEC)).items()}
    if name.endswith(".safetensors"):
        safetensors.torch.save_file(state, factory / name)
    else:
        torch.save(wrap(state), factory / name)
    loaded = load_module(SPEC, factory / name).state_dict()
    assert len(loaded) == len(state)
    assert all(torch.equal(loaded[key], state[prefix + key]) for key in loaded)
    assert str(factory) not in sys.path


class Malicious:
    def __reduce__(self):
        return Path.touch, (Path("pwned"),)


def corrupt(folder, kind):
    """Write a file of weights that must be refused."""
    path = folder / ("weights.safetensors" if kind.startswith("safetensors") else "weights.pth")
    state = weights_of(load_module(SPEC))
    if kind == "missing":
        del state["0.bias"], state["1.weight"]
        torch.save(state, path)
    elif kind == "unexpected":
        torch.save({**state, "9.weight": torch.ones(1)}, path)
    elif kind == "both":
        state["head"] = state.pop("0.bias")
        torch.save(state, path)
    elif kind == "shape":
        torch.save({**state, "0.bias": torch.ones(5)}, path)
    elif kind == "malicious":
        torch.save({"state_dict": Malicious()}, path)
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(Malicious()))
    elif kind == "module":
        torch.save(load_module(SPEC), path)
    elif kind == "list":
        torch.save([1, 2], path)
    elif kind in ("empty", "safetensors empty"):
        path.touch()
    elif kind in ("text", "safetensors text"):
        path.write_text("no weights, but long enough to look like some")
    elif kind == "cut":
        torch.save(state, path)
        path.write_bytes(path.read_bytes()[:900])
    elif kind == "folder":
        path.mkdir()
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", r"does not fit .*: keys 2 missing \(0.bias, 1.weight\)$"),
        ("unexpected", r"keys 1 unexpected \(9.weight\)$"),
        ("both", r"keys 1 missing \(0.bias\), 1 unexpected \(head\)$"),
        ("shape", r"does not fit .*size mismatch for 0.bias"),
        ("malicious", "holds more than weights, and onnxcam runs no code from it"),
        ("pickle", "holds more than weights, and onnxcam runs no code from it"),
        ("module", "holds more than weights"),
        ("list", "holds no state dict"),
        ("empty", "is not a file of weights|holds more than weights"),
        ("text", "is not a file of weights|holds more than weights"),
        ("cut", "is not a file of weights"),
        ("folder", "cannot be read: Is a directory"),
        ("absent", "does not exist"),
        ("safetensors empty", "is not a safetensors file"),
        ("safetensors text", "is not a safetensors file"),
        ("safetensors absent", "does not exist"),
    ],
)
def test_weights_that_are_refused(factory, kind, message):
    path = corrupt(factory, kind)
    with pytest.raises(OnnxcamError, match=message) as caught:
        load_module(SPEC, path)
    assert "\n" not in str(caught.value)
    assert not (factory / "pwned").exists()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("torchvision.models", "write PACKAGE.MODULE:FACTORY"),
        (":small", "write PACKAGE.MODULE:FACTORY"),
        ("onnxcam_test_factory:smal", r"has no 'smal' \(did you mean 'small'"),
        ("onnxcam_test_factori:small", "cannot be made: ModuleNotFoundError"),
        ("onnxcam_test_factory:broken", "cannot be made: RuntimeError: out of$"),
        ("onnxcam_test_factory:needs", "cannot be made: TypeError: .*argument"),
        ("onnxcam_test_factory:text", "makes a str, not a torch.nn.Module"),
        ("onnxcam_test_factory:number", "is not a function or a class"),
    ],
)
def test_specs_that_make_no_module(factory, spec, message):
    with pytest.raises(OnnxcamError, match=message):
        load_module(spec)


def test_specs_that_make_a_module(factory):
    assert isinstance(load_module("onnxcam_test_factory:Holder.Net"), nn.Identity)
    assert isinstance(load_module("torchvision.models:mobilenet_v3_small"), nn.Module)


def test_command_line(factory):
    spec = "onnxcam_test_factory:classifier"
    torch.save(weights_of(load_module(spec)), factory / "weights.pth")
    arguments = ["export", spec, "-o", "out.onnx", "--weights", "weights.pth", "--input-size", "16x20"]
    done = CliRunner().invoke(app, [*arguments, "--layer", "0", "--method", "hirescam"])
    assert done.exit_code == 0, done.output
    assert "hirescam at layer conv2d (0), score before softmax" in done.output
    with torch.no_grad():
        x = torch.randn(2, 3, 16, 20)
        want = load_module(spec, factory / "weights.pth").eval()(x).numpy()
    assert relative_error(run(factory / "out.onnx", x)["scores"], want) <= 1e-5
