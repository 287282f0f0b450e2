"""Gradients of any ONNX model as ONNX, without maps or classes."""

import os
from collections.abc import Sequence

import onnx
import onnx_ir as ir
from onnx_ir import Value

from onnxcam import onnxfile, quantised
from onnxcam.attaching import prepared
from onnxcam.backward import gradients
from onnxcam.emit import Emitter, all_values
from onnxcam.errors import OnnxcamError, suggest
from onnxcam.simplify import simplify
from onnxcam.subgraphs import refuse_inner
from onnxcam.vjp import PORTABLE, under

PREFIX = "gradient"


def gradient(
    model: "str | os.PathLike[str] | onnx.ModelProto | ir.Model",
    outputs: str | Sequence[str],
    wrt: str | Sequence[str],
    path: "str | os.PathLike[str] | None" = None,
    *,
    portable: bool = False,
) -> ir.Model:
    """Add the gradients of a model's outputs with respect to any of its floating-point values.

    The result has one more input ``<output>_seed`` for each of `outputs`, of the output's shape and dtype:
    what the gradient of that output is multiplied with. It has one more output ``<value>_gradient`` for
    each of `wrt`, of the value's shape and dtype: the gradient of the sum of all ``seed * output``.

    Args:
        model: an ONNX file, or a model in memory, which stays as it is.
        outputs: names of model outputs.
        wrt: names of floating-point values: inputs, or what any node computes.
        path: where to write the result; its folder must exist. None: only return it.
        portable: write the gradients in the form that all runtimes of ``docs/runtimes.md`` compute alike.

    Returns:
        The model with gradients.

    Raises:
        OnnxcamError: the model cannot be read, a name is unknown or not of floating point, no output
            depends on a value, or an operator on the way has no gradient.
    """
    own = prepared(model)
    graph = own.graph
    values = {value.name or "": value for value in all_values(graph)}
    visible = {name: value for name, value in values.items() if value.graph is graph}
    for name in _names(wrt):
        if name not in visible:
            refuse_inner(graph, "value", name)
    sources = _named("value", _names(wrt), visible)
    results = _named("output", _names(outputs), {value.name or "": value for value in graph.outputs})
    op = Emitter(graph, graph.opset_imports[""], PREFIX, portable)
    rules = under(PORTABLE if portable else None)
    seeds = {}
    for result in results:
        seed = Value(name=_free(f"{result.name}_seed", values), shape=result.shape, type=result.type)
        graph.inputs.append(seed)
        seeds[quantised.standing_for(result)] = seed
    inner = [quantised.standing_for(source) for source in sources]
    found = []
    for source, part in zip(sources, gradients(op, seeds, inner, rules), strict=True):
        if part is None:
            raise OnnxcamError(f"no gradient reaches {source.name!r} from {', '.join(_names(outputs))}")
        found.append(op.Identity(part))
    simplify(op)
    quantised.fold(op)
    for source, value in zip(sources, found, strict=True):
        value.name, value.shape = _free(f"{source.name}_gradient", values), source.shape
        graph.outputs.append(value)
    op.remove_dead(found)
    own.ir_version = max(own.ir_version, 8)
    onnxfile.check(own)
    if path is not None:
        onnxfile.save(own, path)
    return own


def _names(given: str | Sequence[str]) -> list[str]:
    return [given] if isinstance(given, str) else list(given)


def _named(what: str, names: Sequence[str], values: dict[str, Value]) -> list[Value]:
    if not names:
        raise OnnxcamError(f"no {what} is named")
    for name in names:
        if name not in values:
            raise OnnxcamError(f"the model has no {what} {name!r}{suggest(name, values)}")
        dtype = values[name].dtype
        if dtype is None:
            raise OnnxcamError(
                f"the type of {what} {name!r} is unknown; declare it in the model (its value_info)"
            )
        if not dtype.is_floating_point():
            raise OnnxcamError(f"{what} {name!r} is not of floating point and has no gradient")
    return [values[name] for name in dict.fromkeys(names)]


def _free(name: str, values: dict[str, Value]) -> str:
    if name in values:
        raise OnnxcamError(f"the model has a value called {name!r} already; rename it there")
    return name
