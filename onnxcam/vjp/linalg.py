"""Matrix products and what is made of them."""

import collections
import functools
import math
import string
from collections.abc import Sequence

import numpy as np
from onnx_ir import DataType, Value

from onnxcam.emit import Emitter
from onnxcam.errors import OnnxcamError
from onnxcam.vjp.registry import vjp
from onnxcam.vjp.shapes import (
    constant_ints,
    count,
    dims,
    expand_like,
    extent,
    is_constant,
    joined,
    pad_along,
    positions,
    rank,
    unbroadcast,
    unbroadcast_at_run_time,
)


def _transposed(op: Emitter, x: Value) -> Value:
    """Swap the last two axes."""
    order = list(range(rank(x)))
    order[-2:] = [order[-1], order[-2]]
    return op.Transpose(x, perm=order)


@vjp("MatMul")
def matmul(op: Emitter, dy: Value, y: Value, a: Value, b: Value) -> tuple[Value | None, Value | None]:
    """numpy.matmul: an operand of one dimension is a row (a) or a column (b) that is dropped again."""
    row, column = rank(a) == 1, rank(b) == 1
    wide_a = op.Unsqueeze(a, [0]) if row else a
    wide_b = op.Unsqueeze(b, [1]) if column else b
    if column:
        dy = op.Unsqueeze(dy, [-1])
    if row:
        dy = op.Unsqueeze(dy, [-2])
    da = db = None
    if not is_constant(a):
        da = _reduced_to(op, op.MatMul(dy, _transposed(op, wide_b)), wide_a, wide_b)
        da = op.Squeeze(da, [0]) if row else da
    if not is_constant(b):
        db = _reduced_to(op, op.MatMul(_transposed(op, wide_a), dy), wide_b, wide_a)
        db = op.Squeeze(db, [1]) if column else db
    return da, db


def _reduced_to(op: Emitter, dx: Value, x: Value, other: Value) -> Value | None:
    """Sum a matrix product's gradient over the batch axes along which `x` was broadcast to `other`."""
    return unbroadcast(op, dx, x, dx) if rank(other) > 2 else dx


@vjp("Gemm")
def gemm(
    op: Emitter,
    dy: Value,
    y: Value,
    a: Value,
    b: Value,
    c: Value | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,
    transB: int = 0,
) -> tuple[Value | None, Value | None, Value | None]:
    """Y = alpha a' b' + beta c, with a' and b' transposed where the attributes say so."""
    da = db = dc = None
    if is_constant(a):
        pass
    elif transA:
        da = op.Gemm(b, dy, alpha=alpha, transA=transB, transB=1)
    else:
        da = op.Gemm(dy, b, alpha=alpha, transB=1 - transB)
    if is_constant(b):
        pass
    elif transB:
        db = op.Gemm(dy, a, alpha=alpha, transA=1, transB=transA)
    else:
        db = op.Gemm(a, dy, alpha=alpha, transA=1 - transA)
    if c is not None and not is_constant(c):
        dc = unbroadcast(op, dy if beta == 1.0 else op.Mul(dy, beta), c, y)
    return da, db, dc


@vjp("Einsum")
def einsum(op: Emitter, dy: Value, y: Value, *xs: Value, equation: str) -> list[Value | None]:
    """The gradient of an operand is the product of dy and the other operands, as a sum to its letters."""
    terms, out, dots = _terms(equation, [rank(x) for x in xs])
    gradients: list[Value | None] = []
    for i, x in enumerate(xs):
        # dy comes first: onnx 1.23 infers the size of a broadcast letter from the first term that has it.
        others = [(out, dy, dims(y))]
        others += [(terms[j], other, dims(other)) for j, other in enumerate(xs) if j != i]
        gradients.append(None if is_constant(x) else _operand(op, x, terms[i], others, dots))
    return gradients


def _terms(equation: str, ranks: Sequence[int]) -> tuple[list[str], str, str]:
    """Return the terms of the operands, that of the output, and the letters that stand for an ellipsis."""
    left, arrow, out = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    free = [letter for letter in string.ascii_letters if letter not in equation]
    hidden = [
        n - len(term.replace("...", "")) if "..." in term else 0 for n, term in zip(ranks, terms, strict=True)
    ]
    dots = "".join(free[: max(hidden)])
    if not arrow:
        counts = collections.Counter(left.replace("...", "").replace(",", ""))
        out = "..." + "".join(sorted(letter for letter, n in counts.items() if n == 1))
    terms = [term.replace("...", dots[len(dots) - n :]) for n, term in zip(hidden, terms, strict=True)]
    return terms, out.replace("...", dots), dots


