"""What of the scores is explained, and the inputs by which a run says it."""

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import onnx_ir as ir
from onnx_ir import Value

from onnxcam.emit import Emitter
from onnxcam.errors import OnnxcamError
from onnxcam.seed import Seeds
from onnxcam.sizes import sharpen
from onnxcam.vjp.shapes import dims, rank

CLASS, AGAINST, MASK, SEED = "cam_class", "cam_against", "cam_mask", "cam_seed"
"""Names of the inputs."""

RIVALS = 3
"""How many classes of the nearest scores are rivals; Finer-CAM (Zhang et al. 2025, arXiv:2501.11309): 3."""


Contrast: TypeAlias = "Callable[[Emitter, Value, Value, Value], Value]"
"""``contrast(op, scores, index, rivals)``: what the score of a class less its rivals' is, as its gradient
[N,K,M] by the scores [N,M]; ``index`` is int64 [N,K], ``rivals`` int64 [N,K,R]."""


def less_mean(op: Emitter, scores: Value, index: Value, rivals: Value, strength: float = 1.0) -> Value:
    """The score less `strength` times the mean of the rivals'. Zhang et al. 2025, arXiv:2501.11309."""
    others = op.ReduceMean(one_hot(op, rivals, scores), [2], keepdims=0)
    return op.Sub(one_hot(op, index, scores), others if strength == 1.0 else op.Mul(others, strength))


def inputs_of(target: str, dense: bool) -> list[str]:
    """Names of the inputs that `target` adds, for scores [N,M] or `dense` ones [N,M,H,W]."""
    if target == "seed":
        return [SEED]
    return [CLASS, *([AGAINST] if target == "contrast" else []), *([MASK] if dense else [])]


def add_seeds(
    op: Emitter,
    target: str,
    ranked: Value,
    scores: Value,
    optional: bool,
    contrast: Contrast = less_mean,
) -> Seeds:
    """Add the inputs of `target` to the graph and return the sums of scores that they ask for.

    Args:
        op: where the nodes go.
        target: one of ``onnxcam.card.TARGETS``.
        ranked: what says which class is best, of the shape of `scores`.
        scores: what is explained: [N,M], or [N,M,H,W], whose sum over the mask is the score of a class; for
            ``seed`` of any shape [N,...].
        optional: whether the inputs have defaults, where there are sensible ones.
        contrast: what ``rivals`` explains.
    """
    if target == "seed":
        seed = Value(name=SEED, shape=scores.shape, type=scores.type)
        op.graph.inputs.append(seed)
        return Seeds((op.Unsqueeze(seed, [1]),), lambda rows: rows)
    classes = _request(op, CLASS, -1, optional, scores)
    against = _request(op, AGAINST, -2, optional, scores) if target == "contrast" else None
    dense, mask = scores, _mask(op, scores, optional) if rank(scores) == 4 else None
    if mask is not None:
        ranked, scores = _totals(op, ranked, mask), _totals(op, scores, mask)
    index, valid = resolve_classes(op, ranked, classes)
    if op.portable:
        index.shape = valid.shape = ir.Shape([dims(scores)[0], 1])
    if against is not None:
        other, known = resolve_classes(op, ranked, against)
        # One class to compare with may serve all K.
        other, known = (op.Expand(value, op.Shape(index)) for value in (other, known))
        valid = op.And(valid, known)
        seeds = Seeds(
            (index, other), lambda a, b: op.Sub(one_hot(op, a, scores), one_hot(op, b, scores)), valid
        )
    elif target == "rivals":
        if dims(scores)[1] == 1:
            raise OnnxcamError("the only class has no rivals; explain its score: --target class")
        weights = contrast(op, scores, index, _rivals(op, scores, index))
        sharpen(weights, [*dims(index), dims(scores)[1]])
        seeds = Seeds((weights,), lambda rows: rows, valid)
    else:
        seeds = Seeds((index,), lambda a: one_hot(op, a, scores), valid)
    return seeds if mask is None else _over_mask(op, seeds, mask, dense)


def _request(op: Emitter, name: str, default: int, optional: bool, scores: Value) -> Value:
    """Add an input that asks for classes: for any number of them, or for one where that must be portable."""
    images: int | str | None = "cam_images" if name == CLASS else None
    classes: int | str | None = "cam_classes" if name == CLASS else None
    shape = ir.Shape([1 if dims(scores)[0] == 1 else images, 1 if op.portable else classes])
    value = Value(name=name, shape=shape, type=ir.TensorType(ir.DataType.INT64))
    return add_input(op, value, np.array([[default]], np.int64) if optional else None)


