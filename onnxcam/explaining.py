"""From the runs of a model to its maps: evidence, several layers, smoothing, and the heat map."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir import Value

from onnxcam.dialects import Dialect
from onnxcam.emit import Emitter
from onnxcam.errors import OnnxcamError
from onnxcam.grid import PLANES
from onnxcam.loops import each
from onnxcam.methods import Method
from onnxcam.probe import Probe

_FLIPS = np.array([False, False, False, True, True, True])
_FACTORS = np.array([0.9, 1.0, 1.1, 0.9, 1.0, 1.1])
"""Of smoothing by augmentation: the picture as it is and mirrored, each at three strengths."""


@dataclasses.dataclass(frozen=True)
class Request:
    """What is made of the model's runs.

    Attributes:
        method: how the map is made.
        dialect: whose numbers they are.
        evidence: one of ``onnxcam.card.EVIDENCE``; None: what the method's paper keeps.
        fusion: how the maps of several layers become one, one of ``onnxcam.card.FUSIONS``; None: not at all.
        smooth: of ``onnxcam.card.SMOOTHINGS``.
    """

    method: Method
    dialect: Dialect
    evidence: str | None = None
    fusion: str | None = "mean"
    smooth: Sequence[str] = ()

    @property
    def signed(self) -> bool:
        """Whether values below zero are part of the answer, so that the heat map keeps zero where it is."""
        return self.evidence in ("against", "both")


def explain(
    op: Emitter, probes: Sequence[Probe], request: Request, wanted: Sequence[str]
) -> dict[str, Value]:
    """Emit the maps of one or several layers.

    Args:
        op: where the nodes go.
        probes: the run of the model, seen from each layer.
        request: what is made of it.
        wanted: of ``heatmap``, ``gradients`` and ``attributions``; the last two only for a single layer.

    Returns:
        ``cam`` [N,K,h,w] in float32 and what is wanted: ``heatmap`` float32 [N,K,H,W], ``gradients`` and
        ``attributions`` [N,K,C,h,w].

    Raises:
        OnnxcamError: the combination makes no sense.
    """
    inner = {"gradients", "attributions"}.intersection(wanted)
    if inner and (len(probes) > 1 or "augmentation" in request.smooth):
        raise OnnxcamError(
            f"{' and '.join(sorted(inner))} belong to one layer and one run; there are several"
        )
    _check(request, wanted)
    if len(probes) > 1 and request.fusion is None:
        raise OnnxcamError(f"{request.dialect.name} does not join the maps of several layers; choose one")
    if "augmentation" in request.smooth:
        return _augmented(op, probes, request)
    found = (
        {"cam": _fused(op, probes, request)} if len(probes) > 1 else _single(op, probes[0], request, wanted)
    )
    return {**found, "heatmap": _heatmap(op, found["cam"], probes, request)}


def _check(request: Request, wanted: Sequence[str]) -> None:
    """Refuse what the method's map cannot give."""
    method = request.method
    if method.gives == "map" and "eigen" in request.smooth:
        raise OnnxcamError(
            f"{method.name} is not a sum over channels, which 'eigen' would smooth; leave it out"
        )
    if method.gives == "map" and "attributions" in wanted:
        raise OnnxcamError(f"{method.name} is not a sum over channels: it has no attributions")
    if method.unsigned and request.evidence == "against":
        raise OnnxcamError(
            f"{method.name} has no sign, so nothing in it is against a class; "
            "evidence 'counterfactual' explains the negative score"
        )


def _single(op: Emitter, probe: Probe, request: Request, wanted: Sequence[str]) -> dict[str, Value]:
    method = request.method
    with op.scope(method.name):
        projection = request.dialect.projection if "eigen" in request.smooth else None
        found = method.outputs(op, probe, wanted, projection)
        cam = op.Cast(found["cam"], to=ir.DataType.FLOAT)
        if request.evidence in ("for", "counterfactual") or (request.evidence is None and method.rectified):
            cam = op.Relu(cam)
        elif request.evidence == "against":
            cam = op.Min(cam, 0.0)
        return {**found, "cam": request.dialect.cam(op, cam)}


def _heatmap(op: Emitter, cam: Value, probes: Sequence[Probe], request: Request) -> Value:
    valid = probes[0].seeds.valid
    asked = probes[0].seeds.items[0].shape
    if asked is not None and cam.shape is not None:  # inference loses these where a size is computed
        cam.shape = ir.Shape([*list(asked)[:2], *list(cam.shape)[2:]])
    with op.scope("heatmap"):
        if valid is not None:  # a map of zeros becomes a heat map of zeros, in any dialect
            cam = op.Where(op.Unsqueeze(valid, [2, 3]), cam, 0.0)
        return request.dialect.heatmap(op, cam, probes[0].size(), request.signed)


def _fused(op: Emitter, probes: Sequence[Probe], request: Request) -> Value:
    """Join the maps of several layers at the largest of their sizes, or the picture's where they are open."""
    dialect, fusion = request.dialect, request.fusion
    assert fusion is not None
    maps = [_single(op, probe, request, ())["cam"] for probe in probes]
    with op.scope("fuse"):
        planes = [[probe.grid.height, probe.grid.width] for probe in probes]
        known = all(isinstance(size, int) for plane in planes for size in plane)
        known = known and not request.method.full_size and not dialect.fuses_at_picture
        size = [max(sizes) for sizes in zip(*planes, strict=True)] if known else probes[0].size()
        return dialect.fuse(op, maps, size, fusion, request.method)


def _augmented(op: Emitter, probes: Sequence[Probe], request: Request) -> dict[str, Value]:
    """The mean of the maps of mirrored and weakened or strengthened pictures, mirrored back."""
    picture, across = probes[0].picture, 3 if probes[0].layout.order == PLANES else 2
    assert picture.dtype is not None
    factors, flips = op.constant(_FACTORS.astype(picture.dtype.numpy())), op.constant(_FLIPS)

    def one(factor: Value, flip: Value) -> list[Value]:
        changed = op.Mul(op.Where(flip, _mirrored(op, picture, across), picture), factor)
        moved = [probe.on(changed) for probe in probes]
        cam = _fused(op, moved, request) if len(moved) > 1 else _single(op, moved[0], request, ())["cam"]
        maps = [cam, _heatmap(op, cam, probes, request)] if request.dialect.averages_heatmaps else [cam]
        return [op.Where(flip, _mirrored(op, m, 3), m) for m in maps]

    with op.scope("augmentation"):
        cam, *heat = (op.ReduceMean(maps, [0], keepdims=0) for maps in each(op, [factors, flips], one))
    return {"cam": cam, "heatmap": heat[0] if heat else _heatmap(op, cam, probes, request)}


def _mirrored(op: Emitter, x: Value, axis: int) -> Value:
    return op.Slice(x, [-1], [np.iinfo(np.int64).min], [axis], [-1])
