"""Derivatives without rules: differences of a model's scores, in float64."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from onnx_ir import Value

from onnxcam.backward import ancestors, path
from onnxcam.emit import Emitter
from onnxcam.errors import OnnxcamError
from onnxcam.grid import Grid
from onnxcam.layers import Scores
from onnxcam.replay import replay
from onnxcam.subgraphs import reads

STEP = 1e-8
"""To both sides, in units of the activation's root mean square.

So short a step leaves nearly every ReLU and maximum on its side, and in float64 still eight digits.
"""

Doubles = NDArray[np.float64]


class Erf(OpRun):
    """erf in the dtype of its input; onnx's own class computes it in float32."""

    def _run(self, x: NDArray[Any]) -> tuple[NDArray[Any]]:
        return (np.vectorize(math.erf, otypes=[np.float64])(x).astype(x.dtype),)


class Gelu(OpRun):
    """Gelu by that erf."""

    def _run(self, x: NDArray[Any], approximate: str | None = None) -> tuple[NDArray[Any]]:
        if approximate == "tanh":
            inner = np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
        else:
            inner = np.vectorize(math.erf, otypes=[np.float64])(x * math.sqrt(0.5))
        return ((0.5 * x * (1 + inner)).astype(x.dtype),)


class Tail:
    """What a model computes of an activation, in float64, by ONNX's reference evaluator.

    Attributes:
        reads: names of the values of the model, computed before the activation, that it needs too.
    """

    def __init__(self, model: ir.Model, layer: Value, grid: Grid, found: Scores, after: bool) -> None:
        """Take the nodes behind an activation out of a model.

        Args:
            model: it gets further nodes.
            layer: the activation.
            grid: how its plane lies in it.
            found: the scores that depend on it.
            after: whether the scores after the softmax are explained.

        Raises:
            OnnxcamError: the reference evaluator does not know an operator.
        """
        op = Emitter(model.graph, model.graph.opset_imports[""], "tail")
        planes = Value(name=op.fresh("planes"), type=layer.type)
        model.graph.inputs.append(planes)
        moved = grid.restore(op, planes, layer)
        output, logits = replay(op, [found.output, found.logits], {layer: moved})
        explained = output if after and found.are == "probabilities" else _before(op, found, logits)
        if after and found.are == "logits":
            explained = op.Softmax(explained, axis=1)
        results = list(dict.fromkeys([explained, output]))
        own = set(op.nodes)
        read = dict.fromkeys(v for node in ancestors(results) if node in own for v in reads(node))
        outside = [
            v
            for v in read
            if v.producer() not in own
            and v is not planes
            and v.graph is model.graph
            and not v.is_initializer()
        ]
        graph = ir.convenience.extract(model.graph, [planes, *outside], results)
        _double(graph)
        proto = ir.to_proto(ir.Model(graph, ir_version=model.ir_version))
        self.reads = tuple(v.name or "" for v in outside)
        self._planes = planes.name or ""
        try:
            self._run = ReferenceEvaluator(proto, new_ops=[Erf, Gelu]).run
        except NotImplementedError as error:  # an operator that it does not know
            raise _not_run(error) from error

    def __call__(self, planes: Doubles, given: Mapping[str, NDArray[Any]]) -> tuple[Doubles, Doubles]:
        """Run it.

        Args:
            planes: the activation [N,C,h,w].
            given: the values that it reads, by name, and maybe others.

        Returns:
            The scores that are explained, [N,...], and the model's output.

        Raises:
            OnnxcamError: the reference evaluator cannot.
        """
        feeds: Any = {name: _wide(given[name]) for name in self.reads}
        feeds[self._planes] = planes
        try:
            results: Any = self._run(None, feeds)
        except Exception as error:  # it passes on whatever its operators meet
            raise _not_run(error) from error
        return results[0], results[-1]


def _before(op: Emitter, found: Scores, logits: Value) -> Value:
    """Return scores before the softmax, in the shape of those behind it."""
    if found.logits is found.output:
        return logits
    softmax = found.regrouping[0].inputs[0] if found.regrouping else found.output
    assert softmax is not None
    return replay(op, [found.output], {softmax: logits})[0]


