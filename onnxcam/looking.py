"""Looking inside a classifier: the filters of its first convolution, and what a layer's channels hold."""

import dataclasses
import os
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass

from onnxcam import layers, onnxfile, quantised
from onnxcam.attaching import opened, stated
from onnxcam.backward import path
from onnxcam.card import COLORS, Card
from onnxcam.emit import Emitter
from onnxcam.errors import OnnxcamError
from onnxcam.vjp.shapes import constant_array, dims

if TYPE_CHECKING:
    from PIL import Image

_FLAT = (176, 198, 224)
"""The colour of a channel that has one value everywhere, or values that are not finite."""


@dataclasses.dataclass(frozen=True)
class Filters:
    """The filters of a model's first convolution.

    Attributes:
        weights: float32 [F,C,h,w], C = 3 (red, green, blue) or 1.
        node: name of the convolution.
    """

    weights: NDArray[np.float32]
    node: str

    def __str__(self) -> str:
        count, channels, height, width = self.weights.shape
        kind = "colour" if channels == 3 else "grey"
        return f"{count} {kind} filters {height}x{width} of {self.node}"

    def grid(self) -> "Image.Image":
        """Draw all filters in a grid, in the order of the channels that they make.

        Each is scaled by its own largest absolute weight; a weight of zero is mid-grey.
        """
        from onnxcam.render import grid

        largest = np.abs(self.weights).max(axis=(1, 2, 3), keepdims=True)
        unit = 0.5 + 0.5 * self.weights / np.where(largest > 0, largest, 1)
        cells = np.rint(255 * unit).astype(np.uint8).transpose(0, 2, 3, 1)
        legend = "Each is scaled by its own largest weight; mid-grey is zero."
        return grid(np.broadcast_to(cells, (*cells.shape[:3], 3)), str(self), legend)


@dataclasses.dataclass(frozen=True)
class Activations:
    """What the channels of a layer hold for one picture.

    Attributes:
        values: float32 [C,h,w].
        layer: name of the ONNX value, and the PyTorch module path in parentheses where it is known.
    """

    values: NDArray[np.float32]
    layer: str

    def __str__(self) -> str:
        count, height, width = self.values.shape
        return f"{count} channels {height}x{width} of {self.layer}"

    @property
    def flat(self) -> NDArray[np.bool_]:
        """Which channels have one value everywhere, or a value that is not finite: bool [C]."""
        low, high = self.values.min(axis=(1, 2)), self.values.max(axis=(1, 2))
        return ~(np.isfinite(low) & np.isfinite(high) & (high > low))

    def grid(self) -> "Image.Image":
        """Draw all channels in a grid, by index: each from its least (black) to its greatest value (white).

        A `flat` one is pale blue.
        """
        from onnxcam.render import grid

        flat = self.flat
        values = np.where(flat[:, None, None], 0, self.values).astype(np.float64)
        low = values.min(axis=(1, 2), keepdims=True)
        span = values.max(axis=(1, 2), keepdims=True) - low
        unit = (values - low) / np.where(span > 0, span, 1)
        cells = np.repeat(np.rint(255 * unit).astype(np.uint8)[..., None], 3, axis=3)
        cells[flat] = _FLAT
        legend = "Each from its least value (black) to its greatest (white)"
        odd = f"; {flat.sum()} that are flat are pale blue." if flat.any() else "."
        return grid(cells, str(self), legend + odd)


