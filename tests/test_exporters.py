"""Files of torch's two exporters, old opsets and new, of any picture size, against torch in float64."""

import contextlib
import copy
import functools
import io
import warnings

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
import torchvision
from torch import nn
from torchvision.models import convnext, densenet, efficientnet, resnet, shufflenetv2

from onnxcam import layers, onnxfile
from onnxcam.attaching import attach
from onnxcam.card import Card
from onnxcam.errors import OnnxcamError
from tests.checks import relative_error
from tests.graphs import run
from tests.test_sizes import agrees_with_a_run

CLASSES = [[0, 3], [4, 1]]


def vit():
    model = torchvision.models.VisionTransformer(
        image_size=24, patch_size=8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=5
    )
    nn.init.normal_(model.heads.head.weight)
    return model


def efficient():
    """Squeeze and excite, SiLU, depthwise convolutions."""
    blocks = [
        efficientnet.MBConvConfig(1, 3, 1, 32, 16, 1, 1.0, 1.0),
        efficientnet.MBConvConfig(4, 5, 2, 16, 24, 2, 1.0, 1.0),
    ]
    return efficientnet.EfficientNet(blocks, 0.0, num_classes=5, last_channel=64)


def narrow_convnext():
    blocks = [convnext.CNBlockConfig(16, 32, 1), convnext.CNBlockConfig(32, None, 1)]
    return convnext.ConvNeXt(blocks, layer_scale=1.0, num_classes=5)


MODELS = {
    "resnet": lambda: resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes=5),
    "mobilenet": lambda: torchvision.models.mobilenet_v3_small(num_classes=5),
    "efficientnet": efficient,
    "shufflenet": lambda: shufflenetv2.ShuffleNetV2([2, 2, 2], [8, 16, 32, 64, 64], num_classes=5),
    "squeezenet": lambda: torchvision.models.squeezenet1_1(num_classes=5),
    "densenet": lambda: densenet.DenseNet(8, (2, 2, 2), 16, num_classes=5),
    "googlenet": lambda: torchvision.models.GoogLeNet(5, False, transform_input=True, init_weights=False),
    "convnext": narrow_convnext,
    "swin": lambda: torchvision.models.SwinTransformer([2, 2], 16, [2, 2], [2, 4], [4, 4], num_classes=5),
    "vit": vit,
}
LAST = {
    "resnet": "layer4",
    "mobilenet": "features",
    "efficientnet": "features",
    "shufflenet": "conv5",
    "squeezenet": "features",
    "googlenet": "inception5b",
    "convnext": "features",
    "swin": "norm",
    "vit": "encoder.layers.encoder_layer_1.ln_1",
}
"""The module whose output is the default layer; DenseNet's last activation is no module's."""

SIZES = {"vit": [(24, 24)], "swin": [(32, 32), (40, 56)]}


def model_of(name):
    torch.manual_seed(0)
    module = MODELS[name]().eval()
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.normal_(0, 0.1)
            part.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.normal_(part.bias, 0, 0.1)
    return module


def exported(module, x, opset, *, dynamo, fixed=False):
    """A model proto with the batch, and unless `fixed` height and width, open."""
    names = {"input_names": ["x"], "output_names": ["scores"], "opset_version": opset}
    axes = [0] if fixed else [0, 2, 3]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        if dynamo:
            open_axes = dict.fromkeys(axes, torch.export.Dim.DYNAMIC)
            return torch.onnx.export(
                module, (x,), dynamo=True, dynamic_shapes=(open_axes,), verbose=False, **names
            ).model_proto
        file = io.BytesIO()
        open_axes = {"x": {axis: "NCHW"[axis] for axis in axes}, "scores": {0: "N"}}
        torch.onnx.export(module, (x,), file, dynamo=False, dynamic_axes=open_axes, **names)
        return onnx.load_from_string(file.getvalue())


@functools.cache
def case(name, opset, dynamo):
    """A module and its file, made with the first of its `SIZES`."""
    module, sizes = model_of(name), sizes_of(name)
    x = torch.zeros(2, 3, *sizes[0])
    return module, exported(module, x, opset, dynamo=dynamo, fixed=len(sizes) == 1)


