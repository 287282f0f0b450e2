"""ONNX files: reading one, bringing it into the form that everything behind it expects, writing one."""

import contextlib
import logging
import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Set
from pathlib import Path
from typing import Any

import google.protobuf.message
import onnx
import onnx_ir as ir
from onnx_ir.passes.common import InlinePass, LiftSubgraphInitializersToMainGraphPass, NameFixPass

from onnxcam import ceiled, contrib
from onnxcam.errors import OnnxcamError
from onnxcam.sizes import SMALL, settle

OLDEST_OPSET = 18
"""Older models are converted to this opset, the oldest that the gradient rules know."""

_ONE_FILE = 2**31 - 2**26
"""Bytes of weights that surely fit one ONNX file, which protobuf limits to 2 GiB."""


def load(path: "str | os.PathLike[str]") -> ir.Model:
    """Read a model file; weights kept in other files stay there until they are needed.

    Raises:
        OnnxcamError: the file or its weights cannot be read, or the weights lie outside its folder.
    """
    path = Path(path)
    if path.is_dir():
        raise OnnxcamError(f"{path} is a folder; give an .onnx file")
    try:
        with path.open("rb") as file:
            if not file.read(1):
                raise OnnxcamError(f"{path} is empty")
        proto = onnx.load(path, format="protobuf", load_external_data=False)
    except FileNotFoundError:
        raise OnnxcamError(f"{path} does not exist") from None
    except OSError as error:
        raise OnnxcamError(f"{path} cannot be read: {error.strerror or error}") from None
    except google.protobuf.message.DecodeError:
        raise OnnxcamError(f"{path} is not an ONNX file, or it is cut short") from None
    if not proto.HasField("graph") or not proto.opset_import:
        raise OnnxcamError(f"{path} is not an ONNX file, or it is cut short")
    outside: dict[str, Path] = {}
    for tensor, of_graph in _tensors(proto):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            source, offset, size = _external_data(tensor, path)
            # The others onnx's tools or onnx_ir would miss: only large weights of the main graph stay there.
            if of_graph and math.prod(tensor.dims) > SMALL:
                outside[tensor.name] = source.parent
                for entry in tensor.external_data:
                    entry.value = source.name if entry.key == "location" else entry.value
                continue
            with source.open("rb") as weights:
                weights.seek(offset)
                tensor.raw_data = weights.read(size)
            tensor.ClearField("data_location")
            del tensor.external_data[:]
    try:
        model = from_proto(proto)
    except OnnxcamError as error:
        raise OnnxcamError(f"{path}: {error}") from error
    for name, folder in outside.items():
        weight = model.graph.initializers[name].const_value
        assert isinstance(weight, ir.ExternalTensor)
        weight.base_dir = folder
    return model


def from_proto(proto: onnx.ModelProto) -> ir.Model:
    """Read a model that is in memory.

    Raises:
        OnnxcamError: it is damaged.
    """
    logger = logging.getLogger("onnx_ir")
    level = logger.level
    logger.setLevel(logging.ERROR)  # what it warns of, `normalise` makes an error
    try:
        return ir.from_proto(proto)
    except Exception as error:  # the reader names no exceptions of its own
        raise OnnxcamError(f"the model is not valid: {_first_line(error)}") from error
    finally:
        logger.setLevel(level)


def normalise(model: ir.Model) -> ir.Model:
    """Check the model, inline its functions, bring it to opset 18 or newer and infer all types and shapes.

    Weights of subgraphs become weights of the main graph, which all other graphs can read. Shape arithmetic
    that comes to constants is worked out and noted on the values (``const_value``); the nodes stay as they
    are.

    Args:
        model: changed in place.

    Returns:
        The model, which is another object if it had to be converted.

    Raises:
        OnnxcamError: the model breaks a rule of ONNX, or onnx cannot convert or type it.
    """
    imports = model.graph.opset_imports
    if "ai.onnx" in imports:
        imports[""] = imports.pop("ai.onnx")
    opset, newest = imports.get("", 0), onnx.defs.onnx_opset_version()
    if not 1 <= opset <= newest:
        raise OnnxcamError(
            f"the model is of opset {opset}; the installed onnx {onnx.__version__} knows 1 to {newest}"
        )
    contrib.refuse_layouts(model)
    _run_checker(model, "the model is not valid")
    if model.ir_version < 4:
        # Then every weight had to be listed as an input; that is no choice of the author's.
        model.graph.inputs[:] = [value for value in model.graph.inputs if not value.is_initializer()]
        model.ir_version = 4
    _flatten(model)
    if opset < OLDEST_OPSET:
        model = _convert(model, OLDEST_OPSET)
    _infer_shapes(model)
    _name_nodes(model.graph)
    settle(model.graph)
    return model