def _operand(
    op: Emitter,
    x: Value,
    term: str,
    others: Sequence[tuple[str, Value, Sequence[int | str | None]]],
    dots: str,
) -> Value | None:
    """The gradient of one operand of an Einsum.

    Args:
        op: where the nodes go.
        x: the operand.
        term: its letters.
        others: letters, value and sizes of the output's gradient and of every other operand.
        dots: letters that stand for an ellipsis, along which sizes of 1 are broadcast.
    """
    sizes = dict(zip(term, dims(x), strict=True))
    elsewhere = {
        letter: [size for t, _, shape in others for k, size in zip(t, shape, strict=True) if k == letter]
        for letter in sizes
    }
    # A letter of size 1 here and of another size elsewhere was broadcast: it is summed over.
    summed = [k for k in sizes if sizes[k] == 1 and any(size != 1 for size in elsewhere[k])]
    repeated = [k for k in sizes if sizes[k] != 1 and all(size == 1 for size in elsewhere[k])]
    kept = "".join(k for k in sizes if k not in summed and elsewhere[k])
    inputs = ",".join(t for t, _, _ in others)
    dx = others[0][1]
    if inputs != kept:
        dx = op.Einsum(*[v for _, v, _ in others], equation=f"{inputs}->{kept}")
    first = {k: term.index(k) for k in sizes}
    new = [axis for axis, k in enumerate(term) if k not in kept or axis != first[k]]
    if new:
        dx = op.Unsqueeze(dx, new)
    if repeated:
        dx = expand_like(op, dx, x, sorted(first[k] for k in repeated))
    if len(sizes) < len(term):
        dx = op.Where(_diagonal(op, x, term), dx, 0.0)
    if any(k in dots and not isinstance(sizes[k], int) and set(elsewhere[k]) != {sizes[k]} for k in sizes):
        dx = unbroadcast_at_run_time(op, dx, x)
    return dx


def _diagonal(op: Emitter, x: Value, term: str) -> Value:
    """Whether the positions along all axes with the same letter are equal, for each element of `x`."""
    mask = None
    for axis, letter in enumerate(term):
        first = term.index(letter)
        if first == axis:
            continue
        line = positions(op, x, axis)
        row = op.Reshape(line, [-1 if i == first else 1 for i in range(len(term))])
        column = op.Reshape(line, [-1 if i == axis else 1 for i in range(len(term))])
        equal = op.Equal(row, column)
        mask = equal if mask is None else op.And(mask, equal)
    assert mask is not None
    return mask


@vjp("Det")
def det(op: Emitter, dy: Value, y: Value, x: Value) -> Value:
    """The matrix of cofactors, which a singular matrix has too (Jacobi's formula has not)."""
    n = dims(x)[-1]
    if not isinstance(n, int):
        n = dims(x)[-2]
    if not isinstance(n, int):
        raise OnnxcamError(f"the size of the matrices of a Det ({x.name!r}) is unknown")
    dy = op.Unsqueeze(dy, [-2, -1])
    if n == 1:
        return dy
    # [..., n, n] -> [..., n, n-1, n, n-1] -> [..., n, n, n-1, n-1]: each row and column left out in turn.
    left = np.array([[j for j in range(n) if j != i] for i in range(n)])
    lead = rank(x) - 2
    minors = op.Gather(op.Gather(x, left, axis=lead), left, axis=lead + 2)
    minors = op.Transpose(minors, perm=[*range(lead), lead, lead + 2, lead + 1, lead + 3])
    signs = np.array([[(-1) ** (i + j) for j in range(n)] for i in range(n)], x.dtype.numpy())  # type: ignore[union-attr]
    return op.Mul(dy, op.Mul(op.Det(minors), signs))


