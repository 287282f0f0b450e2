"""The reverse walk: from the gradient of a score back to the gradient of one activation."""

from collections.abc import Iterable, Mapping, Sequence

import onnx_ir as ir

from onnxcam.emit import Emitter
from onnxcam.errors import OnnxcamError
from onnxcam.vjp import RULES, Rule


def path(output: ir.Value, *sources: ir.Value) -> list[ir.Node]:
    """Return the nodes through which `sources` can influence `output`, in the order they run.

    Only floating-point values carry influence, and quantised ones, which stand for floating-point
    values: a gradient does not pass through indices or shapes.
    """
    depends = set(sources)
    on_path = []
    for node in ancestors([output], stop=sources[0].producer() if len(sources) == 1 else None):
        if any(value in depends for value in reads(node)):
            reached = [v for v in node.outputs if _carries(node, v, depends)]
            if reached:
                depends.update(reached)
                on_path.append(node)
    return on_path


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


def reads(node: ir.Node) -> list[ir.Value]:
    """Return the values that `node` reads, those that its subgraphs capture included."""
    bodies = [a.value for a in node.attributes.values() if a.type == ir.AttributeType.GRAPH]
    inner = [n for body in bodies for n in ir.traversal.RecursiveGraphIterator(body)]
    captured = [v for n in inner for v in n.inputs if v is not None and v.graph is node.graph]
    return [v for v in node.inputs if v is not None] + captured


def _carries(node: ir.Node, value: ir.Value, depends: set[ir.Value]) -> bool:
    """Whether `value`, an output of `node`, can carry the influence of the values in `depends`."""
    if value.dtype is None or value.dtype.is_floating_point():
        return True
    if value.dtype in (ir.DataType.BOOL, ir.DataType.INT64):
        return False
    return node.op_type == "QuantizeLinear" or any(
        v is not None and v in depends and v.dtype is not None and v.dtype.is_integer() for v in node.inputs
    )


def gradient(
    op: Emitter,
    output: ir.Value,
    seed: ir.Value,
    source: ir.Value,
    rules: Mapping[tuple[str, str], Rule] = RULES,
) -> ir.Value | None:
    """Emit the gradient of ``sum(seed * output)`` with respect to `source`; see `gradients`."""
    return gradients(op, output, seed, [source], rules)[0]


def gradients(
    op: Emitter,
    output: ir.Value,
    seed: ir.Value,
    sources: Sequence[ir.Value],
    rules: Mapping[tuple[str, str], Rule] = RULES,
) -> list[ir.Value | None]:
    """Emit the gradients of ``sum(seed * output)`` with respect to `sources`, in one walk.

    Args:
        op: where the nodes go.
        output: a floating-point value of the graph.
        seed: same shape and dtype as `output`.
        sources: any floating-point values of the graph.
        rules: the rule of each operator.

    Returns:
        For each source a value of its shape and dtype, or None if it does not influence `output`.

    Raises:
        OnnxcamError: an operator on the way has no rule, or one that does not cover the node.
    """
    found: dict[ir.Value, ir.Value] = {output: seed}
    active = set(sources)
    nodes = path(output, *sources)
    for node in nodes:
        active.update(node.outputs)
    for node in reversed(nodes):
        arriving = [found.get(value) for value in node.outputs]
        if all(dy is None for dy in arriving):
            continue
        rule = rules.get((node.domain, node.op_type))
        if rule is None:
            raise OnnxcamError(_no_rule(node, rules))
        with op.scope("gradient"), op.scope(node.name or node.op_type):
            try:
                leaving = rule(op, node, arriving)
            except OnnxcamError:
                # Nothing may be known of a value only because an operator before it is unknown.
                unknown = next((n for n in nodes if (n.domain, n.op_type) not in rules), None)
                if unknown is None:
                    raise
                raise OnnxcamError(_no_rule(unknown, rules)) from None
            for value, dx in zip(node.inputs, leaving, strict=True):
                if value is None or dx is None or value not in active:
                    continue
                if dx.shape is None:
                    dx.shape = value.shape  # ONNX infers none where the size is computed
                before = found.get(value)
                found[value] = dx if before is None else op.Add(before, dx)
    return [found.get(source) for source in sources]


def _no_rule(node: ir.Node, rules: Iterable[tuple[str, str]]) -> str:
    operator = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
    known = ", ".join(sorted(name if not domain else f"{domain}.{name}" for domain, name in rules))
    return (
        f"there is no gradient rule for the operator {operator} (node {node.name!r}), "
        f"which lies between the layer and the scores. Operators with a rule: {known}"
    )