def check(model: ir.Model) -> None:
    """Run onnx's full check, which infers the shapes of all values again.

    Raises:
        OnnxcamError: the model breaks a rule of ONNX.
    """
    _run_checker(model, "the explained model is not valid", full_check=True)


def save(model: ir.Model, path: "str | os.PathLike[str]") -> None:
    """Write the model so that `path` appears whole or not at all.

    Weights go to ``<path>.data`` beside it if they came from such a file or exceed what one ONNX file holds.

    Raises:
        OnnxcamError: `path` cannot be written, or would replace a file that the model is read from.
    """
    path = Path(path)
    if path.is_dir():
        raise OnnxcamError(f"{path} is a folder; give the name of the file to write")
    tensors = [value.const_value for value in model.graph.initializers.values()]
    sources = {Path(t.path).resolve() for t in tensors if isinstance(t, ir.ExternalTensor)}
    external = bool(sources) or sum(t.nbytes for t in tensors if t is not None) > _ONE_FILE
    data = path.with_name(path.name + ".data")
    for file in (path, data) if external else (path,):
        if file.resolve() in sources:
            raise OnnxcamError(
                f"{file} holds the weights of the model being read; choose another output name"
            )
    try:
        with tempfile.TemporaryDirectory(prefix=".onnxcam-", dir=path.parent) as folder:
            whole = Path(folder) / path.name
            ir.save(model, whole, format="protobuf", external_data=data.name if external else None)
            if external:
                whole.with_name(data.name).replace(data)
            try:
                whole.replace(path)
            except OSError:
                if external:
                    data.unlink()
                raise
    except OSError as error:
        raise OnnxcamError(f"{path} cannot be written: {error.strerror or error}") from None


def _flatten(model: ir.Model) -> None:
    """Put the model's functions in the place of their calls, and weights of subgraphs into the main graph.

    Raises:
        OnnxcamError: a function cannot be inlined.
    """
    if not model.functions and not any(body.initializers for body in model.graph.subgraphs()):
        return
    for function in model.functions.values():
        if _refers_to_graph(function):
            name = f"{function.domain}.{function.name}"
            raise OnnxcamError(
                f"the model's function {name} cannot be inlined: it takes a graph as an attribute"
            )
        # The checker made sure that the function's operators are the same in the model's opset.
        for domain in function.opset_imports.keys() & model.opset_imports.keys():
            function.opset_imports[domain] = model.opset_imports[domain]
        for i, value in enumerate(function.outputs):
            if value.producer() is None:  # the inliner would rename what is passed in to what is passed out
                function.append(ir.node("Identity", [value]))
                function.outputs[i] = function[-1].outputs[0]
        _name_nodes(function.graph)
    _name_nodes(model.graph)
    try:
        InlinePass()(model)
    except ValueError as error:
        raise OnnxcamError(f"the model's functions cannot be inlined: {_first_line(error)}") from error
    model.functions.clear()  # those that nothing calls
    LiftSubgraphInitializersToMainGraphPass()(model)
    NameFixPass()(model)  # neither looks into all subgraphs for the names that are taken


def _refers_to_graph(graph: "ir.Graph | ir.Function") -> bool:
    graphs = [a for node in graph for a in node.attributes.values() if a.type == ir.AttributeType.GRAPH]
    return any(attribute.is_ref() or _refers_to_graph(attribute.as_graph()) for attribute in graphs)


