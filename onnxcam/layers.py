"""Finding things in a classifier: its picture, its scores, and the activations that can be explained."""

import ast
import dataclasses
from collections.abc import Callable, Iterable, Sequence, Set

import numpy as np
import onnx_ir as ir

from onnxcam import quantised
from onnxcam.backward import influenced, path
from onnxcam.errors import OnnxcamError, suggest
from onnxcam.grid import PLANES, TOKENS, Grid, bottlenecks, grids, live_tokens, pooled_order
from onnxcam.subgraphs import reads, refuse_inner, within
from onnxcam.vjp.shapes import dims, is_constant
from onnxcam.vjp.variants import rectifies

_WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul", "Einsum", "FusedConv", "FusedGemm", "FusedMatMul")
_REGROUPING = ("Identity", "Cast", "Flatten", "Reshape", "Squeeze", "Unsqueeze", "Transpose")
NORMALISATIONS = ("LayerNormalization", "RMSNormalization", "SkipLayerNormalization")
"""Operators that make the input of a transformer's block."""

_PASSING = (*_REGROUPING, "Dropout", "QuantizeLinear", "DequantizeLinear")
_PROBABILITY = ("Softmax", "Sigmoid", "HardSigmoid")

_HIDING = ("LSTM", "GRU", "RNN", "Attention")
"""Operators of ai.onnx that add a bias somewhere inside what they compute."""


@dataclasses.dataclass(frozen=True)
class Layer:
    """An activation that a map can be made from.

    Attributes:
        value: the ONNX value; of one that is stored as integers, the floating-point view.
        name: its name in the model.
        operator: name of the operator that computes it.
        node: name of the node that computes it.
        module: PyTorch module path, where the exporter recorded it, otherwise None.
        grid: how the positions of the picture lie in it.
        unreached: whether the scores read only other tokens after it, so that its gradient is zero.
    """

    value: ir.Value
    name: str
    operator: str
    node: str
    module: str | None
    grid: Grid
    unreached: bool = False

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

    @property
    def dense(self) -> bool:
        """Whether there are scores for every place, [N,classes,H,W]."""
        return len(dims(self.output)) == 4 and dims(self.output)[2:] != [1, 1]


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


