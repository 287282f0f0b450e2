"""ONNX classifier in, explained ONNX classifier out."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir import Value

from onnxcam import __version__, layers, onnxfile, quantised
from onnxcam.card import (
    CLASS_INPUTS,
    EMITS,
    EVIDENCE,
    FUSIONS,
    KEY,
    LAYOUTS,
    SCORES,
    SMOOTHINGS,
    TARGETS,
    WANTED,
    Card,
    Preprocess,
)
from onnxcam.demand import behind_input
from onnxcam.dialects import DIALECTS
from onnxcam.drawing import drawn, photo_of
from onnxcam.embedding import PICTURE, Embedded
from onnxcam.emit import Emitter, all_values
from onnxcam.errors import OnnxcamError
from onnxcam.explaining import Request, explain
from onnxcam.grid import PLANES, Grid
from onnxcam.image import check_facts
from onnxcam.methods import Method, named
from onnxcam.probe import Probe
from onnxcam.simplify import simplify
from onnxcam.targets import add_seeds, inputs_of
from onnxcam.vjp import PORTABLE, under
from onnxcam.vjp.shapes import ROWS, dims

PREFIX = "cam"

OUTPUTS = {kind: PREFIX if kind == "cam" else f"{PREFIX}_{kind}" for kind in EMITS}
"""Name of each output."""


def attach(
    model: "str | os.PathLike[str] | onnx.ModelProto | ir.Model",
    path: "str | os.PathLike[str] | None" = None,
    *,
    layer: str | Sequence[str] | None = None,
    method: str = "gradcam",
    target: str | None = None,
    evidence: str | None = None,
    fuse: str | None = None,
    smooth: Sequence[str] = (),
    compat: str = "paper",
    emit: Sequence[str] = ("cam", "heatmap"),
    class_input: str = "optional",
    embed_preprocess: bool = False,
    on_demand: bool = False,
    portable: bool = False,
    score: str | None = None,
    scores: str | None = None,
    labels: Sequence[str] | None = None,
    **preprocess: Any,
) -> ir.Model:
    """Add a gradient branch and class activation maps to a classifier.

    The format of the result is written down in ``docs/format.md``.

    Args:
        model: an ONNX file, or a model in memory, which stays as it is.
        path: where to write the explained model; its folder must exist. None: only return it.
        layer: the activation to explain, [N,C,h,w], [N,h,w,C] or tokens [N,T,C]: a value name, a node name
            or a PyTorch module path. None: the last feature map before the head that a gradient reaches. Of
            several layers the maps are joined.
        method: a key of ``onnxcam.methods.METHODS``.
        target: what is explained: the score of a ``class``, that score less another class's (``contrast``) or
            less the mean of its three nearest (``rivals``), or any weighted sum of scores (``seed``). None:
            what the method explains, mostly the class.
        evidence: what of the map is kept: ``for`` the class (above zero), ``against`` it (below zero),
            ``both``, or ``counterfactual``, the map of the negative score. None: as in the method's paper,
            which is ``both`` for what is signed there, such as integrated gradients.
        fuse: how the maps of several layers are joined: ``mean``, ``max`` or ``product``. None: the first of
            these that the dialect has.
        smooth: ``augmentation`` averages over mirrored, weaker and stronger pictures; ``eigen`` takes the
            first principal component of what would be summed over the channels.
        compat: whose numbers the maps have, a key of ``onnxcam.dialects.DIALECTS``.
        emit: outputs to add, of ``cam``, ``heatmap``, ``overlay`` (the heat map in colours over the picture),
            ``activations``, ``gradients``, ``attributions``.
        class_input: ``optional`` (``cam_class`` defaults to the best class, ``cam_against`` to the second,
            ``cam_wanted`` to false) or ``required``, for runtimes that cannot override an initializer.
        embed_preprocess: let the model take the picture itself, ``cam_picture`` uint8 [N,H,W,3] of any size,
            and prepare it inside the graph, for which all facts for the card must be known. The heat map is
            then of the picture's size.
        on_demand: make maps only where the input ``cam_wanted`` is true. Elsewhere they are empty, or 0 if
            `portable` and of known sizes, and the model costs what it cost before.
        portable: write what all runtimes of ``docs/runtimes.md`` compute alike: no Scan, so that a run
            explains one class (K = 1), and rules that do without what some number or pack in their own way.
        score: explain the class score ``before`` or ``after`` the softmax. None: before it, or what the
            dialect always explains.
        scores: the model output that holds the class scores, needed if several could: [N,classes], dense
            ones [N,classes,H,W], or for the target ``seed`` of any shape [N,...].
        labels: class names by index, for the card.
        preprocess: facts for the card, fields of `onnxcam.card.Preprocess` (height, width, layout, color,
            scale, mean, std, resize, interpolation). What is left out stays unknown.

    Returns:
        The explained model.

    Raises:
        OnnxcamError: the model cannot be read or explained, or an argument is wrong.
    """
    _one_of("compat", compat, list(DIALECTS))
    for what, given, allowed in (
        ("evidence", evidence, EVIDENCE),
        ("fuse", fuse, FUSIONS),
        ("score", score, SCORES),
        *(("smoothing", name, SMOOTHINGS) for name in smooth),
    ):
        if given is not None:
            _one_of(what, given, allowed)
    dialect = DIALECTS[compat]
    named(method)
    made = dialect.method(method)
    target = _target(made, target)
    evidence = evidence or ("both" if made.signed else None)
    dialect.check(made, target, evidence, smooth)
    request = Request(made, dialect, evidence, dialect.fusion(fuse), tuple(smooth))
    score = dialect.scored(score)
    _one_of("class input", class_input, CLASS_INPUTS)
    for name in emit:
        _one_of("output", name, EMITS)
    if not emit:
        raise OnnxcamError(f"nothing to emit; choose from {', '.join(EMITS)}")
    if path is not None and isinstance(model, str | os.PathLike) and _same_file(Path(path), Path(model)):
        raise OnnxcamError(f"{path} is the model itself, which is never modified; choose another output name")
    model = prepared(model)
    graph = model.graph
    picture = layers.picture(model)
    found = layers.scores(model, scores, any_shape=target == "seed")
    taken = {value.name for value in all_values(graph)}
    more = [*([PICTURE] if embed_preprocess else []), *([WANTED] if on_demand else [])]
    for name in (*inputs_of(target, found.dense), *more, *(OUTPUTS[kind] for kind in emit)):
        if name in taken:
            raise OnnxcamError(
                f"the model has a value called {name!r} already, a name that attach needs; rename it there"
            )
    prepares = stated(picture, preprocess)
    if embed_preprocess:
        check_facts(prepares)
        picture.shape = _of_size(picture, prepares)
    elif "overlay" in emit:
        check_facts(prepares, ("color", "scale", "mean", "std"))
    at = _layout(picture, prepares.layout)
    sources = _sources(model, layer, picture, at, found.logits, request.method)
    card = Card(
        input=prepares,
        scores=found.output.name or "",
        scores_are=found.are,
        layer=", ".join(source.name for source in sources),
        method=method,
        score=score,
        target=None if target == "class" else target,
        compat=None if compat == "paper" else compat,
        evidence=evidence,
        fuse=request.fusion if len(sources) > 1 else None,
        smooth=tuple(smooth) or None,
        module=sources[0].module if len(sources) == 1 else None,
        grid=str(sources[0].grid) if len(sources) == 1 and sources[0].grid.order != "NCHW" else None,
        labels=_labels(labels, found.output),
        picture=PICTURE if embed_preprocess else None,
        on_demand=on_demand or None,
        tool=f"onnxcam {__version__}",
    )
    op = Emitter(graph, graph.opset_imports[""], PREFIX, portable)
    optional = class_input == "optional"
    first = graph[0]
    with op.before(first):
        embedded = Embedded.add(op, picture, prepares) if embed_preprocess else None
    outputs = _explain(op, picture, at, found, sources, request, target, score, optional, emit)
    outputs = _finished(op, outputs, picture, prepares, embedded, evidence, emit)
    if embedded is not None:
        with op.before(first):
            embedded.feed(op, picture)
    simplify(op)
    quantised.fold(op)
    op.remove_dead(list(outputs.values()))
    if on_demand:
        outputs = behind_input(op, outputs, optional)
    for name, value in outputs.items():
        value.name = OUTPUTS[name]
        graph.outputs.append(value)
    model.metadata_props[KEY] = card.to_json()
    model.ir_version = max(model.ir_version, 8)
    onnxfile.check(model)
    if path is not None:
        onnxfile.save(model, path)
    return model


def prepared(model: "str | os.PathLike[str] | onnx.ModelProto | ir.Model") -> ir.Model:
    """Read or copy a model and bring it into the form that everything else expects.

    Raises:
        OnnxcamError: it cannot be read, or is explained already.
    """
    own = opened(model)
    card = Card.from_metadata(own.metadata_props)
    if card is not None:
        raise OnnxcamError(
            f"the model is explained already ({card.method} at {card.layer}); attach to the original model"
        )
    return onnxfile.normalise(own)


def opened(model: "str | os.PathLike[str] | onnx.ModelProto | ir.Model") -> ir.Model:
    """Read a model file, or copy a model in memory.

    Raises:
        OnnxcamError: it cannot be read.
    """
    if isinstance(model, ir.Model):
        return model.clone()
    return onnxfile.from_proto(model) if isinstance(model, onnx.ModelProto) else onnxfile.load(model)


def _sources(
    model: ir.Model,
    names: str | Sequence[str] | None,
    picture: Value,
    at: Grid,
    logits: Value,
    method: Method,
) -> list[layers.Layer]:
    """Return the layers that the method looks at."""
    if method.at_picture:
        if names is not None:
            raise OnnxcamError(f"{method.name} looks at the picture itself; leave the layer out")
        return [layers.Layer(picture, picture.name or "", "Input", "", None, at)]
    if names is None:
        default = layers.REQUIREMENTS[method.requires].default if method.requires else layers.default
        return [default(layers.explainable(picture, logits), picture, logits)]
    wanted = [names] if isinstance(names, str) else list(dict.fromkeys(names))
    if not wanted:
        raise OnnxcamError("no layer is given; leave it out for the default")
    return [layers.find(model, name, picture, logits) for name in wanted]


def _of_size(picture: Value, prepares: Preprocess) -> ir.Shape:
    """The shape of the model's input where its size is known."""
    batch, *rest = dims(picture)
    size = [prepares.height, prepares.width]
    return ir.Shape([batch, rest[0], *size] if prepares.layout == PLANES else [batch, *size, rest[2]])


