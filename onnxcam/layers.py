"""Finding things in a classifier: its picture, its scores, and the activations that can be explained."""

import ast
import dataclasses
from collections.abc import Iterable

import numpy as np
import onnx_ir as ir

from onnxcam.backward import path
from onnxcam.errors import OnnxcamError, suggest
from onnxcam.grid import PLANES, TOKENS, Grid, bottlenecks, grids, live_tokens, pooled_order
from onnxcam.subgraphs import refuse_inner, within
from onnxcam.vjp.shapes import dims, is_constant

_WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul", "Einsum", "FusedConv", "FusedGemm", "FusedMatMul")
_REGROUPING = ("Identity", "Cast", "Flatten", "Reshape", "Squeeze", "Unsqueeze", "Transpose")
NORMALISATIONS = ("LayerNormalization", "RMSNormalization", "SkipLayerNormalization")
"""Operators that make the input of a transformer's block."""

_PASSING = (*_REGROUPING, "Dropout")
_PROBABILITY = ("Softmax", "Sigmoid", "HardSigmoid")


@dataclasses.dataclass(frozen=True)
class Layer:
    """An activation that a map can be made from.

    Attributes:
        value: the ONNX value.
        operator: name of the operator that computes it.
        node: name of the node that computes it.
        module: PyTorch module path, where the exporter recorded it, otherwise None.
        grid: how the positions of the picture lie in it.
        unreached: whether the scores read only other tokens after it, so that its gradient is zero.
    """

    value: ir.Value
    operator: str
    node: str
    module: str | None
    grid: Grid
    unreached: bool = False

    @property
    def name(self) -> str:
        """The name of the ONNX value."""
        return self.value.name or ""

    @property
    def shape(self) -> list[int | str | None]:
        """Its dimensions: an int, a symbol, or None where nothing is known."""
        return dims(self.value)


@dataclasses.dataclass(frozen=True)
class Scores:
    """Where the class scores are.

    Attributes:
        output: the model's own output.
        logits: the value before a final softmax or sigmoid; `output` itself if there is none.
        are: what `output` holds: ``logits`` or ``probabilities``.
        regrouping: the nodes that only regroup elements between that softmax and `output`, in order.
    """

    output: ir.Value
    logits: ir.Value
    are: str
    regrouping: tuple[ir.Node, ...] = ()


def picture(model: ir.Model) -> ir.Value:
    """Return the model input that takes the picture: its only one of four dimensions.

    Raises:
        OnnxcamError: there is none, or more than one.
    """
    graph = model.graph
    given = [value for value in graph.inputs if not value.is_initializer()]
    images = [v for v in given if v.shape is not None and len(v.shape) == 4 and _is_float(v)]
    if len(images) == 1:
        return images[0]
    if images:
        names = ", ".join(repr(value.name) for value in images)
        raise OnnxcamError(
            f"the model has {len(images)} image-like inputs ({names}); "
            "onnxcam explains models with exactly one"
        )
    found = ", ".join(f"{v.name!r} {_shape_text(v)}" for v in given) or "none"
    raise OnnxcamError(
        "the model has no image-like input (floating point, four dimensions); its inputs: " + found
    )


def scores(model: ir.Model, name: str | None = None) -> Scores:
    """Find the class scores: the output `name`, or the only output shaped [N,classes] or [N,classes,1,1].

    Raises:
        OnnxcamError: no output fits, or several do and `name` does not choose.
    """
    outputs = {value.name or "": value for value in model.graph.outputs}
    if name is not None:
        if name not in outputs:
            raise OnnxcamError(
                f"the model has no output {name!r}{suggest(name, outputs)}; it has: {', '.join(outputs)}"
            )
        fitting = [outputs[name]]
        if not _holds_scores(outputs[name]):
            raise OnnxcamError(
                f"output {name!r} is {_shape_text(outputs[name])}; "
                "class scores are [N,classes] or [N,classes,1,1]"
            )
    else:
        fitting = [value for value in outputs.values() if _holds_scores(value)]
    if len(fitting) != 1:
        listed = ", ".join(f"{n!r} {_shape_text(v)}" for n, v in outputs.items())
        reason = "several outputs that could be class scores" if fitting else "no output of class scores"
        hint = "; choose one with --scores" if fitting else ""
        raise OnnxcamError(f"the model has {reason} [N,classes]{hint}. Its outputs: {listed}")
    output = fitting[0]
    value = output
    regrouping: list[ir.Node] = []
    while (node := value.producer()) is not None and node.inputs and node.inputs[0] is not None:
        if node.op_type in (*_PROBABILITY, "LogSoftmax"):
            are = "probabilities" if node.op_type in _PROBABILITY else "logits"
            return Scores(output, node.inputs[0], are, tuple(reversed(regrouping)))
        if node.op_type not in _REGROUPING:
            break
        regrouping.append(node)
        value = node.inputs[0]
    return Scores(output, output, "logits")


