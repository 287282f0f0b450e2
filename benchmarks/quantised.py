"""Maps of quantised models, and what attaching costs them: ``python benchmarks/quantised.py [PAIRS]``.

Quantises the models of ``models/`` with onnxruntime's own tools, calibrated on the photos there and their
mirror images, and with onnxconverter-common's float16; attaches to each; writes docs/quantised.md. The maps
are those of Grad-CAM at the default layer. Needs ``pip install onnxconverter-common sympy``.
"""

import logging
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnxconverter_common import float16
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process
from PIL import Image

from onnxcam import attach
from onnxcam.card import Card
from onnxcam.image import prepare

ROOT = Path(__file__).parents[1]
MODELS = ROOT / "models"
PAGE = ROOT / "docs" / "quantised.md"
IMAGENET = ("chelsea.png", "coffee.png", "cat_and_coffee.png")

FACTS = {
    "efficientnet_lite0": {
        "color": "RGB", "scale": 1.0, "mean": [127], "std": [128],
        "resize": "stretch", "interpolation": "bicubic",
    },
    "squeezenet1_1": {
        "color": "BGR", "scale": 1.0, "mean": [104.006, 116.669, 122.679], "std": [1],
        "resize": "stretch", "interpolation": "bilinear",
    },
    "pp_lcnet_orientation": {
        "color": "RGB", "scale": 1 / 255, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225],
        "resize": "crop:256", "interpolation": "bilinear",
    },
}  # fmt: skip
PHOTOS = {"efficientnet_lite0": IMAGENET, "squeezenet1_1": IMAGENET, "pp_lcnet_orientation": ("page.png",)}

PREAMBLE = """# Quantised models

Made by `python benchmarks/quantised.py` from the models of `models/`: int8 by onnxruntime's
`quantize_static` (uint8 activations, int8 weights, after `quant_pre_process`, calibrated on the photos
below and their mirror images) and by `quantize_dynamic`, float16 by onnxconverter-common's
`convert_float_to_float16`. The maps are Grad-CAM at the default layer.

- **top-1**: the best class of the fp32 model and of this one, photo by photo.
- **correlation**: Pearson's, of the map with the fp32 model's, for the fp32 model's two best classes of
  each photo; flat: the fp32 map or this one is the same everywhere.
- **time**: attached over plain, run in turn in one process on two threads; median of the ratios
  (quartiles), and the plain model's median in ms. The machine was shared and busy: read the ratios. What the
  gradient costs in the fp32 rows it costs in all, as it is computed in floating point.
- **int8 left**: how many operators on stored numbers onnxruntime runs in the plain model, and how many of
  those it still runs once the gradient is attached.

## What the gradient is

The straight-through gradient: rounding counts as the identity, and what was cut to the range of its type
has no gradient. After a convolution or a matrix product on stored numbers only the result tells what was
cut, so there the two ends of the range count as cut; everywhere else what is rounded is worked out again
and compared. The scores are explained as they are before they are stored: a class whose score was cut still
has a map. The reference of the tests is the autograd of `torch.fake_quantize_per_tensor_affine`.

## What falls short

- One scale for all weights of a layer is coarse where the layer is a depthwise convolution: per tensor, the
  maps of EfficientNet-Lite0 and above all PP-LCNet follow fp32 less closely than per channel, and so do
  those of `quantize_dynamic`, which had no per-channel convolution weights here.
- The time ratio of a fast int8 model is higher than that of the fp32 model because its own part is faster:
  SqueezeNet's gradient passes a convolution to 1000 classes at 13x13 positions.
- On a CPU, onnxruntime has no Relu or HardSwish for float16 and converts around them. `attach` brings
  models older than opset 18 to 18, where these operators have definitions of their own, which onnxruntime
  then writes out instead of fusing them with the convolution before: float16 models of an older opset
  (SqueezeNet: 17, PP-LCNet: 15) run 2 to 3 times slower on a CPU once attached. EfficientNet-Lite0 (opset
  20) does not.
- Models with int8 activations (`QInt8`) in QDQ format: onnxruntime on x86 turns them to uint8 first, but
  only values that are read once. What the gradient reads as well stays int8, and its MatMul, Gemm and
  Softmax run in floating point (convolutions stay int8); the scores may then differ by a rounding step.
- Gradients at the picture itself pass every layer's rounding: for EfficientNet-Lite0, per channel, they
  correlate 0.62 with those of fp32; those of float16 0.98.
- `onnxcam` refuses a file that onnx finds invalid though onnxruntime runs it, such as per-channel QDQ at an
  opset before 13. Quantised operators inside the branches of an If have no gradient.
"""


class Photos(CalibrationDataReader):
    """Each picture and its mirror image."""

    def __init__(self, name, feeds):
        self.left = [{name: x} for own in feeds for x in (own, own[..., ::-1].copy())]

    def get_next(self):
        """Return the next feed, or None."""
        return self.left.pop() if self.left else None


def options(threads=2):
    found = onnxruntime.SessionOptions()
    found.log_severity_level, found.intra_op_num_threads = 3, threads
    # A session's idle threads would otherwise go on spinning on the cores that the other one needs.
    found.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return found