def _layout(picture: Value, layout: str) -> Grid:
    """How the picture lies in the model's input."""
    rows = 2 if layout == "NCHW" else 1
    height, width = dims(picture)[rows : rows + 2]
    return Grid(layout, height, width)


def _explain(
    op: Emitter,
    picture: Value,
    at: Grid,
    found: layers.Scores,
    sources: Sequence[layers.Layer],
    request: Request,
    target: str,
    score: str,
    optional: bool,
    emit: Sequence[str],
) -> dict[str, Value]:
    """Emit the whole branch and return the outputs asked for, by name."""
    method = request.method
    with op.scope("class"):
        ranked = _as_rows(op, found.output)
        explained = _as_rows(op, _logits(op, found))
        if score == "after":
            explained = ranked if found.are == "probabilities" else op.Softmax(explained, axis=1)
        seeds = add_seeds(op, target, ranked, explained, optional, request.dialect.contrast)
        if request.evidence == "counterfactual":
            seeds = seeds.negated(op)
    for source in sources:
        _check_requirement(method, picture if method.full_size else source.value, explained)
    rules = under(PORTABLE if op.portable else None, method.rules)
    probes = [
        Probe(op, picture, at, source.value, source.grid, explained, seeds, rules) for source in sources
    ]
    outputs = explain(op, probes, request, emit)
    valid = seeds.valid
    if valid is not None:
        outputs["cam"] = op.Where(op.Unsqueeze(valid, [2, 3]), outputs["cam"], np.float32(np.nan))
    if "activations" in emit:
        if len(probes) > 1:
            raise OnnxcamError("activations are those of one layer; there are several")
        outputs["activations"] = op.Identity(probes[0].activation())
    lies = [probe.at_picture() for probe in probes] if method.full_size else probes
    for name, probe in (("gradients", probes[0]), ("attributions", lies[0])):
        if name in emit:
            outputs[name] = _in_rows(op, outputs[name], valid, probe)
    for name, value in outputs.items():
        value.shape = _declared_shape(name, picture, at, lies if name in ("cam", "attributions") else probes)
    return outputs