@vjp("Attention")
def attention(
    op: Emitter,
    dys: tuple[Value | None, ...],
    ys: tuple[Value, ...],
    query: Value,
    key: Value,
    value: Value,
    mask: Value | None = None,
    past_key: Value | None = None,
    past_value: Value | None = None,
    valid: Value | None = None,
    *,
    is_causal: int = 0,
    kv_num_heads: int | None = None,
    left_window_size: int = -1,
    q_num_heads: int | None = None,
    qk_matmul_output_mode: int = 0,
    right_window_size: int = -1,
    scale: float | None = None,
    softcap: float = 0.0,
    softmax_precision: int | None = None,
) -> list[Value | None]:
    """Y = P V with P = softmax(cap(scale Q K') + bias) (Vaswani et al. 2017); a row without keys is 0.

    P is worked out again: the operator does not give it.
    """
    if dys[0] is None or any(dy is not None for dy in dys[1:]):
        raise OnnxcamError("there is a gradient rule only for the first output of Attention")
    if value.dtype != query.dtype:
        raise OnnxcamError("Attention with values of another type than the queries has no gradient rule")
    in_rows = rank(query) == 3
    q, k, v, dout = query, key, value, dys[0]
    if in_rows:
        q, dout = _split_heads(op, q, q_num_heads), _split_heads(op, dout, q_num_heads)
        k, v = _split_heads(op, k, kv_num_heads), _split_heads(op, v, kv_num_heads)
    now = op.Shape(k, start=2, end=3)
    past = None
    if past_key is not None and past_value is not None:
        past = op.Shape(past_key, start=2, end=3)
        k, v = op.Concat(past_key, k, axis=2), op.Concat(past_value, v, axis=2)
    shared = dims(q)[1] is None or dims(q)[1] != dims(k)[1]
    keys, values = (_repeat_heads(op, k, q), _repeat_heads(op, v, q)) if shared else (k, v)
    if scale is None:
        width = dims(q)[3]
        if isinstance(width, int):
            scale = 1.0 / math.sqrt(width)
        else:
            scale = op.Reciprocal(op.Sqrt(op.CastLike(op.Shape(q, start=3, end=4), q)))
    logits = op.Mul(op.MatMul(q, _transposed(op, keys)), scale)
    if softcap:
        tanh = op.Tanh(op.Div(logits, softcap))
        logits = op.Mul(tanh, softcap)
    window = (left_window_size, 0 if is_causal else right_window_size)
    p = _attention_weights(op, q, keys, logits, mask, past, valid, window, softmax_precision)
    dv = op.MatMul(_transposed(op, p), dout)
    dp = op.Mul(op.MatMul(dout, _transposed(op, values)), p)
    dlogits = op.Sub(dp, op.Mul(p, op.ReduceSum(dp, [-1], keepdims=1)))
    dmask = None
    if mask is not None and mask.dtype is not None and mask.dtype.is_floating_point():
        dmask = _mask_gradient(op, dlogits, mask, keys)
    if softcap:
        dlogits = op.Mul(dlogits, op.Sub(1.0, op.Mul(tanh, tanh)))
    dlogits = op.Mul(dlogits, scale)
    dq, dk = op.MatMul(dlogits, keys), op.MatMul(_transposed(op, dlogits), q)
    if shared:
        dk, dv = _sum_heads(op, dk, k), _sum_heads(op, dv, v)
    dpast_key = dpast_value = None
    if past is not None:
        parts = op.Concat(past, now, axis=0)
        dpast_key, dk = op.Split(dk, parts, axis=2, outputs=2)
        dpast_value, dv = op.Split(dv, parts, axis=2, outputs=2)
    if in_rows:
        dq, dk, dv = (op.Reshape(op.Transpose(d, perm=[0, 2, 1, 3]), [0, 0, -1]) for d in (dq, dk, dv))
    return [dq, dk, dv, dmask, dpast_key, dpast_value]


def _split_heads(op: Emitter, x: Value, heads: int | None) -> Value:
    """View [N,L,H*D] as [N,H,L,D]."""
    return op.Transpose(op.Reshape(x, [0, 0, heads, -1]), perm=[0, 2, 1, 3])


def _repeat_heads(op: Emitter, k: Value, q: Value) -> Value:
    """Give each of the heads [N,H,...] of `q` the head of `k` that it shares with others of its group."""
    group = op.Div(op.Shape(q, start=1, end=2), op.Shape(k, start=1, end=2))
    return op.Gather(k, op.Div(positions(op, q, 1), group), axis=1)


def _sum_heads(op: Emitter, dk: Value, k: Value) -> Value:
    apart = op.Reshape(dk, joined(op, [0, extent(op, k, 1), -1, extent(op, k, 2), extent(op, k, 3)]))
    return op.ReduceSum(apart, [2], keepdims=0)


