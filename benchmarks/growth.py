"""How the cost of explaining grows: with the batch, the picture, the number of classes and the depth.

    python -m benchmarks.growth     # writes docs/growth.png and benchmarks/growth.md

Everything is ResNet-50 with random weights. Times are medians of ratios of two things that ran in turn;
memory is the peak of a process that opens one model and runs it.
"""

import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import onnx

from benchmarks.pairs import Ratio, in_turn, picture, plain, session
from onnxcam import attach

PLOT = Path(__file__).parents[1] / "docs" / "growth.png"
PAGE = Path(__file__).with_name("growth.md")
HEAD = """\
# How the cost grows

Written by `make bench-why`: ResNet-50 with random weights on 2 threads, explained by Grad-CAM (at the input:
saliency). Time is the median of 10 ratios, memory the peak of a process that runs the model once.

| | layer | time, explained / plain | explained, MiB | plain, MiB |
|---|---|---|---|---|
"""
MODEL = "resnet50"
PAIRS = 10


def of_size(size: int, out: Path) -> Path:
    """Write the model for pictures of another size."""
    model = onnx.load(plain(MODEL))
    for dim in model.graph.input[0].type.tensor_type.shape.dim[2:]:
        dim.dim_value = size
    del model.graph.value_info[:]
    onnx.save(model, out)
    return out


def measured(path: Path, batch: int = 1, classes: int = 1, **options: Any) -> tuple[float, float, float]:
    """Return the ratio of times explained / plain, and the peak memory of both in MiB."""
    feeds = picture(path, batch)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "explained.onnx"
        attach(path, out, **options)
        ratio = _ratio(out, path, feeds, classes)
        size = next(iter(feeds.values())).shape[-1]
        peaks = [_peak(file, batch, size, classes) for file in (out, path)]
    return ratio.median, *peaks


def _ratio(out: Path, path: Path, feeds: dict[str, np.ndarray], classes: int) -> Ratio:
    explained, alone = session(out), session(path)
    asked = {**feeds, "cam_class": np.arange(classes)[None]}
    return in_turn(lambda: explained.run(None, asked), lambda: alone.run(None, feeds), PAIRS, warm=2)


# In a process that imports nothing else; not getrusage's peak, which begins with that of the process above.
_PEAK = """
import re, sys
import numpy, onnxruntime
path, batch, size, classes = sys.argv[1], *map(int, sys.argv[2:])
options = onnxruntime.SessionOptions()
options.log_severity_level, options.intra_op_num_threads = 3, 2
session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
feeds = {session.get_inputs()[0].name: numpy.zeros((batch, 3, size, size), numpy.float32)}
if any(value.name == "cam_class" for value in session.get_overridable_initializers()):
    feeds["cam_class"] = numpy.arange(classes)[None]
session.run(None, feeds)
print(int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1]) / 1024)
"""


def _peak(path: Path, batch: int, size: int, classes: int) -> float:
    """MiB that a process of its own takes to open and run a model."""
    command = [sys.executable, "-c", _PEAK, str(path), str(batch), str(size), str(classes)]
    return float(subprocess.check_output(command, text=True).split()[-1])


def main() -> None:
    whole = plain(MODEL)
    with tempfile.TemporaryDirectory() as folder:
        sizes = {size: of_size(size, Path(folder) / f"{size}.onnx") for size in (224, 384, 512, 768, 1024)}
        axes: dict[str, tuple[Sequence[Any], dict[str, Callable[[Any], tuple[float, float, float]]]]] = {
            "batch": (
                (1, 2, 4, 8, 16, 32, 64),
                {
                    "layer4": lambda n: measured(whole, n),
                    "layer2": lambda n: measured(whole, n, layer="layer2"),
                },
            ),
            "pixels on a side": (
                tuple(sizes),
                {
                    "layer4": lambda size: measured(sizes[size]),
                    "layer2": lambda size: measured(sizes[size], layer="layer2"),
                },
            ),
            "classes": (
                (1, 2, 5, 10, 20, 50),
                {
                    "layer4": lambda k: measured(whole, 1, k),
                    "layer3": lambda k: measured(whole, 1, k, layer="layer3"),
                },
            ),
            "layer": (
                ("layer4", "layer3", "layer2", "layer1", "input"),
                {
                    "1 class": lambda name: measured(
                        whole, **({"method": "saliency"} if name == "input" else {"layer": name})
                    )
                },
            ),
        }
        found, lines = {}, []
        for axis, (points, curves) in axes.items():
            for curve, measure in curves.items():
                found[axis, curve] = [measure(point) for point in points]
                for point, (ratio, *peaks) in zip(points, found[axis, curve], strict=True):
                    what, at = ("1 class", point) if axis == "layer" else (f"{axis}: {point}", curve)
                    lines.append(f"| {what} | {at} | {ratio:.3f} | {peaks[0]:.0f} | {peaks[1]:.0f} |")
                    print(lines[-1], flush=True)
    PAGE.write_text(HEAD + "\n".join(lines) + "\n")
    _plot({axis: points for axis, (points, _) in axes.items()}, found)


def _plot(
    axes: dict[str, Sequence[Any]], found: dict[tuple[str, str], list[tuple[float, float, float]]]
) -> None:
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(2, len(axes), figsize=(14, 6), layout="constrained")
    for column, (axis, points) in enumerate(axes.items()):
        time, memory = panels[0][column], panels[1][column]
        for (of, curve), values in found.items():
            if of == axis:
                ratios, explained, alone = zip(*values, strict=True)
                time.plot(range(len(points)), ratios, "o-", label=curve)
                memory.plot(range(len(points)), explained, "o-", label=curve)
        memory.plot(range(len(points)), alone, "k.--", label="plain")
        for panel in (time, memory):
            panel.set_xticks(range(len(points)), points)
            panel.set_xlabel(axis)
            panel.set_ylim(bottom=0)
            panel.grid(alpha=0.3)
            panel.legend()
    panels[0][0].set_ylabel("time, explained / plain")
    panels[1][0].set_ylabel("peak memory, MiB")
    figure.savefig(PLOT, dpi=90)


if __name__ == "__main__":
    main()
