"""Every classifier of torchvision and one of each family of timm: ``make zoo`` writes ``docs/zoo.md``.

    python -m benchmarks.zoo                 # all of them, two at a time; goes on where it stopped
    python -m benchmarks.zoo MODEL ...       # these again, the figures printed

A model gets random weights, is exported by torch's own exporter, attached at its default layer and run in
onnxruntime on two random pictures. Then the gradient of each picture's best class, at that layer (``attach``)
and at the picture (``onnxcam.gradient``), is compared with torch's autograd in float32.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import io
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch

from benchmarks.double import evaluator
from onnxcam import attach, gradient
from onnxcam.card import Card

ROOT = Path(__file__).parents[1]
LIST = Path(__file__).with_name("zoo_timm.txt")
RESULTS = ROOT / "build" / "zoo.jsonl"
PAGE = ROOT / "docs" / "zoo.md"
TOLERANCE = 1e-3
"""Relative L2 distance from torch's gradient that counts as agreement."""

DOUBLE_TOLERANCE = 1e-7
"""The same in float64; torch's exporter writes Python's numbers in single precision even then."""

SECONDS = 1800
"""What one model may take."""

PICTURES = 2
"""In a batch."""

DRAWS = 2
"""How many batches there are."""

PROCESSES = 2


@dataclasses.dataclass
class Result:
    """What was found for one model; a field that was not reached is None.

    Attributes:
        model: its name, ``torchvision/...`` or ``timm/...``.
        layer: the default layer, with its shape and how the picture's positions lie in it.
        batch: ``any``, or the number of pictures that the export froze.
        scores: largest difference of the explained model's scores from the plain one's, over the largest.
        at_layer, at_picture: relative L2 distance of the gradient from torch's, on the best picture.
        own: how far torch's own gradient at that picture moves when the picture's last bits change.
        double: the distance at the picture when everything is done in float64; only where `at_picture` is
            above the tolerance.
        map: ``fine``, or what is wrong with it.
        seconds: for attaching.
        trouble: the step that failed and why.
    """

    model: str
    layer: str | None = None
    batch: str | None = None
    scores: float | None = None
    at_layer: float | None = None
    at_picture: float | None = None
    own: float | None = None
    double: float | None = None
    map: str | None = None
    seconds: float | None = None
    trouble: str | None = None

    @property
    def agrees(self) -> bool:
        """Whether everything was reached and is within its tolerance."""
        figures = (self.scores, self.at_layer, self.at_picture)
        if self.trouble is not None or self.map != "fine" or None in figures:
            return False
        scores, at_layer, at_picture = figures
        exact = self.double is not None and self.double <= DOUBLE_TOLERANCE
        return scores <= 1e-5 and at_layer <= TOLERANCE and (at_picture <= TOLERANCE or exact)


def names() -> list[str]:
    """All models of the zoo."""
    import torchvision

    builders = torchvision.models.list_models(module=torchvision.models)
    return [f"torchvision/{n}" for n in builders] + [
        f"timm/{n}" for n in LIST.read_text().split("\n")[1:] if n
    ]


def examine(name: str, size: int | None = None) -> Result:
    """Take one model through all steps.

    Args:
        name: ``torchvision/...`` or ``timm/...``.
        size: of the pictures, in pixels; what the model was made for by default.
    """
    result = Result(name)
    step = "make"
    try:
        with quiet(), tempfile.TemporaryDirectory() as folder:
            module, pictures = made(name, size)
            step = "export"
            program, frozen = exported(module, pictures)
            result.batch = str(len(pictures)) if frozen else "any"
            plain, explained = Path(folder) / "plain.onnx", Path(folder) / "explained.onnx"
            program.save(plain, external_data=_bytes(module) > 1 << 30)
            step = "attach"
            start = time.perf_counter()
            outputs = ("cam", "heatmap", "activations", "gradients")
            with_map = attach(plain, explained, emit=outputs, evidence="both")
            result.seconds = time.perf_counter() - start
            step = "torch"
            card = Card.from_metadata(with_map.metadata_props)
            assert card is not None
            draws = [_Draw.of(module, program, card, pictures.shape[1:], i) for i in range(DRAWS)]
            del module, program, with_map
            step = "run"
            _compare(result, card, draws, plain, explained)
            assert result.at_picture is not None
            if result.at_picture > TOLERANCE:
                step = "float64"
                result.double = _in_double(name, size)
    except Exception as error:  # whatever the model, torch or we raise is a line of the table
        text = next((line for line in str(error).splitlines() if line.strip()), "")
        result.trouble = f"{step}: {type(error).__name__}: {text}"[:300]
    return result


