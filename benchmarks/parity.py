"""How far onnxcam's maps are from its peers': ``make parity``, which writes ``docs/parity.md``.

Each peer explains a PyTorch module and onnxcam, in that peer's dialect, an ONNX file of the same weights, on
the same batch of pictures. Real weights and photos: files of ``models/``, each of whose nodes becomes a
PyTorch module here for a peer to look at. Random weights and pictures: torchvision's networks, exported.
It fails where a map is further off than `GOAL`, or than `EXCEPTIONS` allows and explains; ``make
parity-check`` only looks for that.
"""

import contextlib
import dataclasses
import importlib.metadata
import io
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import torch
from onnx import numpy_helper
from torch.nn import functional

from onnxcam import attach
from onnxcam.card import Preprocess
from onnxcam.dialects import DIALECTS
from onnxcam.image import open_image, prepare
from onnxcam.methods import METHODS
from tests import peers

ROOT = Path(__file__).parents[1]
MODELS = ROOT / "models"
PHOTOS = ("cat_and_coffee.png", "chelsea.png", "coffee.png")
GOAL = 1e-3

FOR_EACH_CHANNEL = ("ablationcam", "scorecam", "sscam", "iscam")
"""Methods that run the model for each channel, at a layer with few of them."""
MANY_RUNS = ("sscam", "iscam", "integratedgradients", "smoothgradcam++", "smoothgrad", "fullgrad")
"""Methods that are compared for the first picture and class only."""

EXCEPTIONS = {
    ("ViT", "ablationcam", "pytorch-grad-cam"): ("a", 1.0),
    ("MobileNetV2", "kpcacam", "pytorch-grad-cam"): ("e", 1.0),
    ("EfficientNet-Lite0", "gradcam++", "pytorch-grad-cam"): ("b", 5e-3),
    ("EfficientNet-Lite0", "gradcam, augmentation", "pytorch-grad-cam"): ("c", 5e-3),
    ("SqueezeNet 1.1", "gradcam, augmentation", "pytorch-grad-cam"): ("c", 5e-3),
}
"""Which reason explains what may be further off, and how far at most."""
AT_PICTURE = 5e-2
"""How far the methods with a value for each pixel may be off at most, by reason d."""
REASONS = {
    "a": "The peer's layer for transformers leaves a channel out in the class token too, and takes the "
    "minimum that it puts there over all tokens; here the channel changes on the map's plane. With a layer "
    "that spares the class token the peer's map is within 2e-6.",
    "b": "Rounding: where A is signed, the denominator 2 g^2 + S(A) g^3 + 1e-6 comes down to 3e-5 of its "
    "terms. In float64 the peer's own map is up to 1e-3 from its float32 one, and onnxcam's is no further.",
    "c": "Rounding at a kink: in a run or two of the six the input of a ReLU is 0 within rounding (one in "
    "SqueezeNet is -2e-5 in float64 and 9e-6 in onnxruntime), and its gradient that of one branch or the "
    "other. That moves a run's map by up to 6e-3; in Lite0 also the peer's own, from float32 to float64.",
    "d": "Rounding at kinks again, pixel by pixel. The peers' own float32 is up to 3.3e-2 of the largest "
    "value from their float64 (saliency in ResNet-18; onnxcam is within 7e-7 of that), onnxcam's up to "
    "1.6e-2 (Lite0, where 4 values in 10,000 are further than 0.001 from the peer's).",
    "e": "Activations of at most 4e-4 and 1e-8, of random weights, leave the kernel constant up to rounding: "
    "the peer's own map is another in float64, by up to 1.",
}