def _external_data(tensor: onnx.TensorProto, path: Path) -> tuple[Path, int, int]:
    """Return the file of a weight of the model at `path`, the offset there and the size in bytes.

    The file must stand in the model's folder under that name. It may be a link to elsewhere, and so may the
    model: in Hugging Face's cache every file is a link to one that is named by its content.

    Raises:
        OnnxcamError: it does not exist, lies outside the model's own folder or is too short.
    """
    fields = {entry.key: entry.value for entry in tensor.external_data}
    location = fields.get("location", "")
    homes = [path.absolute().parent, path.resolve().parent]
    try:
        named = next((home / location for home in homes if (home / location).exists()), homes[0] / location)
        folder, file = named.parent.resolve(), named.resolve()
        offset, length = int(fields.get("offset") or 0), int(fields.get("length") or 0)
        size = -(-math.prod(tensor.dims) * ir.DataType(tensor.data_type).bitwidth // 8)
    except (ValueError, TypeError) as error:
        raise OnnxcamError(f"{path}: the weights {tensor.name!r} are damaged: {_first_line(error)}") from None
    strays = not location or ".." in Path(location).parts or Path(location).is_absolute()
    if strays or not any(folder.is_relative_to(home.resolve()) for home in homes):
        raise OnnxcamError(
            f"{path}: the weights {tensor.name!r} point to {location!r}, outside the model's folder"
        )
    if not file.is_file():
        raise OnnxcamError(f"{path}: the file with its weights, {location}, is not beside it")
    if not os.access(file, os.R_OK):
        raise OnnxcamError(f"{path}: the file with its weights, {location}, cannot be read: no permission")
    if file.stat().st_nlink > 1:
        raise OnnxcamError(
            f"{path}: the file with its weights, {location}, is a hard link, which onnx refuses; copy it"
        )
    if offset < 0 or (length and length != size):
        raise OnnxcamError(f"{path}: the weights {tensor.name!r} are damaged: {length} bytes at {offset}")
    if file.stat().st_size < offset + size:
        raise OnnxcamError(f"{path}: the file with its weights, {location}, is cut short")
    return file, offset, size


def _tensors(proto: onnx.ModelProto) -> Iterator[tuple[onnx.TensorProto, bool]]:
    """Iterate over all tensors, and say of each whether it is a weight of the main graph."""
    yield from ((tensor, True) for tensor in proto.graph.initializer)
    nodes = [*proto.graph.node, *(node for function in proto.functions for node in function.node)]
    while nodes:
        for attribute in nodes.pop().attribute:
            graphs = [*attribute.graphs, attribute.g]
            weights = [tensor for graph in graphs for tensor in graph.initializer]
            yield from ((tensor, False) for tensor in [*attribute.tensors, attribute.t, *weights])
            for graph in graphs:
                nodes.extend(graph.node)


def _run_checker(model: ir.Model, complaint: str, **options: Any) -> None:
    try:
        with _lightened(model) as proto:
            onnx.checker.check_model(proto, **options)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, ir.serde.SerdeError) as error:
        raise OnnxcamError(f"{complaint}: {_first_line(error)}") from error


@contextlib.contextmanager
def _lightened(model: ir.Model) -> Iterator[onnx.ModelProto]:
    """Give onnx's own tools the model with its large weights turned into inputs.

    Operators of onnxruntime that stand in ONNX's domain are in onnxruntime's there.
    """
    given = list(model.graph.inputs)
    weights = list(model.graph.initializers.values())
    for value in weights:
        tensor = value.const_value
        assert tensor is not None
        if value not in given:
            value.shape, value.dtype = tensor.shape, tensor.dtype  # type: ignore[assignment]
        if tensor.size > SMALL:
            del model.graph.initializers[value.name]  # type: ignore[arg-type]
            if value not in given:
                model.graph.inputs.append(value)
    try:
        proto = ir.to_proto(model)
        contrib.move_out(proto)
        yield proto
    finally:
        model.graph.inputs[:] = given
        model.graph.initializers.clear()
        for value in weights:
            model.graph.register_initializer(value)


def _convert(model: ir.Model, opset: int) -> ir.Model:
    """Convert to `opset` with onnx's own converter."""
    with _lightened(model) as proto:
        try:
            converted = onnx.version_converter.convert_version(proto, opset)
        except Exception as error:  # the converter names no exceptions of its own
            raise OnnxcamError(
                f"onnx cannot convert the model from opset {model.graph.opset_imports.get('', 1)} "
                f"to {opset}: {_first_line(error).rpartition('failed: ')[2]}"
            ) from error
    contrib.move_back(converted)
    converted.ir_version = max(model.ir_version, 8)
    del converted.metadata_props[:]
    converted.metadata_props.extend(proto.metadata_props)
    result = ir.from_proto(converted)
    inputs = {value.name for value in model.graph.inputs}
    for value in list(result.graph.inputs):
        weight = model.graph.initializers.get(value.name or "")
        if weight is not None and not value.is_initializer():
            value.const_value = weight.const_value
            result.graph.register_initializer(value)
        if value.name not in inputs:
            result.graph.inputs.remove(value)
    if model.graph.opset_imports[""] < 11:
        _restore_resizing(result.graph.all_nodes())
    _restore_notes(model.graph, result.graph)
    return result


