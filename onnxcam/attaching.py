"""ONNX classifier in, explained ONNX classifier out."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir import Value

from onnxcam import __version__, layers, onnxfile
from onnxcam.card import KEY, LAYOUTS, Card, Preprocess
from onnxcam.emit import Emitter, all_values
from onnxcam.errors import OnnxcamError, suggest
from onnxcam.methods import METHODS, Method
from onnxcam.seed import ROWS, class_gradients, resolve_classes
from onnxcam.simplify import simplify
from onnxcam.vjp import RULES
from onnxcam.vjp.shapes import dims

EMITS = ("cam", "heatmap", "activations", "gradients")
CLASS_INPUTS = ("optional", "required")
SCORES = ("before", "after")
PREFIX = "cam"

_OUTPUTS = {
    "cam": "cam",
    "heatmap": "cam_heatmap",
    "activations": "cam_activations",
    "gradients": "cam_gradients",
}
_CLASS_INPUT = "cam_class"


def attach(
    model: "str | os.PathLike[str] | onnx.ModelProto | ir.Model",
    path: "str | os.PathLike[str] | None" = None,
    *,
    layer: str | None = None,
    method: str = "gradcam",
    emit: Sequence[str] = ("cam", "heatmap"),
    class_input: str = "optional",
    score: str = "before",
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
            or a PyTorch module path. None: the last feature map before the head that a gradient reaches.
        method: a key of ``onnxcam.methods.METHODS``.
        emit: outputs to add, of ``cam``, ``heatmap``, ``activations``, ``gradients``.
        class_input: ``optional`` (``cam_class`` defaults to the best class) or ``required``, for runtimes
            that cannot override an initializer.
        score: explain the class score ``before`` or ``after`` the softmax.
        scores: the model output that holds the class scores; needed if several could.
        labels: class names by index, for the card.
        preprocess: facts for the card, fields of `onnxcam.card.Preprocess` (height, width, layout, color,
            scale, mean, std, resize, interpolation). What is left out stays unknown.

    Returns:
        The explained model.

    Raises:
        OnnxcamError: the model cannot be read or explained, or an argument is wrong.
    """
    chosen = _method(method)
    _one_of("score", score, SCORES)
    _one_of("class input", class_input, CLASS_INPUTS)
    for name in emit:
        _one_of("output", name, EMITS)
    if not emit:
        raise OnnxcamError(f"nothing to emit; choose from {', '.join(EMITS)}")
    if path is not None and isinstance(model, str | os.PathLike) and _same_file(Path(path), Path(model)):
        raise OnnxcamError(f"{path} is the model itself, which is never modified; choose another output name")
    model = prepared(model)
    graph = model.graph
    taken = {value.name for value in all_values(graph)}
    for name in (_CLASS_INPUT, *(_OUTPUTS[kind] for kind in emit)):
        if name in taken:
            raise OnnxcamError(
                f"the model has a value called {name!r} already, a name that attach needs; rename it there"
            )
    picture = layers.picture(model)
    found = layers.scores(model, scores)
    source = (
        layers.find(model, layer, picture, found.logits)
        if layer is not None
        else layers.default(layers.explainable(picture, found.logits), picture, found.logits)
    )
    prepares = _preprocess(picture, preprocess)
    card = Card(
        input=prepares,
        scores=found.output.name or "",
        scores_are=found.are,
        layer=source.name,
        method=method,
        score=score,
        module=source.module,
        grid=None if source.grid.order == "NCHW" else str(source.grid),
        labels=_labels(labels, found.output),
        tool=f"onnxcam {__version__}",
    )
    op = Emitter(graph, graph.opset_imports[""], PREFIX)
    rows = 2 if prepares.layout == "NCHW" else 1
    outputs = _explain(op, picture, rows, found, source, chosen, score, class_input, emit)
    simplify(op)
    op.remove_dead(list(outputs.values()))
    for name, value in outputs.items():
        value.name = _OUTPUTS[name]
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
    if isinstance(model, ir.Model):
        own = model.clone()
    elif isinstance(model, onnx.ModelProto):
        own = onnxfile.from_proto(model)
    else:
        own = onnxfile.load(model)
    card = Card.from_metadata(own.metadata_props)
    if card is not None:
        raise OnnxcamError(
            f"the model is explained already ({card.method} at {card.layer}); attach to the original model"
        )
    return onnxfile.normalise(own)