HEAD = """\
# Parity with the peers

What `make parity` measured and wrote ({versions}).

Each peer explained a PyTorch module, and onnxcam, attached with `compat` set to that peer, an ONNX file with
the same weights, on the same batch of pictures. A figure is the largest absolute difference of what the peer
returns, over all pictures, both classes and the layers named: pytorch-grad-cam's maps at the size of the
picture (`cam_heatmap`) and torchcam's at the layer's size (`cam`), both from 0 to 1. What captum returns, and
pytorch-grad-cam's guided back-propagation, is signed, unscaled and mostly for each channel
(`cam_attributions`); its figures are shares of the largest value. {many} are compared for the first picture
and class only. Where a cell is empty, the peer has no such method or none for this model; sscam is left out
where it takes a minute. smoothgradcam++ is compared at the second layer: at the first one of Lite0, signed,
the terms of its denominator cancel, and torchcam's own map in float32 is up to 0.5 from that in float64,
onnxcam's 7e-3; `tests/test_peers.py` compares it in float64. Peers that draw noise are given onnxcam's.

The goal is {goal:g}; what is further off is **bold**. That, and what comes near it, is explained:

{notes}

The projections (eigencam, eigengradcam, eigen smoothing): pytorch-grad-cam leaves the sign to its SVD, so
that a map may come out as its own negative. In the comparison its own rule for SegEigenCAM decides, which is
also onnxcam's: the extreme of larger magnitude is positive.

On tokens [N,T,C] captum's LayerGradCam averages over the channels and sums over the tokens, which is no map;
its LayerGradientXActivation is for each token, the class token too; and pytorch-grad-cam's ShapleyCAM ends in
an error ("Invalid activation shape").

Finer-CAM of another method than Grad-CAM is `--target rivals`. Of what these libraries can make it of, two
forms of pytorch-grad-cam are refused: with ShapleyCAM, whose second derivative would be that of the weighed
probabilities too, and with the methods that read the score, sum_j p_j (y - y_j) / (sum_j p_j + 1e-9), itself,
where onnxcam has its gradient.

`keras-book` and `keras-grad-cam` have no library to install; `tests/test_peers.py` compares them with their
published formulas in float64.
"""


@dataclasses.dataclass
class Case:
    """A model as both sides see it.

    Attributes:
        name: for the table.
        file: the ONNX file, as bytes.
        module: the same in PyTorch, up to the scores before the softmax.
        pictures: float32 [N,3,H,W].
        classes: what is explained.
        layers: two layers: name in the file and module; the second is the last before a linear head, if any.
        narrow: one with few channels, for the methods that run the model once for each.
        head: the Linear that CAM reads.
        planes: turns tokens into planes.
        wide: whether `narrow` is too wide or the model too slow for 35 runs for each channel.
    """

    name: str
    file: bytes
    module: torch.nn.Module
    pictures: torch.Tensor
    classes: list[int]
    layers: list[tuple[str, torch.nn.Module]]
    narrow: tuple[str, torch.nn.Module]
    head: torch.nn.Module | None = None
    planes: Callable[[torch.Tensor], torch.Tensor] | None = None
    wide: bool = False


class Node(torch.nn.Module):
    """One node of an ONNX file, for the operators of the files in ``models/``.

    A Conv, Gemm or Relu is a module of torch's own in it, which is what peers look for.
    """

    def __init__(self, node, constants):
        super().__init__()
        self.kind, self.reads, self.makes = node.op_type, list(node.input), node.output[0]
        self.attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        weights = [torch.from_numpy(constants[name].copy()) for name in self.reads[1:] if name in constants]
        self.reads = [name for name in self.reads if name not in constants]
        match self.kind:
            case "Conv":
                groups = self.attributes.get("group", 1)
                outputs, inputs, *kernel = weights[0].shape
                options = {"stride": self.attributes["strides"], "groups": groups}
                options["dilation"] = self.attributes.get("dilations", [1, 1])
                self.inner = torch.nn.Conv2d(
                    inputs * groups, outputs, kernel, bias=len(weights) > 1, **options
                )
            case "Gemm":
                self.inner = torch.nn.Linear(*reversed(weights[0].shape))
            case "Relu":
                self.inner = torch.nn.ReLU()
            case "Clip":
                self.bounds = [weight.item() for weight in weights]
        if self.kind in ("Conv", "Gemm"):
            for parameter, values in zip(self.inner.parameters(), weights, strict=True):
                parameter.data = values

    def forward(self, x, *others):
        """Compute the node."""
        of = self.attributes
        match self.kind:
            case "Conv":
                top, left, bottom, right = of.get("pads", [0] * 4)
                return self.inner(functional.pad(x, (left, right, top, bottom)))
            case "Gemm" | "Relu":
                return self.inner(x)
            case "Clip":
                return x.clamp(*self.bounds)
            case "MaxPool":
                return functional.max_pool2d(x, of["kernel_shape"], of["strides"])
            case "GlobalAveragePool" | "ReduceMean":
                return x.mean((2, 3), keepdim=True)
            case "Reshape" | "Flatten":
                return x.flatten(1)
            case "Add":
                return x + others[0]
            case "Concat":
                return torch.cat([x, *others], 1)
        raise NotImplementedError(self.kind)