def _restore_notes(before: ir.Graph, after: ir.Graph) -> None:
    """Give nodes that were converted their names and notes back, and values the types that the author stated.

    The converter drops what exporters note on nodes, such as module paths, and some of their names. It
    takes the type of one branch of an If for that of both.
    """
    makers, named = _makers(before), {node.name for node in after}
    stated = {name: value for node in before for name, value in _outputs(node).items()}
    for node in after:
        old = _any_of(makers, _outputs(node))
        if old is not None:
            node.metadata_props.update(old.metadata_props)
            if old.name not in named:
                node.name = old.name
            for name, attribute in node.attributes.items():
                if attribute.type == ir.AttributeType.GRAPH and name in old.attributes:
                    _restore_notes(old.attributes[name].as_graph(), attribute.as_graph())
        for name, value in _outputs(node).items():
            known = stated.get(name)
            value.type, value.shape = (known.type, known.shape) if known is not None else (None, None)


def _outputs(node: ir.Node) -> dict[str, ir.Value]:
    return {value.name: value for value in node.outputs if value.name}


def _makers(graph: ir.Graph) -> dict[str, ir.Node]:
    """Return the nodes of `graph` by the names of what they compute."""
    return {name: node for node in graph for name in _outputs(node)}


def _any_of(makers: Mapping[str, ir.Node], names: Iterable[str]) -> ir.Node | None:
    return next((makers[name] for name in names if name in makers), None)


def _restore_resizing(nodes: Iterable[ir.Node]) -> None:
    """Give Resize what Upsample and Resize did before opset 11; the converter leaves the new default."""
    for node in nodes:
        if node.op_type == "Resize":
            scales = ir.convenience.get_const_tensor(node.inputs[2]) if node.inputs[2] is not None else None
            shrinks = scales is not None and scales.numpy().min() < 1
            node.attributes.add(ir.AttrString("coordinate_transformation_mode", "asymmetric"))
            node.attributes.add(ir.AttrString("nearest_mode", "ceil" if shrinks else "floor"))


def _infer_shapes(model: ir.Model) -> None:
    """Write onnx's inferred types and shapes onto the values of the model."""
    if model.graph.opset_imports[""] < ceiled.CORRECTED and any(map(ceiled.is_ceiled, model.graph)):
        while ceiled.restate(model.graph, _known_shapes(model)):
            pass
    try:
        inferred = _inferred(model, check_type=True, strict_mode=True)
    except onnx.shape_inference.InferenceError as error:
        raise OnnxcamError(f"the model's shapes do not fit together: {_first_line(error)}") from error
    _take_types(model.graph, inferred, {v for v in model.graph.outputs if v.shape is not None})


def _take_types(graph: ir.Graph, proto: onnx.GraphProto, stated: Set[ir.Value]) -> None:
    """Write the types and shapes in `proto` onto the values of `graph` that are not in `stated`."""
    makers = _makers(graph)
    for info in [*proto.value_info, *proto.output]:
        maker = makers.get(info.name)
        value = None if maker is None else _outputs(maker)[info.name]
        if value is not None and value not in stated:
            value.type = ir.serde.deserialize_type_proto_for_type(info.type)
            value.shape = ir.serde.deserialize_type_proto_for_shape(info.type)
    for node in proto.node:
        maker = _any_of(makers, node.output)
        for attribute in node.attribute:
            if maker is not None and attribute.HasField("g"):
                _take_types(maker.attributes[attribute.name].as_graph(), attribute.g, stated)


def _known_shapes(model: ir.Model) -> dict[str, list[int | None]]:
    """Infer the shapes of all values up to where they contradict each other."""
    inferred = _inferred(model)
    return {
        info.name: [d.dim_value if d.HasField("dim_value") else None for d in info.type.tensor_type.shape.dim]
        for info in [*inferred.input, *inferred.value_info, *inferred.output]
    }


def _inferred(model: ir.Model, **strictness: bool) -> onnx.GraphProto:
    with _lightened(model) as proto:
        contrib.stand_in(proto.graph)
        return onnx.shape_inference.infer_shapes(proto, data_prop=True, **strictness).graph


def _name_nodes(graph: ir.Graph) -> None:
    """Give nodes that have no name one, so that messages and added nodes can refer to them."""
    taken = {node.name for node in graph.all_nodes()}
    for each in (graph, *graph.subgraphs()):
        for index, node in enumerate(each):
            if not node.name:
                name = f"{node.op_type}_{index}"
                while name in taken:
                    name += "_"
                taken.add(name)
                node.name = name


def _first_line(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
