"""The picture of a map over its photo, as ONNX operators: what `onnxcam.render.overlay` draws."""

import numpy as np
import onnx_ir as ir
from onnx_ir import Value

from onnxcam.card import Preprocess
from onnxcam.emit import Emitter
from onnxcam.grid import PLANES
from onnxcam.render import AGAINST, LUMA, OPACITY, PALE, color_table, muting, strengths


def drawn(op: Emitter, photo: Value, heat: Value, seen: Value | None, evidence: str | None) -> Value:
    """Lay coloured maps over their photos.

    Args:
        op: where the nodes go.
        photo: float32 [N,H,W,3], RGB, 0 to 255.
        heat: float32 [N,K,H,W].
        seen: bool [H,W], which pixels the model saw; None: all.
        evidence: what the maps show, as the card says.

    Returns:
        uint8 [N,K,H,W,3], within a grey level or two of `onnxcam.render.overlay`.
    """
    signed = evidence in AGAINST
    heat = op.Neg(heat) if evidence == "counterfactual" else heat
    steps = len(color_table(signed)) - 1
    place = op.Div(op.Add(op.Clip(heat, -1.0, 1.0), 1.0), 2.0) if signed else op.Clip(heat, 0.0, 1.0)
    level = op.Cast(op.Round(op.Mul(place, float(steps))), to=ir.DataType.INT64)
    alpha = (OPACITY * strengths(signed))[:, None]
    covering = op.Gather((alpha * color_table(signed)).astype(np.float32), level)  # [N,K,H,W,3]
    left = op.Gather((1 - alpha).astype(np.float32), level)
    muted = op.MatMul(photo, muting(OPACITY, signed).T.astype(np.float32))
    picture = op.Add(covering, op.Mul(left, op.Unsqueeze(muted, [1])))
    if seen is not None:
        pale = op.Add(op.MatMul(photo, (PALE * LUMA[:, None]).astype(np.float32)), 255 * (1 - PALE))
        picture = op.Where(op.Unsqueeze(seen, [2]), picture, op.Unsqueeze(pale, [1]))
    return op.Cast(op.Round(op.Clip(picture, 0.0, 255.0)), to=ir.DataType.UINT8)


def photo_of(op: Emitter, x: Value, facts: Preprocess) -> Value:
    """Return the photo float32 [N,H,W,3], RGB, 0 to 255, that a model's input was prepared from.

    Args:
        op: where the nodes go.
        x: the input, [N,C,H,W] or [N,H,W,C].
        facts: how it was prepared; color, scale, mean and std are known.
    """
    assert facts.scale is not None and facts.mean and facts.std
    x = op.Cast(x, to=ir.DataType.FLOAT)
    if facts.layout == PLANES:
        x = op.Transpose(x, perm=[0, 2, 3, 1])
    mean, std = (np.array(values, np.float32) for values in (facts.mean, facts.std))
    photo = op.Clip(op.Round(op.Div(op.Add(op.Mul(x, std), mean), facts.scale)), 0.0, 255.0)
    if facts.color == "RGB":
        return photo
    return op.Gather(photo, np.array([2, 1, 0] if facts.color == "BGR" else [0, 0, 0]), axis=3)
