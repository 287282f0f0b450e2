"""METHODS: every class activation map by name, and the decorator that adds one."""

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from onnx_ir import Value

from onnxcam.emit import Emitter
from onnxcam.errors import OnnxcamError, suggest
from onnxcam.methods.algebra import first_component, summed

if TYPE_CHECKING:
    from onnxcam.probe import Probe

Function = Callable[..., Value]

GIVES = ("weights", "terms", "map")


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to make a map.

    Attributes:
        name: what people type.
        function: ``function(op, ...)`` emits nodes and returns a value. Its other parameters say what it
            needs: ``a``, the activation A [N,1,C,h,w]; ``da``, the gradient of the explained scores
            dy/dA [N,K,C,h,w]; ``hda``, their second derivative times A, of the same shape; ``probe``, the
            run of the model itself, for what needs other runs.
        gives: what the function returns: ``weights`` [N,K,C] or [N,K,C,h,w], whose product with A is
            summed over the channels; ``terms`` [N,K,C,h,w], summed over the channels as they are; or the
            ``map`` [N,K,h,w] itself (K may be 1 where it is the same for all classes).
        rectified: whether the map ends in a ReLU.
        at_picture: whether the activation is the picture itself.
        rules: name of the gradient rules used, a key of ``onnxcam.vjp.VARIANTS``.
        linear_head: whether the method is defined only where the scores are one weighted sum of the
            activations, averaged over the plane.
        cost: in runs of the model, beside the one that predicts; C channels, P = h*w positions.
    """

    name: str
    function: Function
    gives: str
    rectified: bool
    at_picture: bool
    rules: str | None
    linear_head: bool
    cost: str

    @property
    def needs(self) -> tuple[str, ...]:
        """Names of the function's parameters after the first."""
        return tuple(inspect.signature(self.function).parameters)[1:]

    @property
    def summary(self) -> str:
        """The equation and the paper: the first paragraph of the function's docstring."""
        return " ".join(inspect.cleandoc(self.function.__doc__ or "").partition("\n\n")[0].split())

    def outputs(
        self, op: Emitter, probe: "Probe", wanted: Sequence[str], smooth: bool = False
    ) -> dict[str, Value]:
        """Emit the map and what belongs to it.

        Args:
            op: where the nodes go.
            probe: the run of the model, seen from the layer.
            wanted: of ``gradients`` and ``attributions``.
            smooth: project the terms onto their first principal component instead of summing them.

        Returns:
            ``cam``, the map [N,K,h,w] before any ReLU, ``gradients`` dy/dA [N,K,C,h,w] and ``attributions``,
            the terms [N,K,C,h,w].
        """
        a = op.Unsqueeze(probe.activation(), [1])
        given: dict[str, Any] = {"a": a, "probe": probe}

        def of(da: Value | None) -> list[Value]:
            if da is not None:
                given["da"] = da
                if "hda" in self.needs:
                    given["hda"] = probe.curvature(da)
            found = self.function(op, **{name: given[name] for name in self.needs})
            return self._parts(op, found, a, wanted, smooth) + (
                [da] if "gradients" in wanted and da is not None else []
            )

        names = ["cam", *(["attributions"] if "attributions" in wanted else [])]
        if "da" in self.needs:
            names += ["gradients"] if "gradients" in wanted else []
            return dict(zip(names, probe.per_sum(of), strict=True))
        found = dict(zip(names, of(None), strict=True))
        if "gradients" in wanted:
            (found["gradients"],) = probe.per_sum(lambda da: [da])
        return found

    def _parts(self, op: Emitter, found: Value, a: Value, wanted: Sequence[str], smooth: bool) -> list[Value]:
        if self.gives == "map":
            return [found]
        if self.gives == "weights" and not smooth and "attributions" not in wanted:
            return [summed(op, found, a)]
        terms = found
        if self.gives == "weights":
            if found.shape is not None and len(found.shape) == 3:
                found = op.Unsqueeze(found, [3, 4])
            terms = op.Mul(found, a)
        cam = first_component(op, terms) if smooth else op.ReduceSum(terms, [2], keepdims=0)
        return [cam, *([terms] if "attributions" in wanted else [])]


METHODS: dict[str, Method] = {}
"""Every method by the name that people type."""


def named(name: str) -> Method:
    """Return the method called `name`, as its paper defines it.

    Raises:
        OnnxcamError: there is none.
    """
    if name not in METHODS:
        raise OnnxcamError(
            f"there is no method {name!r}{suggest(name, METHODS)}; methods: {', '.join(METHODS)}"
        )
    return METHODS[name]


def method(
    name: str,
    *,
    cost: str,
    gives: str = "weights",
    rectified: bool = True,
    at_picture: bool = False,
    rules: str | None = None,
    linear_head: bool = False,
) -> Callable[[Function], Function]:
    """Register the decorated function under `name`; see `Method`."""
    assert gives in GIVES

    def register(function: Function) -> Function:
        METHODS[name] = Method(name, function, gives, rectified, at_picture, rules, linear_head, cost)
        return function

    return register
