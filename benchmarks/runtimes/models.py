"""The explained models that the runtimes are tried on."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
from onnxruntime.tools.onnx_model_utils import make_dim_param_fixed
from PIL import Image

from onnxcam import attach
from onnxcam.card import Card

Arrays = dict[str, np.ndarray]
ROOT = Path(__file__).parents[2]

_CONV, _VIT_NAME = "a small convolutional network", "a small vision transformer"

_CNN = """(float[N,3,32,32] x) => (float[N,6] scores) {
    a = Conv<kernel_shape=[3,3], pads=[1,1,1,1]>(x, a_w)
    b = Relu(a)
    c = MaxPool<kernel_shape=[3,3], strides=[2,2], pads=[1,1,1,1]>(b)
    d = Conv<kernel_shape=[3,3], pads=[1,1,1,1]>(c, d_w)
    features = Relu(d)
    e = Conv<kernel_shape=[3,3], pads=[1,1,1,1], strides=[2,2]>(features, e_w)
    f = Relu(e)
    g = GlobalAveragePool(f)
    h = Flatten(g)
    scores = MatMul(h, h_w)
}"""
_CNN_WEIGHTS = {"a_w": (8, 3, 3, 3), "d_w": (8, 8, 3, 3), "e_w": (16, 8, 3, 3), "h_w": (16, 6)}

_BLOCK = """
    n{i} = LayerNormalization<axis=2>(x{i}, ones, zeros)
    q{i}w = MatMul(n{i}, q{i}_w) q{i}h = Reshape(q{i}w, heads) q{i} = Transpose<perm=[0,2,1,3]>(q{i}h)
    k{i}w = MatMul(n{i}, k{i}_w) k{i}h = Reshape(k{i}w, heads) k{i} = Transpose<perm=[0,2,3,1]>(k{i}h)
    v{i}w = MatMul(n{i}, v{i}_w) v{i}h = Reshape(v{i}w, heads) v{i} = Transpose<perm=[0,2,1,3]>(v{i}h)
    s{i} = MatMul(q{i}, k{i}) t{i} = Div(s{i}, four) u{i} = Softmax<axis=3>(t{i}) w{i} = MatMul(u{i}, v{i})
    o{i}h = Transpose<perm=[0,2,1,3]>(w{i}) o{i} = Reshape(o{i}h, joined) p{i} = MatMul(o{i}, p{i}_w)
    r{i} = Add(x{i}, p{i})
    m{i} = LayerNormalization<axis=2>(r{i}, ones, zeros)
    f{i} = MatMul(m{i}, f{i}_w)
    g{i} = Gelu(f{i}) h{i} = MatMul(g{i}, h{i}_w) x{j} = Add(r{i}, h{i})