class FromOnnx(torch.nn.Module):
    """An ONNX file as a module, each node a module in it, up to a Softmax at its end."""

    def __init__(self, model):
        super().__init__()
        constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
        self.picture = model.graph.input[0].name
        nodes = [node for node in model.graph.node if node.op_type != "Softmax"]
        self.nodes = torch.nn.ModuleList(Node(node, constants) for node in nodes)
        self.wiring = [(node.reads, node.makes) for node in self.nodes]

    def making(self, name):
        """Return the module of the node that makes the value."""
        return next(node for node in self.nodes if node.makes == name)

    def forward(self, x):
        """Return the scores."""
        values = {self.picture: x}
        for node, (reads, makes) in zip(self.nodes, self.wiring, strict=True):
            values[makes] = node(*(values[name] for name in reads))
        return values[makes]


def real(name, file, facts, layers, narrow, head=None):
    """A file of ``models/`` on the photos, explained for the cat and the coffee."""
    model = onnx.load(MODELS / file)
    module = FromOnnx(model).eval()
    pictures = np.concatenate([prepare(open_image(MODELS / photo), facts)[0] for photo in PHOTOS])
    found = [(layer, module.making(layer)) for layer in (*layers, narrow)]
    return Case(
        name, model.SerializeToString(), module, torch.from_numpy(pictures), [285, 967], found[:2], found[2],
        module.making(head).inner if head else None,
    )  # fmt: skip


def stretched(size, **facts):
    """Facts of a picture that is stretched to a square."""
    return Preprocess("image", height=size, width=size, layout="NCHW", scale=1.0, resize="stretch", **facts)


def lite0():
    """EfficientNet-Lite0: an inner bottleneck, signed, and the last activation."""
    facts = stretched(224, color="RGB", mean=(127.0,), std=(128.0,), interpolation="bicubic")
    layers = ("getitem_99", "hardtanh_32")
    return real("EfficientNet-Lite0", "efficientnet_lite0.onnx", facts, layers, "getitem_6", "scores")


def squeezenet():
    """SqueezeNet 1.1, whose maps are class maps after a ReLU."""
    mean = (104.006, 116.669, 122.679)
    facts = stretched(227, color="BGR", mean=mean, std=(1.0,), interpolation="bilinear")
    layers = ("fire5/concat", "fire9/concat")
    case = real("SqueezeNet 1.1", "squeezenet1_1.onnx", facts, layers, "fire2/squeeze1x1/relu")
    return dataclasses.replace(case, wide=True)


def random(name, module, size, layers, narrow, head=None, planes=None):
    """A network with random weights, on two random pictures."""
    module.eval()
    pictures = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    written = io.BytesIO()
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        dynamic = ({0: torch.export.Dim("N")},)
        torch.onnx.export(
            module,
            (pictures,),
            written,
            dynamo=True,
            dynamic_shapes=dynamic,
            external_data=False,
            verbose=False,
        )
    found = [(layer, module.get_submodule(layer)) for layer in (*layers, narrow)]
    return Case(name, written.getvalue(), module, pictures, [7, 3], found[:2], found[2], head, planes)


def resnet18():
    """ResNet-18."""
    from torchvision.models import resnet18

    module = resnet18(num_classes=10)
    case = random("ResNet-18", module, 96, ("layer3", "layer4"), "maxpool", module.fc)
    return dataclasses.replace(case, wide=True)


def mobilenet_v2():
    """MobileNetV2: an inner bottleneck, signed, and the last activation."""
    from torchvision.models import mobilenet_v2

    module = mobilenet_v2(num_classes=10)
    # Without it activations are so small that maps are of the size of the peers' epsilons.
    module.classifier[1].weight.data.mul_(1e6)
    layers = ("features.10", "features.18")
    return random("MobileNetV2", module, 96, layers, "features.1", module.classifier[1])


