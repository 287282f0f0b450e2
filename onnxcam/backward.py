"""The reverse walk: from the gradient of a score back to the gradient of one activation."""

from collections.abc import Iterable, Mapping

import onnx_ir as ir

from onnxcam.emit import Emitter
from onnxcam.errors import OnnxcamError
from onnxcam.vjp import RULES, Rule


def path(output: ir.Value, source: ir.Value) -> list[ir.Node]:
    """Return the nodes through which `source` can influence `output`, in the order they run.

    Only floating-point values carry influence: a gradient does not pass through indices or shapes.
    """
    ancestors: list[ir.Node] = []
    seen: set[ir.Node] = set()
    stop = source.producer()
    stack = [(output.producer(), False)]
    while stack:
        node, expanded = stack.pop()
        if node is None or node is stop:
            continue
        if expanded:
            ancestors.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack.extend((producer, False) for producer in node.predecessors())
    depends = {source}
    on_path = []
    for node in ancestors:
        if any(value in depends for value in node.inputs):
            reached = [v for v in node.outputs if v.dtype is None or v.dtype.is_floating_point()]
            if reached:
                depends.update(reached)
                on_path.append(node)
    return on_path


def gradient(
    op: Emitter,
    output: ir.Value,
    seed: ir.Value,
    source: ir.Value,
    rules: Mapping[tuple[str, str], Rule] = RULES,
) -> ir.Value | None:
    """Emit the gradient of ``sum(seed * output)`` with respect to `source`.

    Args:
        op: where the nodes go.
        output: a floating-point value of the graph.
        seed: same shape and dtype as `output`.
        source: any floating-point value of the graph.
        rules: the rule of each operator.

    Returns:
        A value of the shape and dtype of `source`, or None if `source` does not influence `output`.

    Raises:
        OnnxcamError: an operator on the way has no rule, or one that does not cover the node.
    """
    if output is source:
        return seed
    gradients: dict[ir.Value, ir.Value] = {output: seed}
    active = {source}
    nodes = path(output, source)
    for node in nodes:
        active.update(node.outputs)
    for node in reversed(nodes):
        arriving = [gradients.get(value) for value in node.outputs]
        if all(dy is None for dy in arriving):
            continue
        rule = rules.get((node.domain, node.op_type))
        if rule is None:
            raise OnnxcamError(_no_rule(node, rules))
        with op.scope(f"gradient/{node.name}"):
            for value, dx in zip(node.inputs, rule(op, node, arriving), strict=True):
                if value is None or dx is None or value not in active:
                    continue
                before = gradients.get(value)
                gradients[value] = dx if before is None else op.Add(before, dx)
    return gradients.get(source)


def _no_rule(node: ir.Node, rules: Iterable[tuple[str, str]]) -> str:
    operator = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
    known = ", ".join(sorted(name if not domain else f"{domain}.{name}" for domain, name in rules))
    return (
        f"there is no gradient rule for the operator {operator} (node {node.name!r}), "
        f"which lies between the layer and the scores. Operators with a rule: {known}"
    )