def _mask(op: Emitter, scores: Value, optional: bool) -> Value:
    """Add the input that weighs the places of dense scores, [N,H,W] or with sizes of 1: all of them alike."""
    value = Value(name=MASK, shape=ir.Shape([None, None, None]), type=scores.type)
    assert scores.dtype is not None
    return add_input(op, value, np.ones((1, 1, 1), scores.dtype.numpy()) if optional else None)


def add_input(op: Emitter, value: Value, default: np.ndarray | None) -> Value:
    """Add an input to the graph; with a default it may be left out."""
    op.graph.inputs.append(value)
    if default is not None:
        value.const_value = ir.tensor(default, name=value.name)
        op.graph.register_initializer(value)
    return value


def _totals(op: Emitter, scores: Value, mask: Value) -> Value:
    """Sum scores [N,M,H,W] over a mask: [N,M]."""
    return op.ReduceSum(op.Mul(scores, op.Unsqueeze(mask, [1])), [2, 3], keepdims=0)


def _over_mask(op: Emitter, seeds: Seeds, mask: Value, dense: Value) -> Seeds:
    """Seeds of `dense` scores [N,M,H,W] from those of their sums; each row brings its image's mask along."""
    rows = op.Concat(op.Shape(seeds.items[0], start=0, end=2), op.Shape(mask, start=1), axis=0)
    masks = op.Expand(op.Unsqueeze(mask, [1]), rows)

    def weights(*given: Value) -> Value:
        *items, weight = given
        weighed = op.Mul(op.Unsqueeze(seeds.weights(*items), [2, 3]), op.Unsqueeze(weight, [1]))
        return op.Expand(weighed, op.Concat(np.array([1, 1]), op.Shape(dense, start=2), axis=0))

    return Seeds((*seeds.items, masks), weights, seeds.valid)


def _rivals(op: Emitter, scores: Value, index: Value) -> Value:
    """The classes whose scores are nearest to those of the classes asked for, int64 [N,K,R]."""
    own = op.Unsqueeze(op.GatherElements(scores, index, axis=1), [2])
    distance = op.Abs(op.Sub(op.Unsqueeze(scores, [1]), own))
    flat = op.Reshape(one_hot(op, op.Reshape(index, [-1]), scores), op.Shape(distance))
    distance = op.Where(op.Greater(flat, 0.0), np.inf, distance)
    others = op.Min(op.Sub(op.Shape(scores, start=1, end=2), 1), np.array([RIVALS]))
    _, nearest = op.TopK(distance, others, largest=0, outputs=2)
    return nearest


def resolve_classes(op: Emitter, scores: Value, classes: Value) -> tuple[Value, Value]:
    """Turn a request for classes into class indices that are safe to use.

    Args:
        op: where the nodes go.
        scores: [N,M].
        classes: int64 [N,K] or [1,K]: a class index, or -1 for the best class of the image, -2 for the
            second, and so on.

    Returns:
        The class indices, int64 [N,K] within 0..M-1, and a mask [N,K] that is false where the request
        was outside -M..M-1.
    """
    images, known = dims(scores)
    count = np.array(known) if isinstance(known, int) else op.Squeeze(op.Shape(scores, start=1, end=2), [0])
    least, last = (-count, count - 1) if isinstance(count, np.ndarray) else (op.Neg(count), op.Sub(count, 1))
    asked = classes
    if images != 1:
        asked = op.Expand(classes, op.Concat(op.Shape(scores, start=0, end=1), np.array([1]), axis=0))
    inside = op.Clip(asked, least, last)
    place = op.Max(op.Sub(-1, inside), 0)
    deepest = op.Reshape(op.Add(op.ReduceMax(place, keepdims=0), 1), [1])
    # Before opset 24 no TopK reads bfloat16.
    wide = op.Cast(scores, to=ir.DataType.FLOAT) if scores.dtype == ir.DataType.BFLOAT16 else scores
    _, ranked = op.TopK(wide, deepest, outputs=2)
    by_rank = op.GatherElements(ranked, place, axis=1)
    index = op.Where(op.Less(inside, 0), by_rank, inside)
    valid = op.Equal(asked, inside)
    return index, valid


def one_hot(op: Emitter, index: Value, scores: Value) -> Value:
    """Return 1 at `index` [...] and 0 elsewhere, [...,M] for scores [N,M] and in their dtype."""
    assert scores.dtype is not None
    count = dims(scores)[1]
    depth = np.int64(count) if isinstance(count, int) else op.Squeeze(op.Shape(scores, start=1, end=2), [0])
    if scores.dtype == ir.DataType.BFLOAT16:  # which no OneHot has
        return op.Cast(op.OneHot(index, depth, np.array([0, 1], np.float32)), to=scores.dtype)
    return op.OneHot(index, depth, np.array([0, 1], scores.dtype.numpy()))