def vit():
    """A small Vision Transformer: 16 tokens as a plane of 4x4, and the class token."""
    from torchvision.models.vision_transformer import VisionTransformer

    module = VisionTransformer(64, 16, num_layers=3, num_heads=4, hidden_dim=64, mlp_dim=128, num_classes=10)
    torch.nn.init.normal_(module.heads.head.weight)  # torchvision starts at zero, without any gradient
    layers = ("encoder.layers.encoder_layer_1.ln_1", "encoder.layers.encoder_layer_2.ln_1")

    def planes(tokens):
        return tokens[:, 1:].transpose(1, 2).unflatten(2, (4, 4))

    return random("ViT", module, 64, layers, layers[1], planes=planes)


def ours(case, dialect, method, pictures, classes, layers, **options):
    """Return onnxcam's maps as the peer returns them, [N,K,...]."""
    output = peers.returned(dialect, method)
    names = [name for name, _ in layers] or None
    emit = ["cam", output.removeprefix("cam_")]
    explained = attach(
        onnx.load_from_string(case.file), method=method, layer=names, compat=dialect, emit=emit, **options
    )
    session_options = onnxruntime.SessionOptions()
    session_options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        ir.to_proto(explained).SerializeToString(), session_options, ["CPUExecutionProvider"]
    )
    feeds = {session.get_inputs()[0].name: pictures.numpy(), "cam_class": np.array([classes])}
    found = session.run([output], feeds)[0]
    return found.reshape(len(pictures), len(classes), *found.shape[1:]) if "attributions" in output else found


def theirs(case, dialect, method, pictures, index, layers, smooth):
    """Return what the peer does for one class, [N,...]."""
    modules = [module for _, module in layers]
    if dialect == "captum":
        found = peers.by_captum(method, case.module, *(modules or [None]), pictures, index).numpy()
        return found[:, 0] if method == "gradcam" else found
    if dialect == "torchcam":
        import torchcam.methods

        cams = peers.by_torchcam(method, case.module, modules, pictures, index, case.planes, head=case.head)
        if len(cams) == 1:
            return cams[0]
        kind = getattr(torchcam.methods, peers.TORCHCAM[method])
        return kind.fuse_cams([torch.from_numpy(cam) for cam in cams]).numpy()
    asked = {f"{'aug' if name == 'augmentation' else name}_smooth": True for name in smooth}
    return peers.by_pytorch_grad_cam(method, case.module, modules, pictures, index, case.planes, **asked)


def difference(case, dialect, method, layers, smooth=()):
    """Return the largest difference from what the peer returns: of scaled maps, or a share of the largest."""
    many = method in MANY_RUNS
    pictures, classes = (case.pictures[:1], case.classes[:1]) if many else (case.pictures, case.classes)
    options = {"smooth": smooth} if smooth else {}
    found = ours(case, dialect, method, pictures, classes, layers, **options)
    worst = largest = 0.0
    for k, index in enumerate(classes):
        expected = theirs(case, dialect, method, pictures, index, layers, smooth)
        if not np.isfinite(expected).all():
            raise SystemExit(f"{case.name}, {method}: {dialect} returns values that are not finite")
        worst = max(worst, float(np.abs(found[:, k] - expected).max()))
        largest = max(largest, float(np.abs(expected).max()))
    scaled = dialect != "captum" and peers.returned(dialect, method) == peers.RETURNED[dialect]
    return worst if scaled else worst / largest


def asked(case, dialect):
    """Yield the rows for one peer: name, method, sets of layers, smoothing."""
    for method in peers.PEERS[dialect]:
        if METHODS[method].at_picture:
            yield method, method, [[]], ()
        elif method == "sscam" and case.wide:
            continue
        elif method in FOR_EACH_CHANNEL:
            yield method, method, [[case.narrow]], ()
        elif method == "legrad":
            if case.planes is not None:
                yield method, method, [[]], ()
        elif method == "smoothgradcam++":
            yield method, method, [[case.layers[1]]], ()
        elif method == "cam":
            if case.head is not None:
                yield method, method, [[case.layers[1]]], ()
        elif case.planes is None or (dialect != "captum" and method != "shapleycam"):
            yield method, method, [[layer] for layer in case.layers], ()
    if dialect == "pytorch-grad-cam":
        yield "gradcam, both layers", "gradcam", [case.layers], ()
        yield "layercam, both layers", "layercam", [case.layers], ()
        yield "gradcam, augmentation", "gradcam", [[case.layers[0]]], ("augmentation",)
        yield "gradcam, eigen", "gradcam", [[case.layers[0]]], ("eigen",)
    if dialect == "torchcam":
        yield "gradcam, both layers", "gradcam", [case.layers], ()
        yield "layercam, both layers", "layercam", [case.layers], ()