@dataclasses.dataclass(frozen=True)
class _Draw:
    """Random pictures and what torch makes of them.

    Attributes:
        pictures: a batch.
        classes: the best class of each picture.
        count: how many classes there are.
        at_layer, at_picture: the gradient of that class's score.
        own: how far the latter moves when the last bits of the picture change.
    """

    pictures: torch.Tensor
    classes: np.ndarray
    count: int
    at_layer: torch.Tensor
    at_picture: torch.Tensor
    own: np.ndarray

    @classmethod
    def of(
        cls,
        module: torch.nn.Module,
        program: torch.onnx.ONNXProgram,
        card: Card,
        shape: Sequence[int],
        number: int,
    ) -> "_Draw":
        generator = torch.Generator().manual_seed(number)
        pictures = torch.randn(PICTURES, *shape, generator=generator)
        scores, classes, at_picture = in_torch(module, pictures)
        signs = torch.randn(pictures.shape, generator=generator).sign()
        nudged = pictures * (1 + 4 * torch.finfo(torch.float32).eps * signs)
        own = distances(in_torch(module, nudged, classes)[2].numpy(), at_picture)
        at_layer = at_value(program, card.layer, pictures, classes)
        return cls(pictures, classes.numpy(), scores.shape[1], at_layer, at_picture, own)


def _compare(result: Result, card: Card, draws: Sequence[_Draw], plain: Path, explained: Path) -> None:
    """Run the models, one after the other for the sake of memory, and fill in the result."""
    feeds = [{card.input.name: draw.pictures.numpy()} for draw in draws]
    session = _session(plain)
    before = [session.run([card.scores], feed)[0] for feed in feeds]
    session = _session(explained)
    outputs = [card.scores, "cam", "cam_heatmap", "cam_activations", "cam_gradients"]
    asked = [{**feed, "cam_class": draw.classes[:, None]} for feed, draw in zip(feeds, draws, strict=True)]
    found = [session.run(outputs, feed) for feed in asked]
    with_gradient = plain.with_name("gradient.onnx")
    gradient(plain, card.scores, card.input.name, with_gradient)
    session = _session(with_gradient)
    for draw, feed, unexplained, (scores, cam, heatmap, activations, at_layer) in zip(
        draws, feeds, before, found, strict=True
    ):
        seed = np.eye(draw.count, dtype=np.float32)[draw.classes]
        (at_picture,) = session.run([f"{card.input.name}_gradient"], {**feed, f"{card.scores}_seed": seed})
        result.layer = f"{card.layer} {'x'.join(map(str, activations.shape[1:]))}, {card.grid or 'planes'}"
        result.map = result.map if result.map not in (None, "fine") else _judged(cam, heatmap)
        change = float(np.abs(scores - unexplained).max() / np.abs(unexplained).max())
        result.scores = max(result.scores or 0.0, change)
        expected = arranged(draw.at_layer, activations.shape, card.grid)
        for row in zip(
            distances(at_layer, expected), distances(at_picture, draw.at_picture), draw.own, strict=True
        ):
            if result.at_picture is None or row[1] < result.at_picture:
                result.at_layer, result.at_picture, result.own = map(float, row)


def _in_double(name: str, size: int | None) -> float:
    """Return the distance from torch's gradient at the picture where both compute in float64."""
    module, pictures = made(name, size)
    module, picture = module.double(), pictures[:1].double()
    program, _ = exported(module, picture)
    want, classes, at_picture = in_torch(module, picture)
    scores, given = (program.model.graph.outputs[0].name, program.model.graph.inputs[0].name)
    model = ir.to_proto(gradient(program.model, scores, given))
    del module, program
    feeds = {given: picture.numpy(), f"{scores}_seed": np.eye(want.shape[1])[classes.numpy()]}
    (found,) = evaluator(model).run([f"{given}_gradient"], feeds)
    return float(distances(found, at_picture)[0])