def sizes_of(name):
    return SIZES.get(name, [(43, 59), (64, 48)])


def in_torch(module, last, x):
    """Scores, the output of the module `last`, and the gradients of the classes there and at `x`."""
    module, seen = copy.deepcopy(module).double(), []
    x = x.double().requires_grad_()
    if last is not None:
        module.get_submodule(last).register_forward_hook(lambda _m, _x, y: seen.append(y) or y.clone())
    scores = module(x)
    found = [scores, *seen]
    for at in (x, *seen):
        picked = [
            torch.autograd.grad(scores[n, k], at, retain_graph=True)[0][n]
            for n, row in enumerate(CLASSES)
            for k in row
        ]
        found.append(torch.stack(picked))
    return [value.detach().numpy() for value in found]


def as_planes(name, x):
    """View the tokens of a ViT, behind the class token, and the channels-last maps of a Swin as planes."""
    if name == "vit":
        return x[:, 1:].swapaxes(1, 2).reshape(len(x), -1, 3, 3)
    return x.transpose(0, 3, 1, 2) if name == "swin" else x


TORCHSCRIPT = [
    ("resnet", 9),
    ("resnet", 11),
    ("resnet", 20),
    ("mobilenet", 9),
    ("mobilenet", 17),
    ("efficientnet", 13),
    ("shufflenet", 9),
    ("shufflenet", 13),
    ("squeezenet", 11),
    ("densenet", 9),
    ("googlenet", 13),
    ("convnext", 11),
    ("swin", 13),
    ("swin", 20),
    ("vit", 17),
]
DYNAMO = [
    ("resnet", 18),
    ("mobilenet", 20),
    ("efficientnet", 23),
    ("shufflenet", 18),
    ("densenet", 20),
    ("convnext", 23),
    ("swin", 18),
    ("vit", 23),
]


@pytest.mark.parametrize(
    ("name", "opset", "dynamo"),
    [(*case, False) for case in TORCHSCRIPT] + [(*case, True) for case in DYNAMO],
)
def test_one_file_explains_pictures_of_any_size(name, opset, dynamo):
    """The default layer is the last one, and gradients there and at the picture are torch's."""
    module, plain = case(name, opset, dynamo)
    assert {i.version for i in plain.opset_import if i.domain == ""} == {opset}
    at_picture = ir.to_proto(attach(plain, layer="x", emit=["gradients"]))
    default = attach(plain, emit=["cam", "heatmap", "activations", "gradients"])
    if name in LAST:
        assert Card.from_metadata(default.metadata_props).module.startswith(LAST[name])
    at_layer = ir.to_proto(default)
    for size in sizes_of(name):
        x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(3))
        feeds = {"x": x.numpy(), "cam_class": np.array(CLASSES)}
        scores, *wanted = in_torch(module, LAST.get(name), x)
        got = run(at_picture, feeds)
        assert relative_error(got["scores"], scores) <= 1e-5
        assert relative_error(got["cam_gradients"], wanted[-1 if len(wanted) == 1 else 1]) <= 1e-5
        got = run(at_layer, feeds)
        assert got["cam_heatmap"].shape == (2, 2, *size)
        assert np.isfinite(got["cam"]).all()
        if name in LAST:
            for output, value in (("cam_activations", wanted[0]), ("cam_gradients", wanted[2])):
                assert relative_error(got[output], as_planes(name, value)) <= 1e-5


