"""The command line: each command parses, calls one function and prints."""

import contextlib
import enum
import gc
import io
import json
import os
import re
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from onnxcam import __version__
from onnxcam.card import (
    CLASS_INPUTS,
    EMITS,
    EVIDENCE,
    FUSIONS,
    INTERPOLATIONS,
    LAYOUTS,
    SCORES,
    SMOOTHINGS,
    TARGETS,
)
from onnxcam.errors import OnnxcamError

if TYPE_CHECKING:
    from onnxcam.runtime import Explanation

app = typer.Typer(
    help="Class activation maps inside the ONNX file: which pixels made this class score high?",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


class Provider(str, enum.Enum):
    """Where onnxruntime runs the model."""

    cpu = "cpu"
    cuda = "cuda"


def _numbers(text: str) -> tuple[float, ...]:
    """Parse ``0.485,0.456,0.406`` or ``1/255``."""
    values = []
    for part in text.split(","):
        above, slash, below = part.partition("/")
        try:
            values.append(float(above) / float(below) if slash else float(above))
        except (ValueError, ZeroDivisionError):
            raise OnnxcamError(f"{text!r} is not a number, or numbers with commas between") from None
    return tuple(values)


def _size(text: str) -> tuple[int, int]:
    """Parse ``224`` or ``HEIGHTxWIDTH``."""
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text.strip())
    if match is None:
        raise OnnxcamError(f"size is {text!r}; it must be PIXELS or HEIGHTxWIDTH")
    return int(match[1]), int(match[2] or match[1])


def _preprocess(
    size: str | None,
    color: str | None,
    scale: str | None,
    mean: str | None,
    std: str | None,
    resize: str | None,
    interpolation: str | None,
    layout: str | None = None,
) -> dict[str, Any]:
    """Collect the facts given on the command line under the names of the card's fields."""
    height, width = _size(size) if size is not None else (None, None)
    factor = None if scale is None else _numbers(scale)
    if factor is not None and len(factor) != 1:
        raise OnnxcamError(f"scale is {scale!r}; it must be one number, such as 1/255")
    return {
        "height": height,
        "width": width,
        "color": None if color is None else color.upper(),
        "scale": None if factor is None else factor[0],
        "mean": None if mean is None else _numbers(mean),
        "std": None if std is None else _numbers(std),
        "resize": resize,
        "interpolation": interpolation,
        "layout": None if layout is None else layout.upper(),
    }