def made(name: str, size: int | None = None) -> tuple[torch.nn.Module, torch.Tensor]:
    """Make a model with random weights, and pictures for it.

    What an initialisation leaves constant would hide mistakes, or the whole gradient: it gets random numbers
    too. Batch norms are calibrated on other random pictures, so that deep models neither vanish nor explode.
    """
    torch.manual_seed(0)
    kind, _, builder = name.partition("/")
    if kind == "timm":
        import timm

        module = timm.create_model(builder, pretrained=False)
        shape = module.default_cfg["input_size"]
    else:
        import torchvision

        module = torchvision.models.get_model(builder, weights=None)
        shape = (3, 299, 299) if builder == "inception_v3" else (3, 224, 224)
    shape = shape if size is None else (shape[0], size, size)
    norms = [m for m in module.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    with torch.no_grad():
        for weight in module.parameters():
            if weight.numel() > 1 and weight.std() < 1e-4:
                weight.add_(0.1 * torch.randn_like(weight))
        module.eval()
        for norm in norms:
            norm.train()
            norm.momentum = None
        if norms:
            module(torch.randn(4, *shape))
    return module.eval().requires_grad_(False), torch.randn(PICTURES, *shape)


def exported(module: torch.nn.Module, pictures: torch.Tensor) -> tuple[torch.onnx.ONNXProgram, bool]:
    """Export for any number of pictures, or, where torch cannot, for this one, and say which of the two."""
    try:
        return _export(module, pictures, ({0: "N"},)), False
    except Exception:  # torch passes on whatever it meets
        return _export(module, pictures, None), True


def _export(module: torch.nn.Module, pictures: torch.Tensor, shapes: Any) -> torch.onnx.ONNXProgram:
    program = torch.onnx.export(module, (pictures,), dynamo=True, dynamic_shapes=shapes, verbose=False)
    assert program is not None
    return program


def in_torch(
    module: torch.nn.Module, pictures: torch.Tensor, classes: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the scores, the classes (the best ones unless given) and their gradient at the pictures."""
    x = pictures.clone().requires_grad_()
    scores = module(x.clone())
    classes = scores.argmax(1) if classes is None else classes
    scores.gather(1, classes[:, None]).sum().backward()
    assert x.grad is not None
    return scores.detach(), classes, x.grad


def at_value(
    program: torch.onnx.ONNXProgram, layer: str, pictures: torch.Tensor, classes: torch.Tensor
) -> torch.Tensor:
    """Return torch's gradient at a value of the captured program, which has the ONNX value's name."""
    captured = program.exported_program
    assert captured is not None

    class Cut(torch.fx.Interpreter):
        at: torch.Tensor | None = None

        def run_node(self, n: torch.fx.Node) -> Any:
            found = super().run_node(n)
            if n.name == layer:
                found = self.at = found.detach().requires_grad_()
            return found

    cut = Cut(captured.module())
    returned = cut.run(pictures)
    scores = returned if isinstance(returned, torch.Tensor) else returned[0]
    if cut.at is None:
        raise LookupError(f"torch's program has no value {layer!r}")
    scores.gather(1, classes[:, None]).sum().backward()
    assert cut.at.grad is not None
    return cut.at.grad


def arranged(layer: torch.Tensor, shape: Sequence[int], grid: str | None) -> torch.Tensor:
    """View a gradient in torch's layout as [N,C,h,w], as the card says how its plane lies."""
    if grid is None:
        return layer
    if grid == "channels last":
        return layer.permute(0, 3, 1, 2)
    first = int(grid.split()[1])
    tokens = layer[:, first : first + shape[2] * shape[3]]
    return tokens.transpose(1, 2).reshape(*shape)


def distances(got: np.ndarray, want: torch.Tensor) -> np.ndarray:
    """Return the L2 distance of each row of `got` from that of `want`, over the norm of the latter."""
    rows = got.reshape(len(got), -1).astype(np.float64)
    expected = want.numpy().reshape(len(got), -1).astype(np.float64)
    return np.linalg.norm(rows - expected, axis=1) / np.linalg.norm(expected, axis=1)


def _judged(cam: np.ndarray, heatmap: np.ndarray) -> str:
    if not (np.isfinite(cam).all() and np.isfinite(heatmap).all()):
        return "not finite"
    flat = sum(float(np.ptp(m)) == 0 for m in cam.reshape(-1, *cam.shape[2:]))
    return f"constant for {flat} of {PICTURES} pictures" if flat else "fine"


def _session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    options.add_session_config_entry("session.disable_prepacking", "1")  # the largest models fill the memory
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _bytes(module: torch.nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


@contextlib.contextmanager
def quiet():
    """Keep away what torch and its exporter warn, log and print."""
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


# The whole zoo


def in_a_process(name: str) -> Result:
    """Examine a model in a process of its own, so that one that fails or fills the memory harms no other."""
    command = [sys.executable, "-m", "benchmarks.zoo", "--json", name]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return Result(name, trouble=f"took more than {SECONDS} s")
    try:
        return Result(**json.loads(done.stdout.splitlines()[-1]))
    except (IndexError, ValueError):
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return Result(name, trouble=f"the process ended with {done.returncode}: {last}"[:300])


def run_all() -> list[Result]:
    """Examine what has no result yet; results are kept in a file, so that a run can be cut short."""
    RESULTS.parent.mkdir(exist_ok=True)
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    known = {r.model: r for r in (Result(**json.loads(line)) for line in lines)}
    everything = names()
    waiting = [name for name in everything if name not in known]
    with concurrent.futures.ThreadPoolExecutor(PROCESSES) as pool, RESULTS.open("a") as file:
        for done in concurrent.futures.as_completed([pool.submit(in_a_process, n) for n in waiting]):
            result = known[done.result().model] = done.result()
            file.write(json.dumps(dataclasses.asdict(result)) + "\n")
            file.flush()
            print(line(result), flush=True)
    return [known[name] for name in everything]


def line(result: Result) -> str:
    """One row of the table."""

    def figure(value: float | None) -> str:
        return "" if value is None else f"{value:.1e}" if value else "0"

    cells = (
        result.model,
        "yes" if result.agrees else "**no**",
        result.layer or "",
        result.batch or "",
        figure(result.scores),
        figure(result.at_layer),
        figure(result.at_picture),
        figure(result.own),
        figure(result.double),
        "" if result.seconds is None else f"{result.seconds:.1f}",
        result.trouble or ("" if result.map == "fine" else f"map {result.map}"),
    )
    return "| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |"


def page(results: Sequence[Result]) -> str:
    """The whole of ``docs/zoo.md``."""
    import timm
    import torchvision

    agree = sum(result.agrees for result in results)
    versions = f"torch {torch.__version__}, torchvision {torchvision.__version__}, timm {timm.__version__}"
    return f"""# The zoo

Written by `make zoo` ({versions}, onnxruntime {onnxruntime.__version__}).
{agree} of {len(results)} models agree with torch.

Each model has random weights. It is exported with `torch.onnx.export(dynamo=True)`, attached at its
default layer and run in onnxruntime on random pictures. It agrees if its scores are those of the plain
model to 1e-5, if the gradient of a picture's best class agrees with torch's autograd in float32 to
{TOLERANCE:g} (relative L2), at the layer and at the picture, and if every map (Grad-CAM's before the ReLU,
which would leave nothing of one that is negative everywhere) is finite and not constant.

A gradient jumps where a ReLU's input crosses zero, and what crosses by the last bit alone lies on one
side in torch and on the other in onnxruntime. Therefore {DRAWS * PICTURES} pictures are tried, {PICTURES} at
a time; the figures are the best one's. "Own" is how far torch's own gradient at that picture
moves when the picture changes by four units in its last place. Where no picture is free of such a jump,
the same is done once more in float64 (ONNX's reference evaluator against torch), and must agree to
{DOUBLE_TOLERANCE:g}: even then torch's exporter writes the numbers of Python code in single precision.
"Attach" is in seconds, on a machine that did other things too.

| model | agrees | layer | batch | scores | at layer | at picture | own | float64 | attach | |
|---|---|---|---|---|---|---|---|---|---|---|
""" + "".join(line(result) + "\n" for result in results)


def _stub_torchvision() -> None:
    """PyPI's torchvision brings compiled operators for another build of torch; no model of it uses them."""
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    globals()["_library"] = library


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*")
    parser.add_argument("--json", action="store_true", help="print one JSON object for each model")
    arguments = parser.parse_args()
    _stub_torchvision()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    if not arguments.models:
        PAGE.write_text(page(run_all()))
        return
    for name in arguments.models:
        result = examine(name)
        print(json.dumps(dataclasses.asdict(result)) if arguments.json else line(result), flush=True)


if __name__ == "__main__":
    main()
