"""What a dialect is: the conventions by which one library's numbers differ from another's."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from onnx_ir import Value

from onnxcam.emit import Emitter
from onnxcam.errors import OnnxcamError
from onnxcam.methods import Method
from onnxcam.methods.algebra import first_component
from onnxcam.methods.scaling import Size
from onnxcam.targets import Contrast, less_mean


def _as_it_is(_op: Emitter, cam: Value) -> Value:
    return cam


def _joins_nothing(*_: object) -> Value:
    raise AssertionError("a dialect without fusions")


@dataclasses.dataclass(frozen=True)
class Dialect:
    """The conventions of one library.

    Attributes:
        name: what people type.
        methods: what it implements, as it does.
        heatmap: ``heatmap(op, cam, size, signed)`` brings ``cam`` [N,K,h,w] to the size of the picture and
            scales it, as the library shows it.
        cam: ``cam(op, cam)`` makes of the map [N,K,h,w], after its ReLU, what the library returns at the
            layer's size.
        fusions: the ways in which it joins the maps of several layers; the first is its default.
        fuse: ``fuse(op, maps, size, fusion, method)`` joins what `cam` returned for each layer.
        fuses_at_picture: whether `size` is then the picture's; else the largest of the layers'.
        evidence: what may be kept of the map beside what the method itself keeps: ``for`` where it ends in
            a ReLU, ``both`` where not.
        smoothings: those it has.
        projection: ``projection(op, terms)``, what eigen smoothing makes of [N,K,C,h,w] instead of the sum.
        averages_heatmaps: whether smoothing by augmentation averages heat maps instead of maps.
        score: ``before`` or ``after`` the softmax, where the library leaves no choice.
        contrast: what the target ``rivals`` explains.
        contrasted: the methods that can explain it, where not all can.
    """

    name: str
    methods: Mapping[str, Method]
    heatmap: Callable[[Emitter, Value, Size, bool], Value]
    cam: Callable[[Emitter, Value], Value] = _as_it_is
    fusions: Sequence[str] = ()
    fuse: Callable[[Emitter, Sequence[Value], Size, str, Method], Value] = _joins_nothing
    fuses_at_picture: bool = False
    evidence: Sequence[str] = ()
    smoothings: Sequence[str] = ()
    projection: Callable[[Emitter, Value], Value] = first_component
    averages_heatmaps: bool = False
    score: str | None = None
    contrast: Contrast = less_mean
    contrasted: Sequence[str] | None = None

    def method(self, name: str) -> Method:
        """Return the method called `name` as this library does it.

        Raises:
            OnnxcamError: the library has no such method.
        """
        if name not in self.methods:
            raise OnnxcamError(
                f"{self.name} has no method {name!r}; it has: {', '.join(self.methods)}. "
                "Without --compat the method is as its paper defines it"
            )
        return self.methods[name]

    def scored(self, asked: str | None) -> str:
        """Return whether the score ``before`` or ``after`` the softmax is explained.

        Raises:
            OnnxcamError: the library explains the other one.
        """
        if self.score is not None and asked not in (None, self.score):
            raise OnnxcamError(
                f"{self.name} explains the score {self.score} the softmax, not {asked}; leave the score out"
            )
        return asked or self.score or "before"

    def fusion(self, asked: str | None) -> str | None:
        """Return how several layers are joined; None: not at all.

        Raises:
            OnnxcamError: the library does not join them so.
        """
        if asked is not None and asked not in self.fusions:
            ways = f"only by {' or '.join(self.fusions)}" if self.fusions else "in no way"
            raise OnnxcamError(f"{self.name} joins layers {ways}, not by {asked}")
        return asked or next(iter(self.fusions), None)

    def check(self, method: Method, target: str, evidence: str | None, smooth: Sequence[str]) -> None:
        """Raise an error where the library has no such target, evidence or smoothing.

        Raises:
            OnnxcamError: it has not.
        """
        if target == "rivals" and self.contrasted is not None:
            if method.name not in self.contrasted:
                raise OnnxcamError(
                    f"{self.name} explains the target rivals only by {', '.join(self.contrasted)}"
                )
            if "augmentation" in smooth:
                raise OnnxcamError(f"{self.name} has no smoothing 'augmentation' of the target rivals")
        own = "for" if method.rectified else "both"
        allowed = list(dict.fromkeys([own, *self.evidence]))
        if evidence is not None and evidence not in allowed:
            raise OnnxcamError(
                f"{self.name} gives no evidence {evidence!r} in {method.name}, only {' or '.join(allowed)}"
            )
        for name in smooth:
            if name not in self.smoothings:
                has = f"it has {' and '.join(self.smoothings)}" if self.smoothings else "it has no smoothing"
                raise OnnxcamError(f"{self.name} has no smoothing {name!r}; {has}")
