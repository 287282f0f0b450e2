"""METHODS: every class activation map by name, and the decorator that adds one."""

import dataclasses
from collections.abc import Callable

from onnx_ir import Value

from onnxcam.emit import Emitter

Function = Callable[[Emitter, Value, Value], Value]


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to make a map of an activation and the gradient of a score.

    Attributes:
        name: what people type.
        function: ``function(op, a, da)`` emits the map [N,K,h,w] of the activations a [N,1,C,h,w] and
            the gradients da [N,K,C,h,w] of K scores, and returns it.
        linear_head: whether the method is defined only where the scores are one weighted sum of the
            activations, averaged over the plane.
    """

    name: str
    function: Function
    linear_head: bool

    @property
    def summary(self) -> str:
        """The equation and the paper: the first line of the function's docstring."""
        return (self.function.__doc__ or "").strip().splitlines()[0]


METHODS: dict[str, Method] = {}
"""Every method by the name that people type."""


def method(name: str, *, linear_head: bool = False) -> Callable[[Function], Function]:
    """Register the decorated function under `name`; see `Method`."""

    def register(function: Function) -> Function:
        METHODS[name] = Method(name, function, linear_head)
        return function

    return register