def explainable(source: ir.Value, logits: ir.Value) -> list[Layer]:
    """List the activations between `source` and `logits` that a map can be made from, in order."""
    nodes = path(logits, source)
    sizes = dims(source)[1:3] if layout(source) == "NHWC" else dims(source)[2:]
    height, width = (size if isinstance(size, int) else None for size in sizes)
    found = grids(nodes, source, height, width)
    live = live_tokens(nodes, logits)
    return [
        _layer(value, found[value], live.get(value))
        for node in nodes
        for value in node.outputs
        if value in found and value is not logits
    ]


def default(layers: list[Layer], source: ir.Value, logits: ir.Value) -> Layer:
    """Return the last feature map before the head that the gradient reaches.

    A weighted operator must still follow it: where the last convolution is the classifier itself (one
    channel for each class, then pooling), its input is chosen, not the class maps it makes. Of tokens
    and channels-last maps only those count that a normalisation made or that everything flows through,
    not the inner values of an attention or a perceptron.

    Raises:
        OnnxcamError: there is no such activation.
    """
    through = set(bottlenecks(path(logits, source), logits))
    for layer in reversed(layers):
        on_trunk = layer.grid.order == PLANES or layer.value in through or layer.operator in NORMALISATIONS
        if not on_trunk or layer.unreached:
            continue
        after = path(logits, layer.value)
        if any(_is_weighted(inner) for node in after for inner in within(node)):
            return layer
    raise OnnxcamError(
        "the model has no feature map with more than one position before its scores; "
        "name a layer with --layer"
    )


def find(model: ir.Model, name: str, source: ir.Value, logits: ir.Value) -> Layer:
    """Find the layer called `name`: a value, a node or a PyTorch module path.

    Raises:
        OnnxcamError: there is no such layer, it comes after the scores or does not influence them,
            it has no plane of positions, or no gradient reaches that.
    """
    value = _named(model, name)
    if value is None:
        refuse_inner(model.graph, "layer", name)
        nodes = list(model.graph)
        known = [n.name for n in nodes] + [v.name for n in nodes for v in n.outputs]
        modules = [m for n in nodes if (m := module_path(n)) is not None]
        hint = suggest(name, [k for k in [*modules, *known] if k])
        raise OnnxcamError(f"the model has no layer {name!r}{hint}; 'onnxcam layers' lists those it has")
    if value is not source and not path(value, source):
        raise OnnxcamError(f"layer {name!r} does not depend on the picture")
    if value is logits or not path(logits, value):
        if value is logits or path(value, logits):
            raise OnnxcamError(f"layer {name!r} comes after the scores; choose one before them")
        raise OnnxcamError(f"layer {name!r} does not influence the scores")
    layers = explainable(source, logits)
    layer = next((layer for layer in layers if layer.value is value), None)
    if layer is None and is_map(value):
        order = layout(source) if value is source else PLANES
        at = 2 if order == PLANES else 1
        layer = _layer(value, Grid(order, dims(value)[at], dims(value)[at + 1]), None)
    if layer is None:
        raise OnnxcamError(
            f"layer {name!r} is {_shape_text(value)}; a map needs an activation [N,C,h,w] or [N,h,w,C] with "
            "h*w > 1, or tokens [N,T,C] that cover the picture"
        )
    if layer.unreached:
        raise OnnxcamError(
            f"no gradient reaches the picture's tokens at layer {name!r}: only the others are read after it; "
            f"choose an earlier layer, such as {default(layers, source, logits).name!r}"
        )
    return layer


def _layer(value: ir.Value, grid: Grid, live: np.ndarray | None) -> Layer:
    node = value.producer()
    return Layer(
        value,
        node.op_type if node else "Input",
        (node.name or "") if node else "",
        module_path(node) if node else None,
        grid,
        unreached=live is not None and grid.order == TOKENS and not grid.plane_of(live).any(),
    )


def layout(picture: ir.Value) -> str:
    """Return ``NHWC`` if only the last axis of the model's input can hold colour channels, else ``NCHW``."""
    sizes = dims(picture)
    return "NHWC" if sizes[3] in (1, 3) and sizes[1] not in (1, 3) else "NCHW"


