"""METHODS: every class activation map by name, and the decorator that adds one."""

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from onnx_ir import Value

from onnxcam.emit import Emitter
from onnxcam.errors import OnnxcamError, suggest
from onnxcam.methods.algebra import summed, total

if TYPE_CHECKING:
    from onnxcam.probe import Probe

Function = Callable[..., Value]
Reduction = Callable[[Emitter, Value], Value]

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
        gives: what the function returns: ``weights`` [N,K,C] or [N,K,C,h,w], whose product with A makes the
            terms; ``terms`` [N,K,C,h,w], as they are; or the ``map`` [N,K,h,w] itself. K may be 1 where it
            is the same for all classes.
        over_channels: ``over_channels(op, terms)`` makes the map of the terms: their sum, or another
            reduction of ``onnxcam.methods.algebra``.
        rectified: whether the map ends in a ReLU.
        unsigned: whether the map has nothing below zero even without one, so that there is none against a
            class.
        signed: whether what is below zero is against the class, so that the evidence is ``both`` where none
            is asked for. (Other maps without a ReLU have no zero that means anything, or scale it away.)
        at_picture: whether the activation is the picture itself.
        full_size: whether the map and its terms lie on the picture, though the activation does not.
        target: what of the scores it explains, a key of ``onnxcam.card.TARGETS``; None: what is asked for.
        rules: name of the gradient rules used, a key of ``onnxcam.vjp.VARIANTS``.
        requires: name of what the model must have, a key of ``onnxcam.layers.REQUIREMENTS``.
        instead: a method that needs none of that, and why it may serve.
        cost: in runs of the model, beside the one that predicts; C channels, P = h*w positions.
    """

    name: str
    function: Function
    gives: str
    over_channels: Reduction
    rectified: bool
    unsigned: bool
    signed: bool
    at_picture: bool
    full_size: bool
    target: str | None
    rules: str | None
    requires: str | None
    instead: str | None
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
        self, op: Emitter, probe: "Probe", wanted: Sequence[str], projection: Reduction | None = None
    ) -> dict[str, Value]:
        """Emit the map and what belongs to it.

        Args:
            op: where the nodes go.
            probe: the run of the model, seen from the layer.
            wanted: of ``gradients`` and ``attributions``.
            projection: what makes a map [N,K,h,w] of the terms instead of the method's own reduction.

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
            return self._parts(op, found, a, wanted, projection) + (
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

    def _parts(
        self, op: Emitter, found: Value, a: Value, wanted: Sequence[str], projection: Reduction | None
    ) -> list[Value]:
        if self.gives == "map":
            return [found]
        plain = projection is None and self.over_channels is total and "attributions" not in wanted
        if self.gives == "weights" and plain:
            return [summed(op, found, a)]
        terms = found
        if self.gives == "weights":
            if found.shape is not None and len(found.shape) == 3:
                found = op.Unsqueeze(found, [3, 4])
            terms = op.Mul(found, a)
        cam = (projection or self.over_channels)(op, terms)
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
    over_channels: Reduction = total,
    rectified: bool = True,
    unsigned: bool = False,
    signed: bool = False,
    at_picture: bool = False,
    full_size: bool = False,
    target: str | None = None,
    rules: str | None = None,
    requires: str | None = None,
    instead: str | None = None,
    into: dict[str, Method] = METHODS,
) -> Callable[[Function], Function]:
    """Register the decorated function under `name`, in METHODS or a dialect's own table; see `Method`."""
    assert gives in GIVES
    assert (requires is None) == (instead is None)

    def register(function: Function) -> Function:
        into[name] = Method(
            name, function, gives, over_channels, rectified, unsigned, signed, at_picture, full_size, target,
            rules, requires, instead, cost,
        )  # fmt: skip
        return function

    return register