def filters(
    model: "str | os.PathLike[str] | onnx.ModelProto | ir.Model",
    color: str | None = None,
    scores: str | None = None,
) -> Filters:
    """Return the filters of the first convolution after the picture. Krizhevsky et al. 2012, fig. 3.

    Args:
        model: an ONNX classifier, explained or plain.
        color: order of the channels, ``RGB`` or ``BGR``, in place of the card's; needed for a plain model.
        scores: the output that holds the class scores, if several could.

    Raises:
        OnnxcamError: there is no such convolution, its weights are computed, or the order of its channels
            is unknown.
    """
    own, card = _read(model)
    picture = layers.picture(own)
    nodes = path(_scores(own, card, scores).logits, picture)
    node = next((n for n in nodes if n.op_type in ("Conv", "FusedConv")), None)
    if node is None:
        raise OnnxcamError("the model has no convolution between the picture and its scores")
    kernel = node.inputs[1]
    weights = None if kernel is None else constant_array(kernel)
    if weights is None:
        raise OnnxcamError(
            f"the filters of {node.name!r}, the first convolution, are computed while the model runs"
        )
    if weights.ndim != 4 or weights.shape[1] not in (1, 3):
        raise OnnxcamError(
            f"the filters of {node.name!r}, the first convolution, are {list(weights.shape)}; "
            "only those of 1 or 3 channels can be drawn in colour"
        )
    if weights.shape[1] == 3:
        color = color or (card.input.color if card else None)
        if color is None:
            raise OnnxcamError("the model does not say in which order its colours are; give --color")
        if color not in COLORS[:2]:
            raise OnnxcamError(f"color is {color}; three channels are {' or '.join(COLORS[:2])}")
        weights = weights[:, ::-1] if color == "BGR" else weights
    return Filters(np.ascontiguousarray(weights, np.float32), node.name or "")


def activations(
    model: "str | os.PathLike[str] | onnx.ModelProto | ir.Model",
    image: "str | os.PathLike[str] | Image.Image | NDArray[np.uint8]",
    *,
    layer: str | None = None,
    scores: str | None = None,
    **preprocess: Any,
) -> Activations:
    """Return the activations of one layer for one picture.

    Args:
        model: an ONNX classifier, explained or plain.
        image: a file, a Pillow image, or an array uint8 [H,W,3] (RGB) or [H,W] (grey).
        layer: as in `onnxcam.attach`. None: the one that the model explains, or would by default.
        scores: the output that holds the class scores, if several could.
        preprocess: fields of `onnxcam.card.Preprocess`, in place of those on the card.

    Raises:
        OnnxcamError: the model or picture cannot be read or run, there is no such layer, or a fact about how
            a picture is prepared is missing.
    """
    from onnxcam.image import prepare
    from onnxcam.runtime import as_picture
    from onnxcam.sessions import provider_named, run, start

    own, card = _read(model)
    picture = layers.picture(own)
    known = {} if card is None else dataclasses.asdict(card.input)
    known.pop("name", None)
    facts = stated(picture, known | {name: fact for name, fact in preprocess.items() if fact is not None})
    logits = _scores(own, card, scores).logits
    if layer is None and card is not None and card.fuse is None:
        layer = card.layer
    if layer is None:
        source = layers.default(layers.explainable(picture, logits), picture, logits)
    else:
        source = layers.locate(own, layer, picture, logits)
    x, _ = prepare(as_picture(image), facts)
    op = Emitter(own.graph, own.graph.opset_imports[""], "look")
    planes = op.Identity(source.grid.planes(op, source.value))
    quantised.fold(op)
    own.graph.outputs[:] = [planes]
    RemoveUnusedNodesPass()(own)
    batch = dims(picture)[0]
    assert picture.dtype is not None
    feed = np.repeat(x.astype(picture.dtype.numpy()), batch if isinstance(batch, int) else 1, axis=0)
    session = start(own, provider_named("cpu"), "the model")
    (values,) = run(session, [planes.name or ""], {picture.name or "": feed}, "the model")
    name = f"{source.name} ({source.module})" if source.module else source.name
    return Activations(values[0].astype(np.float32), name)


def _read(model: "str | os.PathLike[str] | onnx.ModelProto | ir.Model") -> tuple[ir.Model, Card | None]:
    """Return a model of our own, explained or plain, and its card."""
    own = onnxfile.normalise(opened(model))
    return own, Card.from_metadata(own.metadata_props)


def _scores(model: ir.Model, card: Card | None, name: str | None) -> layers.Scores:
    return layers.scores(model, name or (card.scores if card else None))
