"""The reverse walk: from the gradient of a score back to the gradient of one activation."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import onnx_ir as ir

from onnxcam.emit import Emitter
from onnxcam.errors import OnnxcamError
from onnxcam.sizes import sharpen
from onnxcam.subgraphs import branches, emit_if, is_if, reads
from onnxcam.vjp import RULES, Rule
from onnxcam.vjp.shapes import ROWS, dims, reshape_like, zeros_like

_LOOPS = ("Loop", "Scan", "SequenceMap")


def path(output: ir.Value, *sources: ir.Value) -> list[ir.Node]:
    """Return the nodes through which `sources` can influence `output`, in the order they run.

    Only floating-point values carry influence, and quantised ones, which stand for floating-point
    values: a gradient does not pass through indices, shapes or the condition of an If.
    """
    nodes = ancestors([output], stop=sources[0].producer() if len(sources) == 1 else None)
    return _between(nodes, [output], influenced(nodes, sources))


def ancestors(values: Iterable[ir.Value], stop: ir.Node | None = None) -> list[ir.Node]:
    """Return the nodes that compute `values`, in the order they run; none from `stop` on back."""
    found: list[ir.Node] = []
    seen: set[ir.Node] = set()
    stack = [(value.producer(), False) for value in values]
    while stack:
        node, expanded = stack.pop()
        if node is None or node is stop:
            continue
        if expanded:
            found.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack.extend((value.producer(), False) for value in reads(node))
    return found


def influenced(nodes: Iterable[ir.Node], sources: Iterable[ir.Value]) -> set[ir.Value]:
    """Return `sources` and what they influence by way of `nodes`, in the branches of Ifs too."""
    found = set(sources)
    _spread(nodes, found)
    return found


def _spread(nodes: Iterable[ir.Node], found: set[ir.Value]) -> None:
    for node in nodes:
        if found.isdisjoint(reads(node)):
            continue
        if is_if(node):
            for branch in branches(node):
                _spread(branch, found)
            ends = zip(node.outputs, *(branch.outputs for branch in branches(node)), strict=True)
            found.update([value for value, *inner in ends if not found.isdisjoint(inner)])
        else:
            found.update([value for value in node.outputs if _carries(node, value, found)])


def _carries(node: ir.Node, value: ir.Value, depends: set[ir.Value]) -> bool:
    """Whether `value`, an output of `node`, can carry the influence of the values in `depends`."""
    if node.op_type == "DynamicQuantizeLinear":
        return value is node.outputs[0]
    if value.dtype is None or value.dtype.is_floating_point():
        return True
    if value.dtype in (ir.DataType.BOOL, ir.DataType.INT64):
        return False
    return node.op_type == "QuantizeLinear" or any(
        v is not None and v in depends and v.dtype is not None and v.dtype.is_integer() for v in node.inputs
    )


def _between(nodes: Sequence[ir.Node], outputs: Iterable[ir.Value], active: set[ir.Value]) -> list[ir.Node]:
    """Return those of `nodes`, in order, through which values in `active` reach `outputs`."""
    needed = set(outputs)
    found = []
    for node in reversed(nodes):
        if any(value in needed and value in active for value in node.outputs):
            read = reads(node)
            if not active.isdisjoint(read):
                needed.update(read)
                found.append(node)
    return found[::-1]


def gradient(
    op: Emitter,
    output: ir.Value,
    seed: ir.Value,
    source: ir.Value,
    rules: Mapping[tuple[str, str], Rule] = RULES,
) -> ir.Value | None:
    """Emit the gradient of ``sum(seed * output)`` with respect to `source`; see `gradients`."""
    return gradients(op, {output: seed}, [source], rules)[0]


def gradients(
    op: Emitter,
    seeds: Mapping[ir.Value, ir.Value],
    sources: Sequence[ir.Value],
    rules: Mapping[tuple[str, str], Rule] = RULES,
) -> list[ir.Value | None]:
    """Emit the gradients of the sum of all ``seed * output`` with respect to `sources`.

    Args:
        op: where the nodes go.
        seeds: floating-point values, and for each a value of the same shape and dtype.
        sources: floating-point values that they may depend on.
        rules: the rule of each operator.

    Returns:
        For each source a value of its shape and dtype, or None if it influences no output.

    Raises:
        OnnxcamError: an operator on the way has no rule, or one that does not cover the node.
    """
    with op.scope("gradient"):
        return _walk(op, ancestors(seeds), seeds, sources, rules)


def _walk(
    op: Emitter,
    candidates: Sequence[ir.Node],
    seeds: Mapping[ir.Value, ir.Value],
    sources: Sequence[ir.Value],
    rules: Mapping[tuple[str, str], Rule],
) -> list[ir.Value | None]:
    """Emit the gradients of values that `candidates` compute, which lead to them in this order."""
    found = dict(seeds)
    active = influenced(candidates, sources)
    nodes = _between(candidates, seeds, active)
    for node in reversed(nodes):
        arriving = [found.get(value) for value in node.outputs]
        if all(dy is None for dy in arriving):
            continue
        with op.scope(node.name or node.op_type):
            try:
                leaving = _through(op, node, arriving, active, rules)
            except OnnxcamError:
                # Nothing may be known of a value only because an operator before it is unknown.
                for before in sorted(_with_branches(nodes, active), key=lambda n: n.op_type not in _LOOPS):
                    _check_known(before, rules)
                raise
            for value, dx in leaving:
                if value is not None and dx is not None and value in active:
                    _tell_shape(dx, value)
                    _add(op, found, value, dx)
    return [found.get(source) for source in sources]


def _tell_shape(dx: ir.Value, value: ir.Value) -> None:
    """Give the gradient of `value` its shape, which ONNX does not infer where a size is computed."""
    if value.shape is not None and (dx.shape is None or ROWS not in dims(value)):
        sharpen(dx, dims(value))


def _add(op: Emitter, found: dict[ir.Value, ir.Value], value: ir.Value, dx: ir.Value) -> None:
    found[value] = op.Add(found[value], dx) if value in found else dx


def _through(
    op: Emitter,
    node: ir.Node,
    arriving: list[ir.Value | None],
    active: set[ir.Value],
    rules: Mapping[tuple[str, str], Rule],
) -> Iterable[tuple[ir.Value | None, ir.Value | None]]:
    """Return pairs of a value that `node` reads and its gradient."""
    if is_if(node):
        return _through_if(op, node, arriving, active, rules)
    _check_known(node, rules)
    return zip(node.inputs, rules[node.domain, node.op_type](op, node, arriving), strict=True)


def _through_if(
    op: Emitter,
    node: ir.Node,
    arriving: list[ir.Value | None],
    active: set[ir.Value],
    rules: Mapping[tuple[str, str], Rule],
) -> Iterable[tuple[ir.Value, ir.Value]]:
    """Emit an If on the same condition; each of its branches is the gradient of that branch of `node`."""
    captured = [value for value in dict.fromkeys(reads(node)) if value in active]
    bodies, parts = [], []
    for branch in branches(node):
        body = ir.Graph([], [], nodes=[], name=op.fresh("branch"))
        with op.body(body):
            seeds: dict[ir.Value, ir.Value] = {}
            for y, dy in zip(branch.outputs, arriving, strict=True):
                if dy is not None:
                    _add(op, seeds, y, _of_rank(op, dy, y))
            parts.append(_walk(op, list(branch), seeds, captured, rules))
        bodies.append(body)
    reached = [i for i, dxs in enumerate(zip(*parts, strict=True)) if any(dx is not None for dx in dxs)]
    if not reached:
        return []
    for body, dxs in zip(bodies, parts, strict=True):
        with op.body(body):
            for i in reached:
                dx = dxs[i] or zeros_like(op, captured[i])
                own = dx.graph is body and dx not in body.outputs
                body.outputs.append(dx if own else op.Identity(dx))
    values = [captured[i] for i in reached]
    return zip(values, emit_if(op, node, bodies, values), strict=True)


def _of_rank(op: Emitter, dy: ir.Value, y: ir.Value) -> ir.Value:
    """View `dy` as the gradient of a branch's output `y`; the other branch may have other dimensions."""
    if y.shape is None or (dy.shape is not None and len(dy.shape) == len(y.shape)):
        return dy
    return reshape_like(op, dy, y)


def _with_branches(nodes: Iterable[ir.Node], active: set[ir.Value]) -> Iterator[ir.Node]:
    """Iterate over `nodes` and those in their branches through which a gradient passes."""
    for node in nodes:
        yield node
        if is_if(node):
            for branch in branches(node):
                yield from _with_branches(_between(list(branch), branch.outputs, active), active)


def _check_known(node: ir.Node, rules: Mapping[tuple[str, str], Rule]) -> None:
    if is_if(node) or (node.domain, node.op_type) in rules:
        return
    operator, remedy = node.op_type, "replace it; 'onnxcam operators' lists the operators that have a rule"
    if node.domain:
        operator = f"{node.domain}.{node.op_type}"
        remedy = (
            "register a rule in Python: from onnxcam.vjp import vjp, then "
            f"@vjp({node.op_type!r}, domain={node.domain!r}) on a function that help('onnxcam.vjp') describes"
        )
    elif node.op_type in _LOOPS:
        remedy = "export the model with the loop unrolled"
    raise OnnxcamError(
        f"there is no gradient rule for the operator {operator} (node {node.name!r}), through which "
        f"the gradient must pass; choose a layer after it, or {remedy}"
    )