def off_kinks(model: ir.Model, layer: str, values: NDArray[Any]) -> str:
    """Add noise to an activation of a model; return the name of what is then read in its place.

    Values that are equal, such as the zeros that a ReLU leaves, are where a maximum has its kink. The noise
    is large, so that of hundreds of thousands of windows of a pool next to none has two values within `STEP`.

    Args:
        model: changed in place.
        layer: name of the activation.
        values: what it may be, [N,...].
    """
    op = Emitter(model.graph, model.graph.opset_imports[""], "off_kinks")
    value = next(v for node in model.graph for v in node.outputs if v.name == layer)
    noise = np.random.default_rng(4).uniform(-1, 1, [1, *values.shape[1:]])
    size = 0.3 * np.sqrt(np.mean(values.astype(np.float64) ** 2))
    moved: Value = op.Add(value, (size * noise).astype(values.dtype))
    node, producer = moved.producer(), value.producer()
    assert node is not None and producer is not None
    value.replace_all_uses_with(moved)
    node.replace_input_with(0, value)
    model.graph.remove(node)
    model.graph.insert_after(producer, node)
    moved.shape = value.shape
    return moved.name or ""


def slopes(
    tail: Tail,
    at: Doubles,
    given: Mapping[str, NDArray[Any]],
    weights: Doubles,
    directions: Sequence[Doubles],
) -> Doubles:
    """Return the derivatives [N,K,D] of weighted sums of the scores along D directions [N,C,h,w].

    Args:
        tail: the function.
        at: the activation [N,C,h,w].
        given: the other values that it reads.
        weights: of each score in the K sums, [N,K,...].
        directions: of about unit variance.

    Raises:
        OnnxcamError: the reference evaluator cannot run it.
    """
    step = STEP * max(float(np.sqrt(np.mean(at**2))), np.finfo(np.float64).tiny)
    found = []
    for v in directions:
        rise = tail(at + step * v, given)[0] - tail(at - step * v, given)[0]
        flat = rise.reshape(len(rise), -1)
        found.append(np.einsum("nkm,nm->nk", weights.reshape(*weights.shape[:2], -1), flat) / (2 * step))
    return np.stack(found, axis=-1)


def rounds(output: Value, source: Value) -> bool:
    """Whether something between `source` and `output` is rounded to few bits, and so has no derivative."""
    return any(
        "Quantize" in node.op_type or node.op_type.startswith("QLinear") or node.op_type.endswith("Integer")
        for node in path(output, source)
    )


def _not_run(error: Exception) -> OnnxcamError:
    line = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return OnnxcamError(f"ONNX's reference evaluator cannot run what lies behind it: {line}")


def _wide(array: NDArray[Any]) -> NDArray[Any]:
    is_float = ir.DataType.from_numpy(array.dtype).is_floating_point()
    return array.astype(np.float64) if is_float else array


def _double(graph: ir.Graph) -> None:
    """Make all floating-point numbers of a graph float64."""
    for each in (graph, *graph.subgraphs()):
        for value in each.initializers.values():
            assert value.const_value is not None
            if value.const_value.dtype.is_floating_point():
                value.const_value = ir.tensor(_wide(value.const_value.numpy()), name=value.name)
                value.type = ir.TensorType(ir.DataType.DOUBLE)  # clones share their type
        for value in (*each.inputs, *each.outputs, *(v for node in each for v in node.outputs)):
            if value.dtype is not None and value.dtype.is_floating_point():
                value.type = ir.TensorType(ir.DataType.DOUBLE)  # clones share their type
    for node in graph.all_nodes():
        for name, attribute in list(node.attributes.items()):
            if attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype.is_floating_point():
                node.attributes.add(ir.AttrTensor(name, ir.tensor(_wide(attribute.as_tensor().numpy()))))
            elif name in ("to", "dtype") and ir.DataType(attribute.as_int()).is_floating_point():
                node.attributes.add(ir.AttrInt64(name, ir.DataType.DOUBLE))
