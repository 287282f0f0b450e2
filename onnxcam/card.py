"""The card: what an explained model says about itself, as JSON under one key of its metadata.

The run side learns everything it needs from here and imports neither onnx nor torch to read it.
The format is written down in ``docs/format.md``.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from onnxcam.errors import OnnxcamError

KEY = "onnxcam"
"""The key in the model's ``metadata_props``."""

FORMAT = 1
"""The version of the card and of the inputs and outputs that an explained model has."""

COLORS = ("RGB", "BGR", "GRAY")
LAYOUTS = ("NCHW", "NHWC")
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")
HOLDS = ("logits", "probabilities")
SCORES = ("before", "after")
CLASS_INPUTS = ("optional", "required")
EMITS = ("cam", "heatmap", "overlay", "activations", "gradients", "attributions")
"""The outputs that an explained model may have."""

WANTED = "cam_wanted"
"""Name of the input, a bool, of a model that makes maps on demand only."""

TARGETS = ("class", "contrast", "rivals", "seed")
"""The score of a class; less that of another; less the mean of its rivals'; or any weighted sum of scores."""

EVIDENCE = ("for", "against", "both", "counterfactual")
"""What is kept of the weighted sum: max(0, .), min(0, .), all; or max(0, .) for the negative score."""

FUSIONS = ("mean", "max", "product")
SMOOTHINGS = ("augmentation", "eigen")


@dataclasses.dataclass(frozen=True)
class Preprocess:
    """How a picture becomes the model's input: ``x = (pixel * scale - mean) / std``, pixels in 0..255.

    Attributes:
        name: the model input that takes the picture.
        layout: ``NCHW`` or ``NHWC``.
        height, width: the size of the input in pixels; None where the graph leaves it open.
        color: order of the channels, ``RGB``, ``BGR`` or ``GRAY``.
        scale: multiplies the pixel value before `mean` is subtracted: ``1/255`` or ``1``.
        mean, std: one value per channel, in the order of `color`.
        resize: ``stretch`` (to height x width, aspect ratio lost), ``crop`` (shorter edge to the
            larger of height and width, then the centre) or ``crop:N`` (shorter edge to N pixels first).
        interpolation: the resampling filter, antialiased as Pillow does it.

    A field that nobody stated is None; `missing` names those fields.
    """

    name: str
    layout: str = "NCHW"
    height: int | None = None
    width: int | None = None
    color: str | None = None
    scale: float | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    resize: str | None = None
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        _text("input name", self.name)
        _one_of("layout", self.layout, LAYOUTS)
        _one_of("color", self.color, (*COLORS, None))
        _one_of("interpolation", self.interpolation, INTERPOLATIONS)
        for name in ("height", "width"):
            size = getattr(self, name)
            if size is not None and not (isinstance(size, int) and size >= 1):
                raise OnnxcamError(f"{name} is {size!r}; it must be a whole number of pixels, at least 1")
        if self.scale is not None and not (_is_finite(self.scale) and self.scale != 0):
            raise OnnxcamError(f"scale is {self.scale!r}; it must be a number other than zero")
        for name in ("mean", "std"):
            values = getattr(self, name)
            if values is None:
                continue
            if not values or not all(map(_is_finite, values)):
                raise OnnxcamError(f"{name} is {list(values)}; it must be one number, or one per channel")
            if self.color is not None and len(values) not in (1, self.channels):
                raise OnnxcamError(
                    f"{name} has {len(values)} values; give one, or one for each channel of {self.color}"
                )
            if name == "std" and not all(value > 0 for value in values):
                raise OnnxcamError(f"std is {list(values)}; every value must be above zero")
        if self.resize is not None:
            self._check_resize(self.resize)

    def _check_resize(self, resize: str) -> None:
        _text("resize", resize)
        rule, colon, edge = resize.partition(":")
        if rule not in ("stretch", "crop") or (colon and (rule != "crop" or not edge.isdecimal())):
            raise OnnxcamError(f"resize is {resize!r}; it must be stretch, crop or crop:PIXELS")
        larger = max(self.height or 1, self.width or 1)
        if edge and int(edge) < larger:
            raise OnnxcamError(f"resize is {resize!r}; the crop itself needs {larger} pixels")

    @property
    def channels(self) -> int:
        """Number of channels that `color` has."""
        return 1 if self.color == "GRAY" else 3

    @property
    def shorter_edge(self) -> int | None:
        """Length in pixels that the picture's shorter edge gets before the crop; None for ``stretch``."""
        if self.resize is None or self.resize == "stretch":
            return None
        edge = self.resize.partition(":")[2]
        return int(edge) if edge else max(self.height or 0, self.width or 0)

    def missing(self) -> list[str]:
        """Names of the facts that are still unknown and without which no picture can be prepared."""
        facts = ("height", "width", "color", "scale", "mean", "std", "resize")
        return [fact for fact in facts if getattr(self, fact) is None]