"""
_VIT = f"""(float[N,3,32,32] x) => (float[N,6] scores) {{
    patches = Conv<kernel_shape=[4,4], strides=[4,4]>(x, patch_w)
    flat = Reshape(patches, rows)
    x0 = Transpose<perm=[0,2,1]>(flat)
    {_BLOCK.format(i=0, j=1)}
    {_BLOCK.format(i=1, j=2)}
    last = LayerNormalization<axis=2>(x2, ones, zeros)
    pooled = ReduceMean<keepdims=0>(last, one)
    scores = MatMul(pooled, head_w)
}}"""
_VIT_WEIGHTS = {"patch_w": (32, 3, 4, 4), "head_w": (32, 6)} | {
    f"{name}{i}_w": {"f": (32, 64), "h": (64, 32)}.get(name, (32, 32)) for i in (0, 1) for name in "qkvpfh"
}
_VIT_CONSTANTS = {
    "ones": np.ones(32, np.float32), "zeros": np.zeros(32, np.float32), "four": np.float32(4), "one": [1],
    "rows": [0, 32, 64], "heads": [0, 64, 2, 16], "joined": [0, 64, 32],
}  # fmt: skip


def _random(text: str, weights: dict[str, tuple[int, ...]], constants: dict[str, Any]) -> onnx.ModelProto:
    """A small model with random weights."""
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 20]>\nm {text}')
    rng = np.random.default_rng(0)
    arrays = {name: np.asarray(value) for name, value in constants.items()}
    for name, shape in weights.items():
        fan_in = np.prod(shape[1:]) if len(shape) > 2 else shape[0]
        arrays[name] = (rng.standard_normal(shape) * np.sqrt(2 / fan_in)).astype(np.float32)
    model.graph.initializer.extend(onnx.numpy_helper.from_array(a, name) for name, a in arrays.items())
    return model


def _model(name: str) -> onnx.ModelProto:
    if name == _CONV:
        return _random(_CNN, _CNN_WEIGHTS, {})
    if name == _VIT_NAME:
        return _random(_VIT, _VIT_WEIGHTS, _VIT_CONSTANTS)
    return onnx.load(ROOT / "models" / f"{name}.onnx")


@dataclasses.dataclass(frozen=True)
class Case:
    """A model and how it is explained.

    Attributes:
        model: a file of ``models/``, or one of the small ones.
        what: what the page says of it, beside the model.
        options: of `attach`.
    """

    model: str
    what: str
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def small(self) -> bool:
        """Whether it is one of the small ones."""
        return self.model in (_CONV, _VIT_NAME)

    def plain(self, fixed: bool) -> onnx.ModelProto:
        """The model; `fixed`: for batches of one picture."""
        model = _model(self.model)
        if fixed:
            batch = model.graph.input[0].type.tensor_type.shape.dim[0].dim_param
            make_dim_param_fixed(model.graph, batch, 1)
        return model

    def picture(self) -> Arrays:
        """The model's input: the photo, roughly as the model takes it."""
        taken = self.plain(fixed=False).graph.input[0]
        height, width = (d.dim_value for d in taken.type.tensor_type.shape.dim[2:])
        pixels = np.asarray(_photo().resize((width, height)), np.float32).transpose(2, 0, 1)
        return {taken.name: (pixels[None] - 118) / np.float32(1 if self.model.startswith("squeeze") else 64)}

    def attach(self, path: Path, portable: bool) -> Arrays:
        """Write the explained model, a portable one for batches of one picture, and return its inputs."""
        options = {"class_input": "required", "portable": portable, **self.options}
        explained = attach(self.plain(fixed=portable), path, **options)
        card = Card.from_metadata(explained.metadata_props)
        assert card is not None
        feeds = self.picture() if card.picture is None else {card.picture: np.asarray(_photo())[None]}
        feeds["cam_class"] = np.array([[1] if portable else [1, -1]])
        return {**feeds, "cam_wanted": np.array(True)} if card.on_demand else feeds


def _photo() -> Image.Image:
    return Image.open(ROOT / "models" / "chelsea.png").convert("RGB")


_FACTS = {"color": "RGB", "scale": 1.0, "mean": (127,), "std": (128,), "resize": "stretch"}
CASES = [
    Case("efficientnet_lite0", "gradcam at the last layer"),
    Case("efficientnet_lite0", "gradcam in the middle", {"layer": "_blocks.4"}),
    Case("efficientnet_lite0", "gradcam on demand", {"on_demand": True}),
    Case("efficientnet_lite0", "gradcam of the picture itself", {"embed_preprocess": True, **_FACTS}),
    Case("efficientnet_lite0", "saliency at the picture", {"method": "saliency"}),
    Case("squeezenet1_1", "gradcam at the last layer"),
    Case("squeezenet1_1", "layercam before two max pools", {"layer": "fire2/concat", "method": "layercam"}),
    Case("squeezenet1_1", "guided back-propagation", {"method": "guidedbackprop"}),
    Case("pp_lcnet_orientation", "gradcam at the last layer"),
    Case(
        "pp_lcnet_orientation",
        "hirescam in the middle",
        {"layer": "p2o.pd_op.hardswish.7.0", "method": "hirescam"},
    ),
    Case(_VIT_NAME, "gradcam at the default layer"),
    Case(_VIT_NAME, "gradcam at the first block", {"layer": "x1"}),
    Case(_CONV, "eigencam", {"layer": "features", "method": "eigencam"}),
    Case(_CONV, "gradcam of the score less its rivals'", {"layer": "b", "method": "finercam"}),
    Case(_CONV, "ablationcam, for each of 8 channels", {"layer": "features", "method": "ablationcam"}),
    Case(_CONV, "scorecam, for each of 8 channels", {"layer": "features", "method": "scorecam"}),
    Case(_CONV, "smoothgrad, 25 times", {"method": "smoothgrad"}),
    Case(_CONV, "integrated gradients", {"method": "integratedgradients"}),
]