def _explain(
    op: Emitter,
    picture: Value,
    rows: int,
    found: layers.Scores,
    source: layers.Layer,
    method: Method,
    score: str,
    class_input: str,
    emit: Sequence[str],
) -> dict[str, Value]:
    """Emit the whole branch and return the outputs asked for, by name."""
    rules = RULES
    if method.linear_head and score == "after":
        raise OnnxcamError(f"{method.name} explains the score before the softmax, which is linear in the map")
    if method.linear_head:
        reason = layers.why_no_linear_head(source.value, found.logits)
        if reason is not None:
            raise OnnxcamError(
                f"{method.name} needs a head that averages the feature map and weighs its channels, "
                f"but {reason}; use gradcam, which is the same map on such a head and works on any"
            )
        # The class map of a convolution that ends in ReLU is taken before the ReLU.
        rules = {**RULES, ("", "Relu"): RULES["", "Identity"]}
    with op.scope("class"):
        ranked = _as_rows(op, found.output)
        explained = _as_rows(op, _logits(op, found))
        if score == "after":
            explained = ranked if found.are == "probabilities" else op.Softmax(explained, axis=1)
        index, valid = resolve_classes(op, ranked, _class_input(op, class_input))
    da = class_gradients(op, explained, index, source.value, rules)
    if da is None:
        raise OnnxcamError(f"layer {source.name!r} does not influence the scores: no gradient reaches it")
    with op.scope("layer"):
        activation, da = source.grid.planes(op, source.value), source.grid.planes(op, da)
    outputs = {}
    with op.scope(method.name):
        a = op.Unsqueeze(activation, [1])
        map_ = op.Cast(method.function(op, a, da), to=ir.DataType.FLOAT)
        known = op.Unsqueeze(valid, [2, 3])
        outputs["cam"] = op.Where(known, map_, np.float32(np.nan))
    if "heatmap" in emit:
        with op.scope("heatmap"):
            outputs["heatmap"] = heatmap(op, outputs["cam"], picture, rows)
    if "activations" in emit:
        outputs["activations"] = op.Identity(activation)
    if "gradients" in emit:
        with op.scope("gradients"):
            full = op.Expand(da, op.Shape(a, start=2))
            shown = op.Where(op.Unsqueeze(valid, [2, 3, 4]), full, np.nan)
            shape = op.Concat(np.array([-1]), op.Shape(activation, start=1), axis=0)
            outputs["gradients"] = op.Reshape(shown, shape)
    for name, value in outputs.items():
        value.shape = _declared_shape(name, picture, rows, activation)
    return {name: outputs[name] for name in EMITS if name in emit}


def heatmap(op: Emitter, cam: Value, picture: Value, rows: int = 2) -> Value:
    """Resize maps to the picture (bilinear, half-pixel centres) and scale each to [0,1].

    A map that is flat or has a value that is not finite becomes all zeros.

    Args:
        op: where the nodes go.
        cam: float32 [N,K,h,w].
        picture: the model's input, [N,C,H,W] or [N,H,W,C].
        rows: the axis of H there.

    Returns:
        float32 [N,K,H,W].
    """
    size = dims(picture)[rows : rows + 2]
    sizes = size if all(isinstance(d, int) for d in size) else op.Shape(picture, start=rows, end=rows + 2)
    # Up to half the largest number, so that the span from minimum to maximum is finite too.
    small = op.LessOrEqual(op.Abs(cam), float(np.finfo(np.float32).max) / 2)
    finite = op.ReduceMin(op.Cast(small, to=ir.DataType.FLOAT), [2, 3])
    # A flat map is zero before the resizing, whose weights add up to 1 only nearly.
    varied = op.Greater(op.ReduceMax(cam, [2, 3]), op.ReduceMin(cam, [2, 3]))
    clean = op.Where(op.And(op.Greater(finite, 0.0), varied), cam, 0.0)
    full = op.Resize(
        clean,
        None,
        None,
        sizes,
        axes=[2, 3],
        mode="linear",
        coordinate_transformation_mode="half_pixel",
    )
    low = op.ReduceMin(full, [2, 3])
    span = op.Sub(op.ReduceMax(full, [2, 3]), low)
    return op.Div(op.Sub(full, low), op.Where(op.Greater(span, 0.0), span, 1.0))


def _class_input(op: Emitter, kind: str) -> Value:
    """Add the input ``cam_class``."""
    default = np.array([[-1]], np.int64)
    value = Value(
        name=_CLASS_INPUT,
        shape=ir.Shape(["cam_images", "cam_classes"]),
        type=ir.TensorType(ir.DataType.INT64),
    )
    op.graph.inputs.append(value)
    if kind == "optional":
        value.const_value = ir.tensor(default, name=_CLASS_INPUT)
        op.graph.register_initializer(value)
    return value


def _same_file(a: Path, b: Path) -> bool:
    return a.exists() and b.exists() and a.samefile(b)


def _logits(op: Emitter, found: layers.Scores) -> Value:
    """Return the scores before the softmax, regrouped as the output is."""
    value = found.logits
    for node in found.regrouping:
        attributes = {name: attribute.value for name, attribute in node.attributes.items()}
        value = op.node(node.op_type, value, *node.inputs[1:], **attributes)
    return value


def _as_rows(op: Emitter, scores: Value) -> Value:
    """View class scores [N,M] or [N,M,1,1] as [N,M]."""
    return scores if len(dims(scores)) == 2 else op.Flatten(scores, axis=1)


def _declared_shape(name: str, picture: Value, rows: int, activation: Value) -> ir.Shape:
    batch, kinds = dims(picture)[0], "cam_classes"
    channels, *plane = dims(activation)[1:]
    return ir.Shape(
        {
            "cam": [batch, kinds, *plane],
            "heatmap": [batch, kinds, *dims(picture)[rows : rows + 2]],
            "activations": [batch, channels, *plane],
            "gradients": [ROWS, channels, *plane],
        }[name]
    )


def _preprocess(picture: Value, facts: Mapping[str, Any]) -> Preprocess:
    unknown = facts.keys() - {field for field in Preprocess.__dataclass_fields__ if field != "name"}
    if unknown:
        raise TypeError(f"attach() got an unexpected argument {sorted(unknown)[0]!r}")
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


def _method(name: str) -> Method:
    if name not in METHODS:
        raise OnnxcamError(
            f"there is no method {name!r}{suggest(name, METHODS)}; methods: {', '.join(METHODS)}"
        )
    return METHODS[name]


def _one_of(what: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise OnnxcamError(f"{what} is {value!r}; it must be one of {', '.join(allowed)}")
