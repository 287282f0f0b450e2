"""RULES: the vector-Jacobian product of each operator, and the decorator that adds one."""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import onnx_ir as ir

from onnxcam.errors import OnnxcamError

_F = TypeVar("_F", bound=Callable[..., Any])


@dataclasses.dataclass(frozen=True)
class Rule:
    """How the gradient passes backward through one operator.

    Attributes:
        function: ``function(op, dy, y, *inputs, **attributes)``. It emits nodes through `op` and returns
            the gradient of each input, in order: a value, or None where there is none. One that has a
            single input may return the bare value.
        every_output: the function's second and third parameters are called ``dys`` and ``ys``: tuples
            with an entry for every output of the node (None where no gradient arrives), instead of the
            first output alone.
        attributes: names of the attributes that the function knows. Their defaults in its signature
            are those of the ONNX schema.
    """

    function: Callable[..., Any]
    every_output: bool
    attributes: frozenset[str]

    def __call__(self, op: Any, node: ir.Node, dys: list[ir.Value | None]) -> list[ir.Value | None]:
        """Emit the gradients of `node`'s inputs, given those of its outputs.

        Raises:
            OnnxcamError: the node has an attribute that the rule does not know, or a gradient arrives
                at an output that the rule does not know.
        """
        attributes = {name: _plain(attribute) for name, attribute in node.attributes.items()}
        unknown = sorted(attributes.keys() - self.attributes)
        if unknown:
            raise OnnxcamError(
                f"the gradient rule of {node.op_type} does not know the attribute "
                f"{', '.join(unknown)} of node {node.name!r}"
            )
        if self.every_output:
            result = self.function(op, tuple(dys), node.outputs, *node.inputs, **attributes)
        elif any(dy is not None for dy in dys[1:]):
            raise OnnxcamError(
                f"there is no gradient through the second output of {node.op_type} (node {node.name!r})"
            )
        else:
            result = self.function(op, dys[0], node.outputs[0], *node.inputs, **attributes)
        gradients = list(result) if isinstance(result, tuple | list) else [result]
        missing = len(node.inputs) - len(gradients)
        return gradients[: len(node.inputs)] + [None] * missing


RULES: dict[tuple[str, str], Rule] = {}
"""The rule of each operator, by domain (``""`` for ``ai.onnx``) and operator name."""


def vjp(*op_types: str, domain: str = "") -> Callable[[_F], _F]:
    """Register the decorated function as the gradient rule of operators, in place of one they may have.

    `onnxcam.vjp` describes the function.

    Args:
        op_types: names of the operators.
        domain: theirs, as in the nodes of the model; by default ONNX's own.

    Returns:
        A decorator that leaves the function as it is.

    Raises:
        TypeError: from the decorator; the function has fewer parameters than a rule.
    """

    def register(function: _F) -> _F:
        parameters = inspect.signature(function).parameters
        if len(parameters) < 3:
            raise TypeError(
                f"a gradient rule takes op, dy, y and the node's inputs; {function.__name__} does not"
            )
        rule = Rule(
            function,
            every_output=list(parameters)[1] == "dys",
            attributes=frozenset(
                name for name, p in parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY
            ),
        )
        for op_type in op_types:
            RULES[domain, op_type] = rule
        return function

    return register


def _plain(attribute: ir.Attr) -> Any:
    value = attribute.value
    if attribute.type == ir.AttributeType.TENSOR:
        return value.numpy()
    return list(value) if isinstance(value, tuple) else value