def _attention_weights(
    op: Emitter,
    q: Value,
    k: Value,
    logits: Value,
    mask: Value | None,
    past: Value | None,
    valid: Value | None,
    window: tuple[int, int],
    softmax_precision: int | None,
) -> Value:
    """Return the softmax of the logits where attention is allowed, zeros elsewhere.

    Args:
        op: where the nodes go.
        q: the queries [N,H,L,D].
        k: the keys [N,H,S,D].
        logits: [N,H,L,S].
        mask: added to the logits, or true where attention is allowed; it is broadcast to them.
        past: how many keys come before the first query's place.
        valid: how many keys of each sample count [N]; the queries stand at the last of these.
        window: how far a query sees to the left and to the right of its place; -1: without end.
        softmax_precision: the dtype of the softmax.
    """
    allowed: list[Value] = []
    if mask is not None:
        mask = _padded_mask(op, mask, k, logits)
        if mask.dtype != DataType.BOOL:
            logits = op.Add(logits, mask)
            mask = op.Greater(mask, -math.inf)
        allowed.append(mask)
    place = op.Unsqueeze(positions(op, q, 2), [1])
    keys = positions(op, k, 2)
    if past is not None:
        place = op.Add(place, past)
    if valid is not None:
        known = op.Reshape(valid, [-1, 1, 1, 1])
        place = op.Add(place, op.Sub(known, op.Shape(q, start=2, end=3)))
        allowed.append(op.Less(keys, known))
    left, right = window
    if right >= 0:
        allowed.append(op.LessOrEqual(keys, op.Add(place, right)))
    if left >= 0:
        allowed.append(op.GreaterOrEqual(keys, op.Sub(place, left)))
    everywhere = functools.reduce(op.And, allowed) if allowed else None
    if everywhere is not None:
        logits = op.Where(everywhere, logits, float(logits.dtype.min))  # type: ignore[union-attr]
    if softmax_precision is None:
        p = op.Softmax(logits, axis=-1)
    else:
        p = op.CastLike(op.Softmax(op.Cast(logits, to=softmax_precision), axis=-1), q)
    return p if everywhere is None else op.Where(everywhere, p, 0.0)


def _padded_mask(op: Emitter, mask: Value, k: Value, logits: Value) -> Value:
    """Let a mask that is shorter than the keys forbid the rest of them."""
    is_bool = mask.dtype == DataType.BOOL
    if not is_bool and mask.dtype != logits.dtype:
        mask = op.CastLike(mask, logits)
    if _spans(mask, k):
        return mask
    missing = op.Sub(op.Shape(k, start=2, end=3), op.Shape(mask, start=-1))
    fill = None if is_bool else -math.inf
    return pad_along(op, mask, op.Concat(np.array([0]), missing, axis=0), [-1], fill)


def _spans(mask: Value, k: Value) -> bool:
    """Whether the mask is known to be as long as the keys [N,H,L,D]."""
    return dims(mask)[-1] is not None and dims(mask)[-1] == dims(k)[2]


def _mask_gradient(op: Emitter, dlogits: Value, mask: Value, k: Value) -> Value | None:
    if not _spans(mask, k):
        dlogits = op.Slice(dlogits, [0], op.Shape(mask, start=-1), [-1])
    return op.CastLike(unbroadcast(op, dlogits, mask, dlogits), mask)


@vjp("DFT")
def dft(
    op: Emitter,
    dy: Value,
    y: Value,
    x: Value,
    dft_length: Value | None = None,
    axis_input: Value | None = None,
    *,
    axis: int = 1,
    inverse: int = 0,
    onesided: int = 0,
) -> Value:
    """The adjoint of the transform F / s is its conjugate, n times the inverse transform / s."""
    node = y.producer()
    assert node is not None
    assert node.graph is not None
    by_input = node.graph.opset_imports[""] >= 20
    if by_input:
        given = constant_ints(axis_input, "the axis of a DFT")
        axis = -2 if given is None else given[0]
    at = axis % rank(x)
    where = {} if by_input else {"axis": at}
    operand = np.int64(at) if by_input else None
    if inverse:
        # The inverse transform of half a spectrum counts the other half, which is its conjugate, too.
        dx = op.DFT(dy, None, operand, onesided=onesided, **where)
        dx = op.Div(dx, count(op, y, [at]))
        if onesided:
            dx = op.Mul(dx, _multiplicity(op, dx, y, at))
    else:
        n = count(op, x, [at]) if dft_length is None else op.CastLike(dft_length, x)
        length = dft_length if dft_length is not None else op.Squeeze(op.Shape(x, start=at, end=at + 1), [0])
        dx = op.Mul(op.DFT(dy, length if onesided else None, operand, inverse=1, **where), n)
    if dft_length is not None or (inverse and onesided):
        size = op.Shape(x, start=at, end=at + 1)
        dx = op.Slice(dx, [0], size, [at])
        missing = op.Sub(size, op.Shape(dx, start=at, end=at + 1))
        dx = pad_along(op, dx, op.Concat(np.array([0]), missing, axis=0), [at])
    parts = dims(x)[-1]
    return dx if parts == 2 else op.Slice(dx, [0], op.Shape(x, start=-1), [-1])


def _multiplicity(op: Emitter, half: Value, y: Value, axis: int) -> Value:
    """How often each frequency of half a spectrum occurs in the whole one: 2, but 1 at 0 and n/2."""
    k = op.Mul(positions(op, half, axis), 2)
    once = op.Or(op.Equal(k, 0), op.Equal(k, op.Shape(y, start=axis, end=axis + 1)))
    line = op.Where(once, np.int64(1), np.int64(2))
    return op.CastLike(op.Reshape(line, [-1 if i == axis else 1 for i in range(rank(half))]), half)