def _labels(path: Path | None) -> list[str] | None:
    """Read class names, one a line."""
    if path is None:
        return None
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise OnnxcamError(f"{path} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise OnnxcamError(f"{path} is not a text file with a class name on each line") from None
    return [line.strip() for line in text.rstrip().splitlines()]


def _array(path: Path) -> Any:
    """Read a .npy file of numbers."""
    import numpy as np

    try:
        array = np.load(path, allow_pickle=False)
    except OSError as error:
        raise OnnxcamError(f"{path} cannot be read: {error.strerror or error}") from None
    except ValueError:
        raise OnnxcamError(f"{path} is not a .npy file of numbers") from None
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiub":
        raise OnnxcamError(f"{path} is not a .npy file of numbers")
    return array


def _mask(path: Path) -> Any:
    """Read a grey picture as weights from 0 to 1."""
    import numpy as np

    from onnxcam.image import open_image

    return np.asarray(open_image(path).convert("L"), np.float64) / 255


def _or(names: Sequence[str]) -> str:
    """Name alternatives, as in ``a, b or c``."""
    return " or ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


Layers = Annotated[
    list[str] | None,
    typer.Option(
        "--layer",
        help="The activation to explain: a value name, a node name or a PyTorch module path. "
        "May be repeated; the maps are then joined.",
    ),
]
Method = Annotated[
    str | None, typer.Option(help="How the map is made; gradcam if not given. See 'onnxcam methods'.")
]
Target = Annotated[
    str | None,
    typer.Option(
        help=f"What is explained: the score of a {TARGETS[0]}, less another's ({TARGETS[1]}), less its "
        f"nearest ({TARGETS[2]}), or any weighted sum of scores ({TARGETS[3]})."
    ),
]
Against = Annotated[
    str | None,
    typer.Option(metavar="CLASS", help="The class to compare with; makes the target contrast."),
]
Evidence = Annotated[
    str | None,
    typer.Option(
        help=f"What of the map is kept, with regard to the class: {_or(EVIDENCE)}; "
        "as in the method's paper if not given."
    ),
]
Fuse = Annotated[
    str | None,
    typer.Option(help=f"How the maps of several layers are joined: {_or(FUSIONS)}; mean if not given."),
]
Smooth = Annotated[
    list[str] | None,
    typer.Option(
        help=f"{SMOOTHINGS[0]} (mean over mirrored, weaker and stronger pictures) or "
        f"{SMOOTHINGS[1]} (first principal component); may be repeated."
    ),
]
Compat = Annotated[
    str | None,
    typer.Option(
        help="Whose numbers the map has: a library's, see 'onnxcam methods'; the paper's if not given."
    ),
]
Score = Annotated[
    str | None, typer.Option(help=f"Explain the score {_or(SCORES)} the softmax; before if not given.")
]
Scores = Annotated[str | None, typer.Option(help="The output that holds the class scores, if several could.")]
# readable=False: whether a file can be read shows when it is opened, in our own words and for each picture.
Labels = Annotated[
    Path | None, typer.Option(help="A text file with a class name on each line.", readable=False)
]
Size = Annotated[
    str | None, typer.Option(help="Input size, if the model leaves it open: 224 or HEIGHTxWIDTH.")
]
Color = Annotated[str | None, typer.Option(help="Order of the channels: rgb, bgr or gray.")]
Scale = Annotated[
    str | None, typer.Option(help="Factor for the pixel values 0..255, before the mean: 1/255.")
]
Mean = Annotated[str | None, typer.Option(help="Subtracted after scaling: one number, or one per channel.")]
Std = Annotated[str | None, typer.Option(help="Divisor after the mean: one number, or one per channel.")]
Resize = Annotated[
    str | None,
    typer.Option(
        help="stretch, crop (shorter edge, then the centre) or crop:PIXELS (shorter edge to PIXELS)."
    ),
]
Interpolation = Annotated[
    str | None, typer.Option(help=f"{', '.join(INTERPOLATIONS)}; bilinear if not given.")
]
Layout = Annotated[str | None, typer.Option(help=f"{' or '.join(LAYOUTS)}; read off the model if not given.")]
Emit = Annotated[str, typer.Option(help=f"Outputs to add, of {','.join(EMITS)}.")]
ClassInput = Annotated[
    str, typer.Option(help=f"cam_class is {_or(CLASS_INPUTS)}; some runtimes need it required.")
]
Overlay = Annotated[
    bool, typer.Option("--overlay", help="Also output cam_overlay, the heat map in colours over the picture.")
]
EmbedPreprocess = Annotated[
    bool,
    typer.Option(
        "--embed-preprocess",
        help="Let the model take the picture itself, uint8 [N,H,W,3] of any size.",
    ),
]
OnDemand = Annotated[
    bool,
    typer.Option(
        "--on-demand",
        help="Make maps only where the input cam_wanted is true; without them it costs nothing.",
    ),
]
Portable = Annotated[
    bool,
    typer.Option(
        "--portable",
        help="Write what runtimes other than onnxruntime compute alike; a run then explains one class.",
    ),
]
Classes = Annotated[
    list[str] | None,
    typer.Option(
        "--class",
        "-c",
        metavar="CLASS",
        help="A class index, a label, -1 for the best or top3; may be repeated.",
    ),
]
ProviderOption = Annotated[Provider, typer.Option(help="Where onnxruntime runs the model.")]
Opacity = Annotated[float, typer.Option(min=0, max=1, help="Opacity of the map where it is strongest.")]
Drawing = Annotated[
    Path, typer.Option("--output", "-o", help="Where the picture is written, a PNG.", readable=False)
]
Output = Annotated[
    Path, typer.Option("--output", "-o", help="Where the explained model is written.", readable=False)
]


@app.command()
def run(
    model: Annotated[
        Path, typer.Argument(help="An ONNX classifier, explained or plain.", metavar="MODEL", readable=False)
    ],
    images: Annotated[
        list[Path], typer.Argument(help="Pictures to explain.", metavar="IMAGE", readable=False)
    ],
    classes: Classes = None,
    layer: Layers = None,
    method: Method = None,
    target: Target = None,
    evidence: Evidence = None,
    fuse: Fuse = None,
    smooth: Smooth = None,
    compat: Compat = None,
    score: Score = None,
    scores: Scores = None,
    against: Against = None,
    seed: Annotated[
        Path | None,
        typer.Option(
            help="A .npy file with the weight of each score; makes the target seed.", readable=False
        ),
    ] = None,
    mask: Annotated[
        Path | None,
        typer.Option(
            help="A grey picture of the places to explain, for dense scores: what is white counts.",
            readable=False,
        ),
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Folder for the pictures.", readable=False)
    ] = Path("onnxcam-out"),
    provider: ProviderOption = Provider.cpu,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object for each picture.")] = False,
    opacity: Opacity = 0.7,
    labels: Labels = None,
    size: Size = None,
    color: Color = None,
    scale: Scale = None,
    mean: Mean = None,
    std: Std = None,
    resize: Resize = None,
    interpolation: Interpolation = None,
    layout: Layout = None,
) -> None:
    """Explain pictures: for each class an overlay, and one panel with all of them."""
    from onnxcam.runtime import Explainer

    _check_folder(output)
    explainer = Explainer(
        model,
        provider=provider.value,
        labels=_labels(labels),
        preprocess=_preprocess(size, color, scale, mean, std, resize, interpolation, layout),
        layer=layer,
        method=method,
        target=target or ("contrast" if against else "seed" if seed else None),
        evidence=evidence,
        fuse=fuse,
        smooth=smooth,
        compat=compat,
        score=score,
        scores=scores,
        pictures=len(images),
    )
    wanted = explainer.resolve(classes or -1)
    given = {
        **({"against": against} if against else {}),
        **({"seed": _array(seed)} if seed else {"classes": wanted}),
        **({"mask": _mask(mask)} if mask else {}),
    }

    def explained(named: tuple[Path, str]) -> tuple["Explanation | OnnxcamError", dict[str, Any]]:
        image, stem = named
        try:
            explanation = explainer(image, **given)
        except OnnxcamError as error:
            return error, {}
        return explanation, _write(explanation, output, stem, opacity)

    failed = 0
    with _Bar(len(images)) as bar:
        for done in explainer.in_parallel(explained, zip(images, _stems(images), strict=True)):
            explanation, files = done.result()
            if isinstance(explanation, OnnxcamError):
                if len(images) == 1:
                    raise explanation
                failed += 1
                bar.clear()
                _complain(explanation)
            else:
                bar.clear()
                typer.echo(_json(explanation, files) if as_json else _text(explanation, files))
            bar.advance()
    if failed:
        raise typer.Exit(1)


@app.command()
def attach(
    model: Annotated[
        Path, typer.Argument(help="An ONNX classifier; it stays as it is.", metavar="MODEL", readable=False)
    ],
    output: Output,
    layer: Layers = None,
    method: Method = None,
    target: Target = None,
    evidence: Evidence = None,
    fuse: Fuse = None,
    smooth: Smooth = None,
    compat: Compat = None,
    emit: Emit = "cam,heatmap",
    class_input: ClassInput = "optional",
    overlay: Overlay = False,
    embed_preprocess: EmbedPreprocess = False,
    on_demand: OnDemand = False,
    portable: Portable = False,
    score: Score = None,
    scores: Scores = None,
    labels: Labels = None,
    size: Size = None,
    color: Color = None,
    scale: Scale = None,
    mean: Mean = None,
    std: Std = None,
    resize: Resize = None,
    interpolation: Interpolation = None,
    layout: Layout = None,
) -> None:
    """Add the gradient branch and the maps to an ONNX classifier."""
    from onnxcam.attaching import attach

    _check_output(output, model)
    explained = attach(
        model,
        output,
        layer=layer,
        method=method or "gradcam",
        target=target,
        evidence=evidence,
        fuse=fuse or "mean",
        smooth=smooth or (),
        compat=compat or "paper",
        emit=[*_parts(emit), *(["overlay"] if overlay else [])],
        class_input=class_input,
        embed_preprocess=embed_preprocess,
        on_demand=on_demand,
        portable=portable,
        score=score or "before",
        scores=scores,
        labels=_labels(labels),
        **_preprocess(size, color, scale, mean, std, resize, interpolation, layout),
    )
    _report(output, explained.metadata_props)


@app.command()
def export(
    spec: Annotated[str, typer.Argument(help="package.module:factory of a PyTorch model.", metavar="SPEC")],
    output: Output,
    weights: Annotated[
        Path | None, typer.Option(help="State dict, .pt/.pth or .safetensors.", readable=False)
    ] = None,
    input_size: Annotated[str, typer.Option(help="Input size: 224 or HEIGHTxWIDTH.")] = "224",
    channels: Annotated[int, typer.Option(min=1, help="Channels of the input.")] = 3,
    layer: Layers = None,
    method: Method = None,
    target: Target = None,
    evidence: Evidence = None,
    fuse: Fuse = None,
    smooth: Smooth = None,
    compat: Compat = None,
    emit: Emit = "cam,heatmap",
    class_input: ClassInput = "optional",
    overlay: Overlay = False,
    embed_preprocess: EmbedPreprocess = False,
    on_demand: OnDemand = False,
    portable: Portable = False,
    score: Score = None,
    labels: Labels = None,
    color: Color = None,
    scale: Scale = None,
    mean: Mean = None,
    std: Std = None,
    resize: Resize = None,
    interpolation: Interpolation = None,
) -> None:
    """Turn a PyTorch classifier into an explained ONNX file, checked against PyTorch."""
    from onnxcam.exporting import example, export, load_module

    _check_output(output)
    height, width = _size(input_size)
    module = load_module(spec, weights)
    explained = export(
        module,
        example(module, channels, height, width),
        output,
        layer=layer,
        method=method or "gradcam",
        target=target,
        evidence=evidence,
        fuse=fuse or "mean",
        smooth=smooth or (),
        compat=compat or "paper",
        emit=[*_parts(emit), *(["overlay"] if overlay else [])],
        class_input=class_input,
        embed_preprocess=embed_preprocess,
        on_demand=on_demand,
        portable=portable,
        score=score or "before",
        labels=_labels(labels),
        **_preprocess(None, color, scale, mean, std, resize, interpolation),
    )
    _report(output, explained.metadata_props)


@app.command()
def layers(
    model: Annotated[Path, typer.Argument(help="An ONNX classifier.", metavar="MODEL", readable=False)],
    scores: Scores = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object for each layer.")] = False,
) -> None:
    """List the activations that can be explained, in order; the default is marked with *."""
    from onnxcam import layers as finder
    from onnxcam.attaching import prepared

    own = prepared(model)
    logits = finder.scores(own, scores).logits
    picture = finder.picture(own)
    found = finder.explainable(picture, logits)
    default = finder.default(found, picture, logits)
    if as_json:
        for layer in found:
            row = {
                "name": layer.name,
                "shape": layer.shape,
                "operator": layer.operator,
                "node": layer.node,
                "module": layer.module,
                "grid": str(layer.grid),
                "zero_gradient": layer.unreached,
                "default": layer is default,
            }
            typer.echo(json.dumps(row))
        return
    rows = [("", "name", "shape", "operator", "module", "positions")]
    for layer in found:
        shape = "x".join("?" if d is None else str(d) for d in layer.shape)
        mark, module = "*" if layer is default else "", layer.module or "-"
        positions = f"{layer.grid}; no gradient reaches them" if layer.unreached else str(layer.grid)
        rows.append((mark, layer.name, shape, layer.operator, module, positions))
    widths = [max(len(line[i]) for line in rows) for i in range(6)]
    for line in rows:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


@app.command()
def methods(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object for each method.")] = False,
) -> None:
    """List the methods: equation and paper, what each needs and costs.

    The last entry is what --compat takes to have the numbers of another library. The cost is in runs of the
    model, beside the one that predicts: C is the number of the layer's channels, P that of its positions.
    """
    from onnxcam.coverage import methods as listed

    for row in listed():
        if as_json:
            typer.echo(json.dumps(row))
            continue
        needs = ", ".join(row["needs"] + ([row["requires"]] if row["requires"] else []))
        where = "; looks at the picture" if row["looks_at"] == "picture" else ""
        typer.echo(f"{row['name']}\n    {row['summary']}")
        typer.echo(f"    needs: {needs}{where}; cost: {row['cost']}; compat: {', '.join(row['compat'])}")


@app.command()
def compare(
    model: Annotated[Path, typer.Argument(help="A plain ONNX classifier.", metavar="MODEL", readable=False)],
    image: Annotated[Path, typer.Argument(help="A picture.", metavar="IMAGE", readable=False)],
    methods: Annotated[str, typer.Option(help="Methods with commas between; see 'onnxcam methods'.")],
    output: Drawing,
    classes: Classes = None,
    layer: Layers = None,
    target: Target = None,
    against: Against = None,
    evidence: Evidence = None,
    fuse: Fuse = None,
    smooth: Smooth = None,
    compat: Compat = None,
    score: Score = None,
    scores: Scores = None,
    provider: ProviderOption = Provider.cpu,
    opacity: Opacity = 0.7,
    labels: Labels = None,
    size: Size = None,
    color: Color = None,
    scale: Scale = None,
    mean: Mean = None,
    std: Std = None,
    resize: Resize = None,
    interpolation: Interpolation = None,
    layout: Layout = None,
) -> None:
    """Draw the maps of several methods side by side.

    There is a row for each method and a column for each class. A method that cannot be applied to the model
    is named with the reason, and the rest go on; the exit code is 1 then.
    """
    from onnxcam.comparing import compare as compared
    from onnxcam.render import save_png

    _check_drawing(output, model, image)
    found = compared(
        model,
        image,
        _parts(methods),
        classes or -1,
        layer=layer,
        against=against or -2,
        target=target or ("contrast" if against else None),
        evidence=evidence,
        fuse=fuse,
        smooth=smooth,
        compat=compat,
        score=score,
        scores=scores,
        provider=provider.value,
        labels=_labels(labels),
        preprocess=_preprocess(size, color, scale, mean, std, resize, interpolation, layout),
    )
    save_png(found.sheet(opacity), output)
    for name, seconds in found.seconds.items():
        typer.echo(f"{name}: {seconds:.2f} s")
    typer.echo(f"side by side: {output}")
    for name, reason in found.reasons.items():
        _complain(reason if reason.startswith(name) else f"{name}: {reason}")
    if found.reasons:
        raise typer.Exit(1)


@app.command()
def filters(
    model: Annotated[
        Path, typer.Argument(help="An ONNX classifier, explained or plain.", metavar="MODEL", readable=False)
    ],
    output: Drawing,
    color: Color = None,
    scores: Scores = None,
) -> None:
    """Draw the filters of the first convolution.

    Each is scaled by its own largest weight; mid-grey is a weight of zero.
    """
    from onnxcam.looking import filters as found
    from onnxcam.render import save_png

    _check_drawing(output, model)
    drawn = found(model, None if color is None else color.upper(), scores)
    save_png(drawn.grid(), output)
    typer.echo(f"{drawn}: {output}")


@app.command()
def activations(
    model: Annotated[
        Path, typer.Argument(help="An ONNX classifier, explained or plain.", metavar="MODEL", readable=False)
    ],
    image: Annotated[Path, typer.Argument(help="A picture.", metavar="IMAGE", readable=False)],
    output: Drawing,
    layer: Annotated[
        str | None, typer.Option(help="A value name, a node name or a PyTorch module path.")
    ] = None,
    scores: Scores = None,
    size: Size = None,
    color: Color = None,
    scale: Scale = None,
    mean: Mean = None,
    std: Std = None,
    resize: Resize = None,
    interpolation: Interpolation = None,
    layout: Layout = None,
) -> None:
    """Draw what the channels of a layer hold.

    Each is drawn from its least value, black, to its greatest, white; one that is flat is pale blue.
    """
    from onnxcam.looking import activations as found
    from onnxcam.render import save_png

    _check_drawing(output, model, image)
    facts = _preprocess(size, color, scale, mean, std, resize, interpolation, layout)
    drawn = found(model, image, layer=layer, scores=scores, **facts)
    save_png(drawn.grid(), output)
    flat = f", {drawn.flat.sum()} of them flat" if drawn.flat.any() else ""
    typer.echo(f"{drawn}{flat}: {output}")


@app.command()
def verify(
    explained: Annotated[
        Path, typer.Argument(help="An explained model.", metavar="EXPLAINED", readable=False)
    ],
    against: Annotated[
        Path | None,
        typer.Option(metavar="ORIGINAL", help="The model that it was made from.", readable=False),
    ] = None,
) -> None:
    """Check an explained model that somebody else made.

    Its card and its format, that only standard operators were added, that the outputs are the original's,
    the maps those of its method, and the gradient that of the scores. The exit code is 1 if any is not so.
    Without --against, nothing says what the original's weights were.
    A line with - is no judgement: what it is about needs none, or cannot be checked, for the reason it gives.
    """
    from onnxcam.verifying import verify as verified

    report = verified(explained, against)
    typer.echo(str(report))
    if not report.passed:
        raise typer.Exit(1)


@app.command()
def operators() -> None:
    """List the operators that a gradient passes through, and why it does not pass through some."""
    from onnxcam.coverage import table

    typer.echo(table())


@app.command()
def web(
    models: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Models for it, attached with --embed-preprocess --class-input required.",
            metavar="MODEL",
            readable=False,
        ),
    ] = None,
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port on 127.0.0.1; 0 for one that is free.")
    ] = 8000,
    single_file: Annotated[
        Path | None,
        typer.Option(
            help="Write the page with all that it needs as one HTML file instead.",
            metavar="OUT.html",
            readable=False,
        ),
    ] = None,
    fetch: Annotated[
        bool, typer.Option("--fetch", help="Only fetch onnxruntime-web from npm, which the page needs.")
    ] = False,
) -> None:
    """Serve a page that explains photos in the browser; they do not leave the machine.

    Ctrl+C stops it. A file that --single-file wrote needs neither a server nor a network.
    """
    from onnxcam import webpage

    if fetch:
        typer.echo(f"onnxruntime-web {webpage.VERSION}: {webpage.fetch()}")
        return
    if single_file is not None:
        _check_output(single_file, *(models or ()))
    files = webpage.site(models or ())
    if single_file is not None:
        webpage.single_file(files, single_file)
        typer.echo(f"{single_file}: {single_file.stat().st_size / 1e6:.1f} MB")
        return
    with webpage.server(files, port) as server, contextlib.suppress(KeyboardInterrupt):
        typer.echo(f"http://127.0.0.1:{server.server_port}/")
        server.serve_forever()


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"onnxcam {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line; what is wrong with the input is one line on stderr, exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a file name may hold bytes that are no text
    try:
        app()
    except OnnxcamError as error:
        _complain(error)
        sys.exit(2)
    except MemoryError:
        _complain("there is not enough memory for this; give smaller pictures, or fewer classes at once")
        sys.exit(2)
    finally:
        gc.freeze()  # all of it goes with the process: Python need not look for cycles first