def _finished(
    op: Emitter,
    outputs: dict[str, Value],
    picture: Value,
    prepares: Preprocess,
    embedded: Embedded | None,
    evidence: str | None,
    emit: Sequence[str],
) -> dict[str, Value]:
    """Return the outputs asked for, of the picture itself where that is what the model takes."""
    if embedded is not None:
        shape = outputs["heatmap"].shape
        assert shape is not None
        outputs["heatmap"] = embedded.spread(op, outputs["heatmap"])
        outputs["heatmap"].shape = ir.Shape([*shape[:2], *embedded.size])
    if "overlay" in emit:
        with op.scope("overlay"):
            if embedded is not None:
                photo, seen = op.Cast(embedded.picture, to=ir.DataType.FLOAT), embedded.seen(op)
            else:
                photo, seen = photo_of(op, picture, prepares), None
            heat = outputs["heatmap"]
            assert heat.shape is not None
            outputs["overlay"] = drawn(op, photo, heat, seen, evidence)
            outputs["overlay"].shape = ir.Shape([*heat.shape, 3])
    return {name: outputs[name] for name in EMITS if name in emit}


def _check_requirement(method: Method, source: Value, scores: Value) -> None:
    """Refuse a model that lacks what the method needs between `source` and the scores."""
    if method.requires is None:
        return
    requirement = layers.REQUIREMENTS[method.requires]
    reason = requirement.missing(source, scores)
    if reason is not None:
        raise OnnxcamError(f"{method.name} needs {requirement.needs}, but {reason}; use {method.instead}")


