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


class MaxPool(OpRun):
    """By torch; onnx.reference gets some sizes with ceil_mode wrong."""

    def _run(self, x: Any, **attributes: Any) -> Any:
        n = x.ndim - 2
        pads = attributes["pads"] or [0] * 2 * n
        if attributes["auto_pad"] not in ("NOTSET", "VALID"):
            raise NotImplementedError(attributes["auto_pad"])
        room = [(0, 0), (0, 0), *zip(pads[:n], pads[n:], strict=True)]
        found, at = getattr(torch.nn.functional, f"max_pool{n}d")(
            torch.from_numpy(np.pad(x, room, constant_values=-np.inf)),
            attributes["kernel_shape"],
            attributes["strides"] or 1,
            0,
            attributes["dilations"] or 1,
            bool(attributes["ceil_mode"]),
            return_indices=True,
        )
        places = np.unravel_index(
            at.numpy(), [size + sum(r) for size, r in zip(x.shape, room, strict=True)][2:]
        )
        inside = [p - begin for p, begin in zip(places, pads[:n], strict=True)]
        return found.numpy(), np.ravel_multi_index(inside, x.shape[2:])


class Pad(OpRun):
    """With constants; onnx.reference does not know negative pads, which cut off."""

    def _run(self, x: Any, pads: Any, value: Any = None, axes: Any = None, mode: Any = None) -> Any:
        if mode not in (None, "constant"):
            raise NotImplementedError(mode)
        along = list(range(x.ndim)) if axes is None else [int(axis) % x.ndim for axis in axes]
        room, keep = [(0, 0)] * x.ndim, [slice(None)] * x.ndim
        for axis, before, after in zip(along, pads[: len(along)], pads[len(along) :], strict=True):
            room[axis] = (max(int(before), 0), max(int(after), 0))
            keep[axis] = slice(max(-int(before), 0), x.shape[axis] - max(-int(after), 0))
        fill = 0 if value is None else np.asarray(value).reshape(())
        return (np.pad(x[tuple(keep)], room, constant_values=fill).astype(x.dtype),)


class MatMul(OpRun):
    """By torch, on all cores."""

    def _run(self, a: Any, b: Any) -> Any:
        return (torch.matmul(torch.tensor(a), torch.tensor(b)).numpy(),)


def evaluator(model: onnx.ModelProto) -> onnx.reference.ReferenceEvaluator:
    """Return what runs `model` in the dtype of its inputs."""
    faster = (Conv, MaxPool, Pad, MatMul)
    own = [op for op in NEW_OPS if op.__name__ not in {op.__name__ for op in faster}]
    return onnx.reference.ReferenceEvaluator(model, new_ops=[*own, *faster])