def _complain(error: object) -> None:
    typer.echo(f"onnxcam: {' '.join(str(error).split())}", err=True)


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _check_folder(folder: Path) -> None:
    """See that pictures can be written to `folder`, which is made when the first one is."""
    existing = folder
    while not os.path.lexists(existing) and existing != existing.parent:
        existing = existing.parent
    if not os.path.isdir(existing):  # noqa: PTH112 - unlike Path's, it takes no offence at odd names
        raise OnnxcamError(f"{existing} is not a folder; choose another with --output")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise OnnxcamError(f"{existing} is not writable; choose another folder with --output")


def _check_drawing(output: Path, *inputs: Path) -> None:
    if output.suffix.lower() != ".png":
        raise OnnxcamError(f"{output} must be called .png, as that is what is written")
    _check_output(output, *inputs)


def _check_output(output: Path, *inputs: Path) -> None:
    try:
        if output.is_dir():
            raise OnnxcamError(f"{output} is a folder; give the name of the file to write")
        if not output.parent.is_dir():
            raise OnnxcamError(f"the folder {output.parent} does not exist")
        for path, what in zip(inputs, ("model", "picture"), strict=False):
            if output.exists() and path.exists() and output.samefile(path):
                raise OnnxcamError(
                    f"{output} is the {what} itself, which stays as it is; choose another name"
                )
    except OSError as error:
        raise OnnxcamError(f"{output} cannot be written: {error.strerror or error}") from None


