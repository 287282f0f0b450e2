"""How fast it is: ``make bench`` writes ``benchmarks/results.md``; ``make bench-quick`` runs a few rows.

    python -m benchmarks.bench --only 'explained*' [--pairs 50]      # some rows, printed only
    python -m benchmarks.bench --only 'explained*' --write           # some rows anew, the others as they are

A row is the ratio of two things measured in turn in one run, see `benchmarks.pairs`. Models are torchvision's
with random weights, exported by torch's own exporter.
"""

import argparse
import dataclasses
import fnmatch
import importlib.metadata
import itertools
import multiprocessing
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.pairs import THREADS, Ratio, differentiated, in_turn, picture, plain, rounds, session
from onnxcam import Explainer, attach, sessions
from onnxcam.card import Card

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).with_name("results.md")
QUICK = ("explained/resnet50/1", "explained/efficientnet_b0/1", "five/resnet50/1", "size/resnet50")
IMAGENET = {"color": "RGB", "scale": 1 / 255, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        name: what `--only` calls it.
        measure: what it is, for a person.
        goal: the bound that the ratio should keep.
        most: whether that is an upper bound.
        run: measures it with so many pairs.
    """

    name: str
    measure: str
    goal: float
    most: bool
    run: Callable[[int], Ratio]


def rows() -> Iterator[Row]:
    convolutional = ("resnet50", "mobilenet_v3_large", "efficientnet_b0", "densenet121", "convnext_tiny")
    models = (*convolutional, "efficientnet_lite0")
    for name, batch in itertools.product(models, (1, 8)):
        yield Row(
            f"explained/{name}/{batch}",
            f"explained / plain, {name}, batch {batch}",
            1.02,
            True,
            lambda pairs, name=name, batch=batch: explained(name, batch, _more(pairs, batch)),
        )
    for name, batch in itertools.product(models, (1, 8)):
        yield Row(
            f"five/{name}/{batch}",
            f"explained for 5 classes / plain, {name}, batch {batch}",
            1.05,
            True,
            lambda pairs, name=name, batch=batch: explained(name, batch, _more(pairs, batch), classes=5),
        )
    for name in ("efficientnet_lite0", "pp_lcnet_orientation", "squeezenet1_1"):
        yield Row(
            f"on-demand/{name}",
            f"on demand, no map wanted / plain, {name}",
            1.02,
            True,
            lambda pairs, name=name: explained(name, 1, 8 * pairs, on_demand=True),  # of milliseconds
        )
    for name, batch in itertools.product(("vit_b_16", "swin_t"), (1, 8)):
        yield Row(
            f"explained/{name}/{batch}",
            f"explained / plain, {name}, batch {batch}",
            1.10,
            True,
            lambda pairs, name=name, batch=batch: explained(name, batch, pairs),
        )
    for batch in (1, 8):
        yield Row(
            f"middle/resnet50/{batch}",
            f"Grad-CAM at layer2 / plain, resnet50, batch {batch}",
            1.9,
            True,
            lambda pairs, batch=batch: explained("resnet50", batch, pairs, layer="layer2"),
        )
    backward = (("resnet50", 2.1), ("efficientnet_b0", 2.3), ("vit_b_16", 2.2))
    for (name, goal), batch in itertools.product(backward, (1, 8)):
        yield Row(
            f"input/{name}/{batch}",
            f"gradient at the input / plain, {name}, batch {batch}",
            goal,
            True,
            lambda pairs, name=name, batch=batch: at_input(name, batch, pairs),
        )
    for peer, goals in (("pytorch-grad-cam", (7, 15, 15)), ("torchcam", (3, 5, 8))):
        for name, goal in zip(convolutional[:3], goals, strict=True):
            yield Row(
                f"{peer}/{name}",
                f"{peer}'s Grad-CAM / onnxcam's, {name}",
                goal,
                False,
                lambda pairs, name=name, peer=peer: against(peer, name, "gradcam", pairs),
            )
    many = (
        ("scorecam", "resnet18", "layer1", 64),
        ("scorecam", "mobilenet_v3_large", None, 960),
        ("ablationcam", "resnet18", "layer1", 64),
        ("ablationcam", "resnet18", None, 512),
    )
    for method, name, layer, channels in many:
        where = layer or "its last layer"
        yield Row(
            f"{method}/{name}/{layer or 'last'}",
            f"pytorch-grad-cam's {method} / onnxcam's, {name} at {where} ({channels} channels)",
            5,
            False,
            lambda pairs, method=method, name=name, layer=layer, channels=channels: against(
                "pytorch-grad-cam", name, method, pairs, layer, channels if method == "scorecam" else 0
            ),
        )
    yield Row(
        "process/seconds",
        "the shortest pytorch-grad-cam script / `onnxcam run`, one photo, whole process",
        8,
        False,
        lambda pairs: process(pairs, "seconds"),
    )
    yield Row(
        "process/memory",
        "peak memory of the same two",
        3,
        False,
        lambda pairs: process(min(pairs, 5), "memory"),
    )
    for what, measure, goal in (("open", "opening the model", 1.0), ("picture", "explaining a picture", 2.0)):
        yield Row(
            f"few/{what}",
            f"{measure}, pictures=1 / number unknown, resnet50",
            goal,
            True,
            lambda pairs, what=what: few(what, pairs),
        )
    yield Row(
        "attach/resnet50", "seconds to attach, resnet50 / 1 s", 1, True, lambda pairs: attaching("resnet50")
    )
    for name in convolutional[:3]:
        yield Row(
            f"folder/{name}",
            f"500 photos: DataLoader and pytorch-grad-cam / onnxcam, {name}",
            6,
            False,
            lambda pairs, name=name: folder(name, 5),
        )
    yield Row(
        "size/resnet50",
        "bytes added by explaining, resnet50 / 64 KiB",
        1,
        True,
        lambda pairs: size("resnet50"),
    )
    yield Row(
        "size/input/resnet50",
        "bytes added by the gradient at the input / those of the model, resnet50",
        0.01,
        True,
        lambda pairs: size("resnet50", at_the_input=True),
    )


def _more(pairs: int, batch: int) -> int:
    """More pairs of runs of milliseconds: their times differ by more than what is measured."""
    return 20 * pairs if batch == 1 else pairs


def _file(name: str) -> Path:
    own = ROOT / "models" / f"{name}.onnx"
    return own if own.exists() else plain(name)


def explained(name: str, batch: int, pairs: int, classes: int = 1, **options: Any) -> Ratio:
    """The model with ``cam`` and ``cam_heatmap`` against the model alone; `options` are `attach`'s."""
    path = _file(name)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "explained.onnx"
        attach(path, out, **options)
        with_map, without = session(out), session(path)
    feeds = picture(path, batch)
    asked = {**feeds, "cam_class": np.arange(classes)[None]} if classes > 1 else feeds
    return in_turn(lambda: with_map.run(None, asked), lambda: without.run(None, feeds), pairs)


def at_input(name: str, batch: int, pairs: int) -> Ratio:
    """The model with the gradient of the scores at its input against the model alone."""
    path = _file(name)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "gradient.onnx"
        asked = differentiated(path, batch, out)
        with_gradient, without = session(out), session(path)
    feeds = picture(path, batch)
    return in_turn(lambda: with_gradient.run(None, asked), lambda: without.run(None, feeds), pairs)


def against(
    peer: str, name: str, method: str, pairs: int, layer: str | None = None, predictions: int = 1
) -> Ratio:
    """A peer's map of class 0 of one picture at the size of the picture, against onnxcam's.

    `predictions`: how many by the whole model it needs, beside which it might take no time.
    """
    import torch

    from benchmarks.zoo import made
    from tests import vision  # noqa: F401

    torch.set_num_threads(THREADS)
    module, _ = made(f"torchvision/{name}")
    module.requires_grad_(True)
    path = _file(name)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "explained.onnx"
        model = attach(path, out, method=method, layer=layer)
        ours, alone = session(out), session(path)
    card = Card.from_metadata(model.metadata_props)
    assert card is not None
    feeds = picture(path, 1)
    x = torch.from_numpy(next(iter(feeds.values())))
    where = module.get_submodule(layer) if layer else _last(name, module)
    theirs = _peer(peer, method, module, where)
    asked = {**feeds, "cam_class": np.array([[0]])}
    # PyTorch's threads go on spinning for long, on the cores that the other one needs.
    calls = [lambda: theirs(x), lambda: ours.run(["cam_heatmap"], asked)]
    if predictions:
        calls.append(lambda: [alone.run(None, feeds) for _ in range(predictions)])
    return Ratio.of(rounds(calls, pairs, rest=0.3, row=5 if method == "gradcam" else 1))


def _peer(peer: str, method: str, module: Any, layer: Any) -> Callable[[Any], Any]:
    """Return what makes a peer's map of class 0, made ready once."""
    if peer == "torchcam":
        from torchcam.methods import GradCAM

        extractor = GradCAM(module, layer)
        return lambda x: extractor(0, module(x))
    import pytorch_grad_cam
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    kinds = {"gradcam": "GradCAM", "scorecam": "ScoreCAM", "ablationcam": "AblationCAM"}
    cam = getattr(pytorch_grad_cam, kinds[method])(module, [layer])
    return lambda x: cam(x, [ClassifierOutputTarget(0)])


def _last(name: str, module: Any) -> Any:
    """The module after which a peer's documentation looks."""
    return module.layer4 if name.startswith("resnet") else module.features[-1]


def process(pairs: int, what: str) -> Ratio:
    """Whole processes: a script around pytorch-grad-cam against the command line, on a photo."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "explained.onnx"
        attach(_file("resnet50"), out, resize="crop:256", **IMAGENET)
        photo = str(ROOT / "models" / "cat_and_coffee.png")
        theirs = [
            sys.executable,
            "-W",
            "ignore",
            "-m",
            "benchmarks.shortest",
            photo,
            f"{folder}/a.png",
        ]
        ours = [str(Path(sys.executable).with_name("onnxcam")), "run", str(out), photo, "-o", f"{folder}/b"]
        measured = [_child(command, what) for command in (theirs, ours)]  # fills the file cache
        measured = [(_child(theirs, what), _child(ours, what)) for _ in range(pairs)]
    return Ratio.of(measured)


# In a small process of its own: a process begins with the peak of the one that starts it.
_CHILD = """
import resource, subprocess, sys, time
start = time.perf_counter()
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
print(time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)
"""


def _child(command: list[str], what: str) -> float:
    """Seconds or bytes that a process takes."""
    found = subprocess.check_output([sys.executable, "-c", _CHILD, *command], cwd=ROOT, text=True).split()
    return float(found[0] if what == "seconds" else found[1])


def few(what: str, pairs: int) -> Ratio:
    """An `Explainer` for one picture against one for any number: to open it, or to explain one picture."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "explained.onnx"
        attach(_file("resnet50"), out, resize="crop:256", **IMAGENET)
        if what == "open":
            return in_turn(lambda: Explainer(out, pictures=1), lambda: Explainer(out), pairs)
        first, second = Explainer(out, pictures=1), Explainer(out)
    photo = Image.open(ROOT / "models" / "cat_and_coffee.png")
    return in_turn(lambda: first(photo), lambda: second(photo), pairs, rest=0.05)


def attaching(name: str) -> Ratio:
    """The best of five, in processor time: attach runs on one core."""
    path = _file(name)
    times = []
    for _ in range(5):
        start = time.process_time()
        attach(path)
        times.append((time.process_time() - start, 1.0))
    return Ratio.of([min(times)])


def size(name: str, at_the_input: bool = False) -> Ratio:
    """Bytes that explaining adds to the file, in 64 KiB; at the input, in sizes of the model."""
    path = _file(name)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "explained.onnx"
        attach(path, out, **({"method": "saliency"} if at_the_input else {}))
        before = path.stat().st_size
        return Ratio.of([(out.stat().st_size - before, before if at_the_input else 64 * 1024)])


def folder(name: str, pairs: int) -> Ratio:
    """Heat maps of the best class of 500 photos: a DataLoader and pytorch-grad-cam against an `Explainer`."""
    with tempfile.TemporaryDirectory() as temporary:
        photos, out = Path(temporary) / "photos", Path(temporary) / "explained.onnx"
        _photos(photos, 500)
        attach(_file(name), out, resize="crop:256", **IMAGENET)
        scripts = [("benchmarks.peer_folder", name), ("benchmarks.own_folder", str(out))]
        times = []
        for _ in range(pairs):
            took = []
            for script, model in scripts:
                command = [sys.executable, "-W", "ignore", "-m", script, str(photos), model]
                took.append(float(subprocess.check_output(command, cwd=ROOT, text=True).split()[-1]))
            times.append([*took, _predicting(_file(name), 500)])
    return Ratio.of(times)


def _predicting(path: Path, count: int) -> float:
    """Seconds that a plain model takes for so many pictures in memory, in work as `Explainer.many` does."""
    plan, feeds = sessions.Plan.of(count), picture(path, 1)
    model = sessions.open_file(path, sessions.provider_named("cpu"), plan)
    start = time.perf_counter()
    for found in sessions.in_parallel(lambda _: model.run(None, feeds), range(count), plan.at_once):
        found.result()
    return time.perf_counter() - start


def _photos(folder: Path, count: int) -> None:
    """Cut JPEG files of 640x480 pixels from the photos of ``models/``, enlarged, each another part."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    originals = [Image.open(path).convert("RGB") for path in sorted((ROOT / "models").glob("c*.png"))]
    large = [image.resize((1280, 960), Image.Resampling.BICUBIC) for image in originals]
    for index in range(count):
        left, top = rng.integers(0, 640), rng.integers(0, 480)
        part = large[index % len(large)].crop((left, top, left + 640, top + 480))
        part.save(folder / f"{index:03}.jpg", quality=90)


def line(row: Row, found: Ratio) -> str:
    """Return a row of the table."""
    met = found.median <= row.goal if row.most else found.median >= row.goal
    bound = f"{'<=' if row.most else '>='} {row.goal:g}"
    figure = f"{found.median:.3g}" if found.median >= 2 else f"{found.median:.3f}"
    cells = (
        row.measure,
        bound,
        figure if met else f"**{figure}**",
        f"{found.low:.3g} to {found.high:.3g}",
        "" if found.best is None else f"{found.best:.3g}",
        str(found.pairs),
        f"`{row.name}`",
    )
    return f"| {' | '.join(cells)} |"


HEAD = """\
# What it costs

What `make bench` measured and wrote: {machine}; {versions}; {threads} threads, batch 1 unless said otherwise.

A figure is the median of the ratios of two things that ran in turn, pair by pair, with its quartiles.
**Bold**: the goal is not reached. *At best* is what it would be if onnxcam took no longer than onnxruntime
takes for the predictions alone: one for Grad-CAM or a photo, one for each channel for Score-CAM.
`python -m benchmarks.bench --only NAME` runs one row.

| measure | goal | median | quartiles | at best | pairs | name |
|---|---|---|---|---|---|---|
"""


def head() -> str:
    """Return what stands above the table."""
    packages = ("onnxruntime", "torch", "torchvision", "grad-cam", "torchcam")
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((entry.partition(":")[2].strip() for entry in lines if entry.startswith("model name")), "")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return HEAD.format(
        machine=f"{os.cpu_count()} cores of {model or platform.machine()}, {memory:.0f} GiB",
        versions=", ".join(f"{package} {importlib.metadata.version(package)}" for package in packages),
        threads=THREADS,
    )


def known() -> dict[str, str]:
    """Return the rows that the page has, by name."""
    found = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    return {text.split("`")[-2]: text for text in found if text.endswith("` |")}


def measured(name: str, pairs: int) -> Ratio:
    """Measure the row of that name."""
    return next(row for row in rows() if row.name == name).run(pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--only", action="append", help="Names of rows, such as 'explained/*'; they are printed only."
    )
    parser.add_argument("--quick", action="store_true", help="A few rows, printed only.")
    parser.add_argument("--pairs", type=int, default=50)
    parser.add_argument("--write", action="store_true", help="Put the rows of --only into the page.")
    options = parser.parse_args()
    only = options.only or (QUICK if options.quick else None)
    chosen = [row for row in rows() if only is None or any(fnmatch.fnmatch(row.name, name) for name in only)]
    lines = known() if only else {}
    for row in chosen:
        # A process for each row: what another one leaves in memory makes a run slower.
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            found = pool.submit(measured, row.name, options.pairs).result()
        lines[row.name] = line(row, found)
        print(lines[row.name], flush=True)
        if only is None or options.write:
            own = [lines[each.name] for each in rows() if each.name in lines]
            RESULTS.write_text(head() + "\n".join(own) + "\n")


if __name__ == "__main__":
    main()