def test_bfloat16():
    """ONNX has convolutions in bfloat16 from opset 22 on, onnxruntime none of them for the CPU."""
    module = model_of("vit").bfloat16()
    x = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(3)).bfloat16()
    plain = exported(module, x, 22, dynamo=True, fixed=True)
    model = ir.to_proto(attach(plain, layer=LAST["vit"], emit=["activations", "gradients"]))
    scores, activations, _, wanted = in_torch(module, LAST["vit"], x)
    feeds = {"x": x.float().numpy().astype(ml_dtypes.bfloat16), "cam_class": np.array(CLASSES)}
    got = run(model, feeds, by="ref")
    # bfloat16 keeps 8 bits, 0.004; the errors measured are 0.019, 0.005 and 0.011.
    assert relative_error(got["scores"], scores) <= 0.04
    assert relative_error(got["cam_activations"], as_planes("vit", activations)) <= 0.01
    assert relative_error(got["cam_gradients"], as_planes("vit", wanted)) <= 0.02


PASSED_THROUGH = (nn.Dropout, nn.Identity, torchvision.ops.StochasticDepth)
"""Modules of which nothing is left in a file."""


def outputs_of_modules(module, x):
    """What each module returns, in each of its runs, by path.

    A convolution gives what the normalisation after it does: exporters make one node of both.
    """
    outputs, makers = {}, {}

    def note(path, part, given, y):
        y = y[0] if isinstance(y, tuple) else y
        if isinstance(part, nn.BatchNorm2d):
            outputs[makers[id(given[0])]] = [y.clone()]
        outputs.setdefault(path, []).append(y.clone())  # a Relu may write into it
        makers[id(y)] = path

    module = copy.deepcopy(module)
    for path, part in module.named_modules():
        part.register_forward_hook(functools.partial(note, path))
    with torch.no_grad():
        module(x)
    return {path: [y.numpy() for y in ys] for path, ys in outputs.items() if path}


@pytest.mark.parametrize(
    ("name", "opset", "dynamo"),
    [
        ("resnet", 9, False),
        ("swin", 13, False),
        ("vit", 17, False),
        ("resnet", 18, True),
        ("mobilenet", 20, True),
        ("convnext", 23, True),
        ("swin", 18, True),
        ("vit", 23, True),
    ],
)
def test_a_module_path_is_what_that_module_returns(name, opset, dynamo):
    module, plain = case(name, opset, dynamo)
    model = onnxfile.normalise(ir.from_proto(plain))
    picture, logits = layers.picture(model), layers.scores(model).logits
    taken = {value.name for node in model.graph for value in node.outputs}
    x = torch.randn(2, 3, *sizes_of(name)[0], generator=torch.Generator().manual_seed(3))
    # The TorchScript exporter numbers the runs of a module, the other one does not: the last.
    wanted = {path: ys[-1 if dynamo else 0] for path, ys in outputs_of_modules(module, x).items()}
    found = {}
    for path, y in wanted.items():
        part = module.get_submodule(path)
        try:
            found[path] = layers.locate(model, path, picture, logits).name
        except OnnxcamError as error:
            if "a map needs" in str(error):
                assert y.ndim == 2 or y.shape[2:] == (1, 1), error
            elif "comes after the scores" in str(error):
                assert y.shape == (2, 5), error
            else:
                assert f"has no layer {path!r}" in str(error)
                folded = isinstance(part, nn.BatchNorm2d) and not dynamo
                assert folded or isinstance(part, PASSED_THROUGH), error
    proto = ir.to_proto(model)
    names = [output.name for output in proto.graph.output]
    proto.graph.output.extend(map(onnx.helper.make_empty_tensor_value_info, {*found.values()} - {*names}))
    got = run(proto, {"x": x.numpy()})
    for path, value in found.items():
        if path not in taken:  # a value's name goes before a module's
            assert relative_error(got[value], wanted[path]) <= 1e-5, path


@pytest.mark.parametrize(
    ("name", "opset"), [("shufflenet", 13), ("swin", 13), ("vit", 17), ("googlenet", 13)]
)
def test_sizes_that_are_known_are_those_of_a_run(name, opset):
    size = SIZES.get(name, [(43, 59)])[-1]
    plain = exported(model_of(name), torch.zeros(2, 3, *size), opset, dynamo=False, fixed=name == "vit")
    own = onnxfile.normalise(ir.from_proto(plain))
    agrees_with_a_run(own, {"x": np.zeros((3, 3, *size), np.float32)})