def _stems(images: Sequence[Path]) -> list[str]:
    """Give each picture the beginning of its files' names: its own name, numbered where two are alike."""
    taken: set[str] = set()
    stems = []
    for image in images:
        stem, number = image.stem, 2
        while stem.casefold() in taken:
            stem, number = f"{image.stem}-{number}", number + 1
        taken.add(stem.casefold())
        stems.append(stem)
    return stems


def _write(explanation: "Explanation", folder: Path, stem: str, opacity: float) -> dict[str, Any]:
    from onnxcam.render import save_png

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OnnxcamError(f"{folder} cannot be made: {error.strerror or error}") from None
    overlays = []
    for prediction in explanation.classes:
        slug = re.sub(r"[^\w]+", "-", prediction.label)[:60].strip("-")
        name = "-".join(filter(None, dict.fromkeys([str(prediction.index), slug])))
        overlays.append(folder / f"{stem}.{name}.png")
    panel = folder / f"{stem}.panel.png"
    with ThreadPoolExecutor(1) as pool:  # Pillow encodes without holding Python's lock
        whole = pool.submit(lambda: save_png(explanation.panel(opacity), panel))
        for k, path in enumerate(overlays):
            save_png(explanation.overlay(k, opacity), path)
        whole.result()
    return {"overlays": [str(path) for path in overlays], "panel": str(panel)}