@dataclasses.dataclass(frozen=True)
class Card:
    """What an explained model says about itself.

    Attributes:
        input: how a picture becomes the model's input.
        scores: name of the model output that holds the class scores.
        scores_are: ``logits`` or ``probabilities``: what that output holds.
        layer: name of the ONNX value that the map is made from; of several, with commas between.
        method: the method's name, such as ``gradcam``.
        score: ``before`` or ``after`` the softmax: which score the gradient is of.
        target: what is explained, one of `TARGETS`; None: the score of a class.
        compat: whose numbers the map has; None: the method's paper's.
        evidence: what of the map is kept, ``for``, ``against``, ``both`` or ``counterfactual``; None: as in
            the method's paper.
        fuse: how the maps of several layers are joined, ``mean``, ``max`` or ``product``; None: there is one.
        smooth: of ``augmentation`` and ``eigen``; None: neither.
        module: PyTorch module path of the layer, where the exporter recorded it.
        grid: how the map's plane lies in the layer, such as ``tokens 1 to 196 as 14x14``; None if the layer
            is [N,C,h,w].
        labels: class names by index, or None.
        picture: the input that takes a picture of any size as it is, uint8 [N,H,W,3], RGB, of which the graph
            itself makes `input`; None: a program prepares it.
        on_demand: whether maps are made only where the input ``cam_wanted`` is true; None: always.
        tool: name and version of the program that wrote the card.
        format: version of the card.
    """

    input: Preprocess
    scores: str
    scores_are: str
    layer: str
    method: str
    score: str
    tool: str
    target: str | None = None
    compat: str | None = None
    evidence: str | None = None
    fuse: str | None = None
    smooth: tuple[str, ...] | None = None
    module: str | None = None
    grid: str | None = None
    labels: tuple[str, ...] | None = None
    picture: str | None = None
    on_demand: bool | None = None
    format: int = FORMAT

    def __post_init__(self) -> None:
        for name in ("scores", "layer", "method", "tool"):
            _text(name, getattr(self, name))
        if self.picture is not None:
            _text("picture", self.picture)
        _one_of("scores_are", self.scores_are, HOLDS)
        _one_of("score", self.score, SCORES)
        _one_of("evidence", self.evidence, (*EVIDENCE, None))
        _one_of("fuse", self.fuse, (*FUSIONS, None))
        for name in self.smooth or ():
            _one_of("smoothing", name, SMOOTHINGS)
        if self.labels is not None and not (
            isinstance(self.labels, tuple) and all(isinstance(label, str) for label in self.labels)
        ):
            raise OnnxcamError("labels must be a list of texts, one for each class")

    @property
    def title(self) -> str:
        """The method, where it looks and whose numbers those are, for a person."""
        whose = f" as in {self.compat}" if self.compat else ""
        smooth = f", smoothed by {' and '.join(self.smooth)}" if self.smooth else ""
        return f"{self.method}{whose} at {self.module or self.layer}{smooth}"

    def to_json(self) -> str:
        """Return the card as one line of JSON; facts that are unknown are left out."""
        fields = dataclasses.asdict(self)
        fields["input"] = {k: v for k, v in fields["input"].items() if v is not None}
        return json.dumps({k: v for k, v in fields.items() if v is not None}, ensure_ascii=False)

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> "Card | None":
        """Read the card from a model's metadata; None if the model has none.

        Raises:
            OnnxcamError: the card is damaged, or of a format newer than this program reads.
        """
        text = metadata.get(KEY)
        if text is None:
            return None
        try:
            fields: dict[str, Any] = json.loads(text)
            version = fields.get("format")
            if version == FORMAT:
                return cls._from_fields(**fields)
        except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise OnnxcamError(f"the model's card is damaged ({error}); attach the model again") from error
        raise OnnxcamError(
            f"the model's card has format {version}; this onnxcam reads format {FORMAT}. "
            "Use the onnxcam that wrote it, or attach again."
        )

    @classmethod
    def _from_fields(
        cls, *, input: dict[str, Any], labels: Any = None, smooth: Any = None, **fields: Any
    ) -> "Card":
        for name in ("mean", "std"):
            if name in input:
                input[name] = tuple(float(value) for value in input[name])
        labels = tuple(labels) if isinstance(labels, list) else labels
        smooth = None if smooth is None else tuple(smooth)
        return cls(input=Preprocess(**input), labels=labels, smooth=smooth, **fields)


def _text(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise OnnxcamError(f"{name} is {value!r}; it must be text")


def _one_of(name: str, value: object, allowed: Sequence[str | None]) -> None:
    if value not in allowed:
        raise OnnxcamError(f"{name} is {value!r}; it must be one of {', '.join(filter(None, allowed))}")


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
