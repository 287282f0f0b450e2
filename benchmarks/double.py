"""Running ONNX graphs in float64: ONNX's reference evaluator, with torch for what takes long there."""

from typing import Any

import numpy as np
import onnx
import onnx.reference
import torch
from onnx.reference.op_run import OpRun

from tests.checks import NEW_OPS


class Conv(OpRun):
    """By torch; padded beforehand, since it takes none that differs between the two ends."""

    def _run(self, x: Any, w: Any, b: Any = None, **attributes: Any) -> Any:
        n = x.ndim - 2
        pads = attributes["pads"] or [0] * 2 * n
        if attributes["auto_pad"] not in ("NOTSET", "VALID"):
            raise NotImplementedError(attributes["auto_pad"])
        padded = np.pad(x, [(0, 0), (0, 0), *zip(pads[:n], pads[n:], strict=True)])
        found = getattr(torch.nn.functional, f"conv{n}d")(
            torch.from_numpy(padded),
            torch.tensor(w),
            None if b is None else torch.tensor(b),
            attributes["strides"] or 1,
            0,
            attributes["dilations"] or 1,
            attributes["group"] or 1,
        )
        return (found.numpy(),)


class MatMul(OpRun):
    """By torch, on all cores."""

    def _run(self, a: Any, b: Any) -> Any:
        return (torch.matmul(torch.tensor(a), torch.tensor(b)).numpy(),)


def evaluator(model: onnx.ModelProto) -> onnx.reference.ReferenceEvaluator:
    """Return what runs `model` in the dtype of its inputs."""
    own = [op for op in NEW_OPS if op.__name__ not in ("Conv", "MatMul")]
    return onnx.reference.ReferenceEvaluator(model, new_ops=[*own, Conv, MatMul])