def _in_rows(op: Emitter, value: Value, valid: Value | None, probe: Probe) -> Value:
    """View [N,K,C,h,w] as [N*K,C,h,w]; NaN where there is no such class."""
    plane = op.Shape(probe.activation(), start=1)
    with op.scope("gradients"):
        full = op.Expand(value, op.Concat(np.array([1, 1]), plane, axis=0))
        if valid is not None:
            full = op.Where(op.Unsqueeze(valid, [2, 3, 4]), full, np.nan)
        return op.Reshape(full, op.Concat(np.array([-1]), plane, axis=0))


def _same_file(a: Path, b: Path) -> bool:
    return a.exists() and b.exists() and a.samefile(b)


def _logits(op: Emitter, found: layers.Scores) -> Value:
    """Return the scores before the softmax, regrouped as the output is."""
    value = found.logits
    for node in found.regrouping:
        attributes = {name: attribute.value for name, attribute in node.attributes.items()}
        value = op.node(node.op_type, value, *node.inputs[1:], **attributes)
    if found.regrouping:
        value.shape = found.output.shape
    return value


def _as_rows(op: Emitter, scores: Value) -> Value:
    """View class scores [N,M,1,1] as [N,M]; others stay as they are."""
    return op.Flatten(scores, axis=1) if dims(scores)[2:] == [1, 1] else scores


def _declared_shape(name: str, picture: Value, at: Grid, probes: Sequence[Probe]) -> ir.Shape:
    batch, photo = dims(picture)[0], [at.height, at.width]
    kinds = 1 if probes[0].seeds.valid is None or probes[0].op.portable else "cam_classes"
    channels, *plane = dims(probes[0].activation())[1:]
    if len(probes) > 1:
        plane = [None, None]
    return ir.Shape(
        {
            "cam": [batch, kinds, *plane],
            "heatmap": [batch, kinds, *photo],
            "activations": [batch, channels, *plane],
            "gradients": [ROWS, channels, *plane],
            "attributions": [ROWS, channels, *plane],
        }[name]
    )


def stated(picture: Value, facts: Mapping[str, Any]) -> Preprocess:
    """Return how a picture becomes the model's input, from what the graph says and what somebody stated.

    Args:
        picture: the model's input.
        facts: fields of `onnxcam.card.Preprocess`; None stands for one that is unknown.

    Raises:
        OnnxcamError: the facts contradict the graph.
    """
    unknown = facts.keys() - {field for field in Preprocess.__dataclass_fields__ if field != "name"}
    if unknown:
        raise TypeError(f"unexpected argument {sorted(unknown)[0]!r}")
    given = {name: value for name, value in facts.items() if value is not None}
    given.setdefault("layout", layers.layout(picture))
    _one_of("layout", given["layout"], LAYOUTS)
    rows = 2 if given["layout"] == "NCHW" else 1
    for name, size in zip(("height", "width"), dims(picture)[rows : rows + 2], strict=True):
        if isinstance(size, int) and given.setdefault(name, size) != size:
            raise OnnxcamError(
                f"{name} is given as {given[name]}, but the model's input is {size} pixels there"
            )
    channels = dims(picture)[1 if given["layout"] == "NCHW" else 3]
    if channels == 1:
        given.setdefault("color", "GRAY")
    for name in ("mean", "std"):
        if name in given:
            given[name] = tuple(float(value) for value in given[name])
    result = Preprocess(name=picture.name or "", **given)
    if result.color is not None and isinstance(channels, int) and channels != result.channels:
        raise OnnxcamError(f"color is {result.color}, but the model's input has {channels} channels")
    return result


def _labels(labels: Sequence[str] | None, scores: Value) -> tuple[str, ...] | None:
    if labels is None:
        return None
    count = dims(scores)[1]
    if isinstance(count, int) and count != len(labels):
        raise OnnxcamError(f"there are {len(labels)} labels for {count} classes")
    return tuple(labels)


def _target(method: Method, target: str | None) -> str:
    """Return what is explained; a method whose name stands for something explains that alone."""
    if target is not None:
        _one_of("target", target, TARGETS)
    if method.target not in (None, target or method.target):
        raise OnnxcamError(
            f"{method.name} explains the target {method.target}, not {target}; use gradcam for that"
        )
    return method.target or target or "class"


def _one_of(what: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise OnnxcamError(f"{what} is {value!r}; it must be one of {', '.join(allowed)}")