def _json(explanation: "Explanation", files: dict[str, Any]) -> str:
    row = explanation.to_dict()
    for item, path in zip(row["explanations"], files["overlays"], strict=True):
        item["overlay"] = path
    row["panel"] = files["panel"]
    return json.dumps(row, allow_nan=False)


def _text(explanation: "Explanation", files: dict[str, Any]) -> str:
    lines = [f"{explanation.name}"]
    for prediction in explanation.predictions:
        lines.append(f"  {prediction.score:8.2%}  {prediction.label} ({prediction.index})")
    for k, (prediction, path) in enumerate(zip(explanation.classes, files["overlays"], strict=True)):
        remark = explanation.remark(k)
        lines.append(f"  why {prediction.label}? {path}" + (f"  ({remark})" if remark else ""))
    lines.append(f"  all in one: {files['panel']}")
    return "\n".join(lines)


def _report(output: Path, metadata: dict[str, str]) -> None:
    """Say what an explained model explains, and which facts are still to be given when it runs."""
    from onnxcam.card import Card

    card = Card.from_metadata(metadata)
    assert card is not None
    whose = f" as in {card.compat}" if card.compat else ""
    module = f" ({card.module})" if card.module else ""
    facts = [f"{card.method}{whose} at layer {card.layer}{module}", card.grid]
    facts += [f"{card.fuse} of the layers"] if card.fuse else []
    facts += [f"smoothed by {' and '.join(card.smooth)}"] if card.smooth else []
    facts += [f"evidence {card.evidence}"] if card.evidence else []
    typer.echo(f"{output}: {', '.join(filter(None, facts))}, score {card.score} softmax")
    missing = card.input.missing()
    if missing:
        typer.echo(f"  not on the card, to be given to 'onnxcam run': {', '.join(missing)}")


class _Bar:
    """A progress bar on stderr: for more than one picture, and only if that is a terminal."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._done = 0
        self._visible = total > 1 and sys.stderr.isatty()

    def __enter__(self) -> "_Bar":
        self.show()
        return self

    def __exit__(self, *exc: object) -> None:
        self.clear()

    def advance(self) -> None:
        self._done += 1
        self.show()

    def show(self) -> None:
        filled = 40 * self._done // self._total
        self._write(f"[{'#' * filled:.<40}] {self._done} of {self._total} pictures")

    def clear(self) -> None:
        self._write("\r\x1b[2K")

    def _write(self, text: str) -> None:
        if self._visible:
            sys.stderr.write(text)
            sys.stderr.flush()