def why_no_linear_head(source: ir.Value, logits: ir.Value) -> str | None:
    """Say in what way the scores are not one weighted sum of channels averaged over the plane.

    Returns:
        None if they are: pooling over the whole plane and one matrix of weights (a linear layer or a
        1x1 convolution, whose ReLU is allowed where the pooling follows it) are all that lies between.
    """
    weighted, pooled = 0, False
    for node in path(logits, source):
        if _is_weighted(node) and node.op_type != "ConvTranspose" and not node.domain:
            if node.op_type == "Conv" and any(k != 1 for k in dims(node.inputs[1])[2:]):  # type: ignore[arg-type]
                return f"node {node.name!r} is a convolution wider than 1x1"
            weighted += 1
        elif _pools_plane(node):
            pooled = True
        elif node.op_type in ("Add", "Sub"):
            if not any(v is not None and is_constant(v) for v in node.inputs):
                return f"node {node.name!r} ({node.op_type}) joins it with another value"
        elif not (node.op_type == "Relu" and weighted and not pooled) and node.op_type not in _PASSING:
            return f"node {node.name!r} ({node.op_type}) lies between the layer and the scores"
    if weighted != 1:
        return f"{weighted} weighted layers lie between the layer and the scores"
    return None if pooled else "nothing averages the feature map"


def module_path(node: ir.Node) -> str | None:
    """Return the PyTorch module path that an exporter recorded for `node`, such as ``layer4.1.conv2``.

    torch's dynamo exporter keeps it in the node's metadata, its TorchScript exporter in the node's name.
    """
    scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes")
    if scopes is not None:
        try:
            parts = ast.literal_eval(scopes)
        except (ValueError, SyntaxError):
            return None
        return parts[-2] or None if isinstance(parts, list) and len(parts) > 1 else None
    if not (node.name or "").startswith("/"):
        return None
    found: list[str] = []
    for part in (node.name or "").split("/")[1:-1]:
        # A Sequential's children repeat its name: /layer4/layer4.0/downsample/downsample.1.
        if found and part.startswith(found[-1] + "."):
            found.pop()
        found.append(part)
    return ".".join(found) or None


def is_map(value: ir.Value) -> bool:
    """Whether `value` is floating point and shaped [N,C,h,w] with h*w > 1, as far as the graph says."""
    return (
        _is_float(value) and value.shape is not None and len(value.shape) == 4 and dims(value)[2:] != [1, 1]
    )


def _named(model: ir.Model, name: str) -> ir.Value | None:
    """Look `name` up as a value, as a node, as a module path, as the module that owns a node's weights."""
    for value in model.graph.inputs:
        if value.name == name:
            return value
    nodes = list(model.graph)
    for node in nodes:
        for value in node.outputs:
            if value.name == name:
                return value
    for node in nodes:
        if node.name == name:
            return node.outputs[0]
    inside = [n for n in nodes if _is_inside(module_path(n), name)] or [
        n for n in nodes if name in _weight_owners(n)
    ]
    maps = [value for node in inside for value in node.outputs if is_map(value)]
    return maps[-1] if maps else inside[-1].outputs[0] if inside else None


def _is_inside(module: str | None, name: str) -> bool:
    return module is not None and (module == name or module.startswith(name + "."))


def _weight_owners(node: ir.Node) -> Iterable[str]:
    """Module paths in the names of the node's weights: an exporter that folds bn1 into conv1 keeps them."""
    names = [v.name or "" for v in node.inputs if v is not None and v.is_initializer()]
    return {name.rpartition(".")[0] for name in names if "." in name}


def _is_weighted(node: ir.Node) -> bool:
    return node.op_type in _WEIGHTED and any(v is not None and is_constant(v) for v in node.inputs[1:])


def _pools_plane(node: ir.Node) -> bool:
    if node.op_type == "GlobalAveragePool":
        return True
    if node.op_type == "ReduceMean":
        return pooled_order(node) is not None
    pooled = node.outputs[0]
    return node.op_type == "AveragePool" and pooled.shape is not None and dims(pooled)[2:] == [1, 1]


def _is_float(value: ir.Value) -> bool:
    return value.dtype is not None and value.dtype.is_floating_point()


def _holds_scores(value: ir.Value) -> bool:
    if not _is_float(value) or value.shape is None:
        return False
    return len(value.shape) == 2 or (len(value.shape) == 4 and dims(value)[2:] == [1, 1])


def _shape_text(value: ir.Value) -> str:
    if value.shape is None:
        return "of unknown shape"
    return "[" + ",".join("?" if d is None else str(d) for d in dims(value)) + "]"