def session(path):
    return onnxruntime.InferenceSession(path, options(), providers=["CPUExecutionProvider"])


def run(opened, **feeds):
    outputs = [output.name for output in opened.get_outputs()]
    halves = {i.name for i in opened.get_inputs() if i.type == "tensor(float16)"}
    given = {name: x.astype(np.float16) if name in halves else x for name, x in feeds.items()}
    return dict(zip(outputs, opened.run(outputs, given), strict=True))


def variants(plain, folder, name, feeds):
    """Yield what each kind is called, and its file."""
    ready = folder / "ready.onnx"
    quant_pre_process(plain, ready)
    yield "fp32", plain
    for kind in (QuantFormat.QDQ, QuantFormat.QOperator):
        for per_channel in (False, True):
            path = folder / f"{kind.name}{per_channel}.onnx"
            quantize_static(
                ready, path, Photos(name, feeds), quant_format=kind, per_channel=per_channel,
                activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
            )  # fmt: skip
            yield f"int8 {kind.name}, per {'channel' if per_channel else 'tensor'}", path
    path = folder / "dynamic.onnx"
    quantize_dynamic(ready, path, weight_type=QuantType.QUInt8)
    yield "int8 dynamic", path
    for keep in (True, False):
        path = folder / f"half{keep}.onnx"
        onnx.save(float16.convert_float_to_float16(onnx.load(plain), keep_io_types=keep), path)
        yield f"fp16{', fp32 input and output' if keep else ''}", path


def integer_nodes(path, folder, prefix=""):
    """Count the operators on stored numbers that onnxruntime makes of a file."""
    chosen = options()
    chosen.optimized_model_filepath = str(folder / "optimised.onnx")
    onnxruntime.InferenceSession(path, chosen, providers=["CPUExecutionProvider"])
    nodes = onnx.load(folder / "optimised.onnx").graph.node
    counts = Counter(n.op_type for n in nodes if not n.name.startswith("cam/"))
    return sum(counts[kind] for kind in counts if kind.startswith(("QLinear", "QGemm")) or "Integer" in kind)


def main():
    logging.disable(logging.WARNING)
    pairs = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    lines = [PREAMBLE]
    for stem, facts in FACTS.items():
        plain = MODELS / f"{stem}.onnx"
        picture = session(plain).get_inputs()[0]
        name, size = picture.name, picture.shape[2]
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            explained = folder / "fp32_cam.onnx"
            attach(plain, explained, **facts)
            whole = session(explained)
            card = Card.from_metadata(whole.get_modelmeta().custom_metadata_map)
            feeds = [prepare(Image.open(MODELS / p).convert("RGB"), card.input)[0] for p in PHOTOS[stem]]
            lines += [
                f"## {stem}, input {size}x{size}\n",
                f"Photos: {', '.join(PHOTOS[stem])}.\n",
                "| model | bytes | attaching adds | top-1 | correlation | time | int8 left |",
                "|---|---:|---:|---|---|---|---|",
            ]
            for kind, path in variants(plain, folder, name, [x.astype(np.float32) for x in feeds]):
                attached = folder / "attached.onnx"
                attach(path, attached, **facts)
                before, after = session(path), session(attached)
                tops, correlations = [], []
                for x in feeds:
                    scores = run(whole, **{name: x})[card.scores]
                    best = np.argsort(-scores.ravel())[:2].reshape(1, 2)
                    want = run(whole, **{name: x}, cam_class=best)["cam"][0]
                    found = run(after, **{name: x}, cam_class=best)
                    tops.append(f"{scores.argmax()} {found[card.scores].argmax()}")
                    correlations += [
                        np.corrcoef(a.ravel(), b.ravel())[0, 1] if a.std() and b.std() else np.nan
                        for a, b in zip(want.astype(float), found["cam"][0].astype(float), strict=True)
                    ]
                    np.testing.assert_allclose(
                        found[card.scores], run(before, **{name: x})[card.scores], rtol=1e-2, atol=1e-3
                    )
                times = []
                for _ in range(pairs + 10):
                    start = time.perf_counter()
                    run(before, **{name: feeds[0]})
                    middle = time.perf_counter()
                    run(after, **{name: feeds[0]})
                    times.append((middle - start, time.perf_counter() - middle))
                measured = np.array(times[10:])
                low, ratio, high = np.percentile(measured[:, 1] / measured[:, 0], [25, 50, 75])
                left = integer_nodes(path, folder), integer_nodes(attached, folder)
                row = [
                    kind,
                    f"{path.stat().st_size:,}",
                    f"{(attached.stat().st_size - path.stat().st_size) / 1024:.0f} KiB",
                    ", ".join(tops),
                    ", ".join("flat" if np.isnan(c) else f"{c:.3f}" for c in correlations),
                    f"{ratio:.2f} ({low:.2f} to {high:.2f}) of {np.median(measured[:, 0]) * 1e3:.1f}",
                    f"{left[0]}, {left[1]}" if left[0] else "",
                ]
                lines.append(f"| {' | '.join(row)} |")
                print(lines[-1], flush=True)
            lines.append("")
    PAGE.write_text("\n".join(lines))


if __name__ == "__main__":
    main()