def table(case):
    """Compare one model and return its part of the document and what is unexplained."""
    rows, unexplained = {}, []
    for dialect in peers.PEERS:
        for row, method, choices, smooth in asked(case, dialect):
            begun = time.perf_counter()
            worst = max(difference(case, dialect, method, layers, smooth) for layers in choices)
            note, limit = EXCEPTIONS.get((case.name, row, dialect), (None, GOAL))
            if worst > GOAL and (METHODS[method].at_picture or METHODS[method].full_size):
                note, limit = "d", AT_PICTURE
            if worst > limit:
                unexplained.append((case.name, row, dialect, worst))
            cell = f"{worst:.0e}"
            cell = f"**{cell}**" if worst > GOAL else cell
            rows.setdefault(row, {})[dialect] = f"{cell} ({note})" if note else cell
            print(
                f"{case.name}, {row}, {dialect}: {worst:.1e} in {time.perf_counter() - begun:.1f} s",
                flush=True,
            )
    n, _, height, width = case.pictures.shape
    lines = [
        f"## {case.name}",
        "",
        f"{n} pictures of {height}x{width}, classes {case.classes[0]} and {case.classes[1]}; layers "
        f"`{case.layers[0][0]}` and `{case.layers[1][0]}`; {', '.join(FOR_EACH_CHANNEL)} at "
        f"`{case.narrow[0]}`.",
        "",
        "| method | " + " | ".join(peers.PEERS) + " |",
        "|---|" + "---|" * len(peers.PEERS),
        *(
            f"| {row} | " + " | ".join(cells.get(d, "") for d in peers.PEERS) + " |"
            for row, cells in rows.items()
        ),
        "",
    ]
    return "\n".join(lines), unexplained


def formulas():
    """What each dialect does differently, out of its own docstrings."""
    lines = ["## What each dialect does", ""]
    for name, dialect in DIALECTS.items():
        if name == "paper":
            continue
        about = sys.modules[dialect.heatmap.__module__].__doc__ or ""
        lines += [f"**{name}**: {' '.join(about.split())}", ""]
        for method, form in dialect.methods.items():
            shared = form is DIALECTS["paper"].methods[method]
            lines.append(f"- {method}: {'as in the paper.' if shared else form.summary}")
        for role in ("cam", "heatmap", "fuse"):
            said = getattr(dialect, role).__doc__
            if said:
                lines.append(f"- `{role}`: {' '.join(said.split())}")
        lines.append("")
    return "\n".join(lines)


def main(page=None):
    """Compare everything, write the document to `page` if one is named, and return 1 if a bound is broken."""
    start = time.perf_counter()
    parts, unexplained = [], []
    for make in (lite0, squeezenet, resnet18, mobilenet_v2, vit):
        torch.manual_seed(0)
        part, more = table(make())
        parts.append(part)
        unexplained += more
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}"
        for name in ("grad-cam", "torchcam", "captum", "torch", "onnxruntime")
    )
    notes = "\n".join(f"- ({note}) {reason}" for note, reason in REASONS.items())
    many = ", ".join(MANY_RUNS[:-1]) + f" and {MANY_RUNS[-1]}"
    head = HEAD.format(goal=GOAL, versions=versions, notes=notes, many=many)
    text = "\n".join([head, *parts, formulas()])
    if page is not None:
        Path(page).write_text(text.rstrip() + "\n")
    print(f"{time.perf_counter() - start:.0f} s")
    for name, row, dialect, worst in unexplained:
        print(f"unexplained: {name}, {row}, {dialect}: {worst:.1e}")
    return 1 if unexplained else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