def scores(model: ir.Model, name: str | None = None, any_shape: bool = False) -> Scores:
    """Find the class scores: the output `name`, or the only output shaped [N,classes] or [N,classes,1,1].

    Args:
        model: the classifier.
        name: of an output, which may also be [N,classes,H,W].
        any_shape: whether it may have any shape; then it is the only floating-point output by default.

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
        if not _is_float(fitting[0]) or fitting[0].shape is None:
            raise OnnxcamError(
                f"output {name!r} is no floating-point value of known rank, so it has no gradient"
            )
        if not any_shape and not _holds_scores(fitting[0]) and len(fitting[0].shape) != 4:
            raise OnnxcamError(
                f"output {name!r} is {_shape_text(fitting[0])}; class scores are [N,classes], "
                "[N,classes,1,1] or [N,classes,H,W]. "
                "A weighted sum of any output's values can be explained: --target seed"
            )
    else:
        fitting = [value for value in outputs.values() if _holds_scores(value)]
        if any_shape and not fitting:
            fitting = [value for value in outputs.values() if _is_float(value) and value.shape is not None]
    if len(fitting) != 1:
        listed = ", ".join(f"{n!r} {_shape_text(v)}" for n, v in outputs.items())
        reason = "several outputs that could be class scores" if fitting else "no output of class scores"
        hint = "; choose one with --scores" if fitting else ""
        raise OnnxcamError(f"the model has {reason} [N,classes]{hint}. Its outputs: {listed}")
    output = fitting[0]
    logits = value = quantised.standing_for(output)
    regrouping: list[ir.Node] = []
    while (node := value.producer()) is not None and node.inputs and node.inputs[0] is not None:
        stored = quantised.before_storing(value)
        if stored is not None:
            # A score that is cut to the range of its type should still be explained.
            value = stored
            if not regrouping:
                logits = value
            continue
        if node.op_type in (*_PROBABILITY, "LogSoftmax"):
            are = "probabilities" if node.op_type in _PROBABILITY else "logits"
            before = quantised.before_storing(node.inputs[0]) or node.inputs[0]
            return Scores(output, before, are, tuple(reversed(regrouping)))
        if node.op_type not in _REGROUPING:
            break
        regrouping.append(node)
        value = node.inputs[0]
    return Scores(output, logits, "logits")


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
        if value in found and value is not logits and quantised.origin(value) is not None
    ]


def default(layers: list[Layer], source: ir.Value, logits: ir.Value) -> Layer:
    """Return the last feature map before the head that the gradient reaches.

    A weighted operator must still follow it: where the last convolution is the classifier itself (one
    channel for each class, then pooling), its input is chosen, not the class maps it makes. Of tokens
    and channels-last maps only those count that a normalisation made or that everything flows through,
    not the inner values of an attention or a perceptron. A map is taken before it is only transposed,
    where it has the name of what computed it.

    Raises:
        OnnxcamError: there is no such activation.
    """
    nodes = path(logits, source)
    through, weighted = set(bottlenecks(nodes, logits)), _before_weights(nodes)
    known = {layer.value for layer in layers}
    for layer in reversed(layers):
        if _turns(layer, known):
            continue
        on_trunk = layer.grid.order == PLANES or layer.value in through or layer.operator in NORMALISATIONS
        if on_trunk and not layer.unreached and layer.value in weighted:
            return layer
    raise OnnxcamError(
        "the model has no feature map with more than one position before its scores; "
        "name a layer with --layer"
    )


def _before_weights(nodes: Sequence[ir.Node]) -> set[ir.Value]:
    """Return the values that a weighted operator follows, at once or later."""
    found: set[ir.Value] = set()
    for node in reversed(nodes):
        if any(map(_is_weighted, within(node))) or not found.isdisjoint(node.outputs):
            found.update(reads(node))
    return found


def _turns(layer: Layer, known: set[ir.Value]) -> bool:
    """Whether the layer is one of the values `known` with its axes in another order."""
    node = (quantised.origin(layer.value) or layer.value).producer()
    return node is not None and layer.operator == "Transpose" and node.inputs[0] in known


def find(model: ir.Model, name: str, source: ir.Value, logits: ir.Value) -> Layer:
    """Find the layer called `name` that a gradient reaches; see `locate`.

    Raises:
        OnnxcamError: there is none, or no gradient reaches it.
    """
    layer = locate(model, name, source, logits)
    if layer.unreached:
        earlier = default(explainable(source, logits), source, logits)
        raise OnnxcamError(
            f"no gradient reaches the picture's tokens at layer {name!r}: only the others are read after it; "
            f"choose an earlier layer, such as {earlier.name!r}"
        )
    return layer


def locate(model: ir.Model, name: str, source: ir.Value, logits: ir.Value) -> Layer:
    """Find the layer called `name`: a value, a node or, standing for its output, a PyTorch module path.

    Raises:
        OnnxcamError: there is no such layer, it is a module of several outputs, it comes after the scores, it
            does not influence them, or it has no plane of positions.
    """
    value = _named(model, name, source)
    if value is None:
        refuse_inner(model.graph, "layer", name)
        nodes = quantised.own_nodes(model.graph)
        known = [n.name for n in nodes] + [v.name for n in nodes for v in n.outputs]
        modules = [m for n in nodes if (m := module_path(n)) is not None]
        hint = suggest(name, [k for k in [*modules, *known] if k])
        raise OnnxcamError(f"the model has no layer {name!r}{hint}; 'onnxcam layers' lists those it has")
    if value is not source:
        value = quantised.view(value)
    if value is not source and not path(value, source):
        raise OnnxcamError(f"layer {name!r} does not depend on the picture")
    if value is logits or not path(logits, value):
        if value is logits or path(value, logits):
            raise OnnxcamError(f"layer {name!r} comes after the scores; choose one before them")
        raise OnnxcamError(f"layer {name!r} does not influence the scores")
    if value.dtype is not None and not _is_float(value):
        raise OnnxcamError(
            f"layer {name!r} holds {str(value.dtype).lower()} numbers, which nothing reads as an activation; "
            "choose another; 'onnxcam layers' lists those it has"
        )
    layer = next((layer for layer in explainable(source, logits) if layer.value is value), None)
    if layer is None and _is_map(value, source):
        order = layout(source) if value is source else PLANES
        at = 2 if order == PLANES else 1
        layer = _layer(value, Grid(order, dims(value)[at], dims(value)[at + 1]), None)
    if layer is None:
        raise OnnxcamError(
            f"layer {name!r} is {_shape_text(value)}; a map needs an activation [N,C,h,w] or [N,h,w,C] with "
            "h*w > 1, or tokens [N,T,C] that cover the picture"
        )
    return layer


def _layer(value: ir.Value, grid: Grid, live: np.ndarray | None) -> Layer:
    shown = quantised.origin(value) or value
    node = shown.producer()
    return Layer(
        value,
        shown.name or "",
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


def _why_no_linear_head(source: ir.Value, logits: ir.Value) -> str | None:
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


def _why_no_rectifier(source: ir.Value, scores: ir.Value) -> str | None:
    """Say in what way no rectifier lies between, or one that cannot have another rule."""
    nodes = path(scores, source)
    for node in nodes:
        if node.domain and "activation" in node.attributes:
            return f"node {node.name!r} ({node.op_type}) has its activation inside"
    return None if any(rectifies(node) for node in nodes) else "there is none"


def _why_hidden_biases(source: ir.Value, scores: ir.Value) -> str | None:
    """Say which node adds a bias that no constant of the graph shows."""
    for node in path(scores, source):
        if node.domain or node.op_type in _HIDING:
            return f"node {node.name!r} ({node.op_type}) keeps one inside"
    return None


def attention_maps(source: ir.Value, scores: ir.Value) -> list[ir.Value]:
    """Find the attention over the tokens of `source` [N,T,C]: softmaxes [N,heads,queries,T] times values."""
    images, tokens = dims(source)[0], dims(source)[1]
    found = []
    for node in path(scores, source):
        y = node.outputs[0]
        if node.op_type != "Softmax" or y.shape is None or len(y.shape) != 4:
            continue
        last = node.attributes["axis"].as_int() in (-1, 3) if "axis" in node.attributes else True
        if last and dims(y)[0] == images and dims(y)[3] == tokens and _weighs(y):
            found.append(y)
    return found


def block_tokens(attention: Sequence[ir.Value], scores: ir.Value) -> list[ir.Value]:
    """Find the tokens [N,T,C] that each attention's block makes of its sum with what came in.

    They are the last sum of two activations through which all goes on its way from the attention to the next
    one, or to the scores.

    Raises:
        OnnxcamError: a block has no such sum.
    """
    found = []
    for softmax, following in zip(attention, [*attention[1:], scores], strict=True):
        ways = list(bottlenecks(path(following, softmax), following))
        sums = [value for value in ways if _adds(value) and dims(value)[1] == dims(softmax)[3]]
        if not sums:
            raise OnnxcamError(f"nothing is added to the tokens after the attention {softmax.name!r}")
        found.append(sums[-1])
    return found


def _adds(value: ir.Value) -> bool:
    """Whether `value` is a sum of two activations with three axes."""
    node = value.producer()
    if node is None or node.op_type != "Add" or node.domain or value.shape is None or len(value.shape) != 3:
        return False
    return not any(x is None or is_constant(x) for x in node.inputs)


def _weighs(value: ir.Value) -> bool:
    """Whether a matrix product sums something with the weights `value`."""
    for node, place in value.uses():
        if node.op_type == "MatMul" and place == 0:
            return True
        if node.op_type in ("Cast", "Dropout", "Identity") and _weighs(node.outputs[0]):
            return True
    return False


def _why_no_attention(source: ir.Value, scores: ir.Value) -> str | None:
    """Say in what way the tokens of `source` take part in no attention whose weights the graph shows."""
    for node in path(scores, source):
        if "Attention" in node.op_type:
            return (
                f"node {node.name!r} ({node.op_type}) has its weights inside; export it as single operators"
            )
    if len(dims(source)) != 3 or not isinstance(dims(source)[1], int):
        return f"layer {source.name!r} is {_shape_text(source)}"
    if not attention_maps(source, scores):
        return f"there is none between layer {source.name!r} and the scores"
    return None


def _first_tokens(layers: list[Layer], source: ir.Value, logits: ir.Value) -> Layer:
    """Return the first tokens whose attention the scores depend on; without any, the last feature map."""
    tokens = (layer for layer in layers if layer.grid.order == TOKENS)
    first = next((layer for layer in tokens if attention_maps(layer.value, logits)), None)
    return default(layers, source, logits) if first is None else first


@dataclasses.dataclass(frozen=True)
class Requirement:
    """What a method needs between the place that it looks at and the scores.

    Attributes:
        needs: in words.
        missing: ``missing(source, scores)`` says in what way a model lacks it, or None.
        default: ``default(layers, picture, logits)`` chooses the layer if nobody names one.
    """

    needs: str
    missing: Callable[[ir.Value, ir.Value], str | None]
    default: Callable[[list[Layer], ir.Value, ir.Value], Layer] = default


REQUIREMENTS = {
    "linear head": Requirement(
        "a head that averages the feature map and weighs its channels", _why_no_linear_head
    ),
    "rectifier": Requirement("a rectifier (Relu, or Clip from 0) in the model", _why_no_rectifier),
    "biases": Requirement("a model whose biases are operands of their own", _why_hidden_biases),
    "attention": Requirement(
        "attention over the tokens of a layer [N,T,C]", _why_no_attention, _first_tokens
    ),
}
"""What a method may need, by name."""


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


def _is_map(value: ir.Value, source: ir.Value) -> bool:
    """Whether `value` is floating point and shaped [N,C,h,w] with h*w > 1, as far as the graph says.

    Where N is a number, it must be that of the picture `source`; others count tokens or windows.
    """
    if not _is_float(value) or value.shape is None or len(value.shape) != 4 or dims(value)[2:] == [1, 1]:
        return False
    rows = dims(value)[0]
    return not isinstance(rows, int) or rows in (1, dims(source)[0])


def _named(model: ir.Model, name: str, source: ir.Value) -> ir.Value | None:
    """Look `name` up as a value, as a node, as a module path, as the module that owns a node's weights.

    Raises:
        OnnxcamError: it is a module of several outputs.
    """
    for value in model.graph.inputs:
        if value.name == name:
            return value
    nodes = quantised.own_nodes(model.graph)
    for node in nodes:
        for value in node.outputs:
            if value.name == name:
                return value
    for node in nodes:
        if node.name == name:
            return node.outputs[0]
    inside = [n for n in nodes if _is_inside(n, name)] or [n for n in nodes if name in _weight_owners(n)]
    return _output(name, inside, influenced(nodes, [source])) if inside else None


def _output(module: str, inside: Sequence[ir.Node], live: Set[ir.Value]) -> ir.Value:
    """Return what a module computes last of all that is read outside of it and depends on the picture.

    A module that runs several times, such as the only Relu of a residual block, makes several such values.

    Args:
        module: its path.
        inside: its nodes, in the order they run.
        live: the values that depend on the picture.

    Raises:
        OnnxcamError: the last is not computed from all others, which may then be outputs as well.
    """
    made = [value for node in inside for value in node.outputs]
    outputs = [
        value
        for value in made
        if value in live
        and (value.is_graph_output() or not all(_is_inside(node, module) for node, _ in value.uses()))
    ]
    if not outputs:
        return made[-1]
    *earlier, last = outputs
    apart = [value.name for value in earlier if not path(last, value)]
    if apart:
        names = ", ".join(repr(name) for name in [*apart, last.name])
        raise OnnxcamError(f"the module {module!r} gives several values; name one of them: {names}")
    return last


def _is_inside(node: ir.Node, module: str) -> bool:
    """Whether the node is one of the module at that path, or of a module in it."""
    own = module_path(node)
    return own is not None and (own == module or own.startswith(module + "."))


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
