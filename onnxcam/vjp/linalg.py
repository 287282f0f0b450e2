"""Matrix products."""

from onnx_ir import Value

from onnxcam.emit import Emitter
from onnxcam.vjp.registry import vjp
from onnxcam.vjp.shapes import rank, reshape_like, unbroadcast


def _transposed(op: Emitter, x: Value) -> Value:
    """Swap the last two axes."""
    order = list(range(rank(x)))
    order[-2:] = [order[-1], order[-2]]
    return op.Transpose(x, perm=order)


def _reduced_to(op: Emitter, dy: Value, x: Value) -> Value:
    """Sum a matrix product's gradient over the batch axes along which `x` was broadcast."""
    reduced = unbroadcast(op, dy, x, dy)
    assert reduced is not None
    return reduced


@vjp("MatMul")
def matmul(op: Emitter, dy: Value, y: Value, a: Value, b: Value) -> tuple[Value, Value]:
    """numpy.matmul: an operand of one dimension is a row (a) or a column (b) that is dropped again."""
    row, column = rank(a) == 1, rank(b) == 1
    wide_a = op.Unsqueeze(a, [0]) if row else a
    wide_b = op.Unsqueeze(b, [1]) if column else b
    if column:
        dy = op.Unsqueeze(dy, [-1])
    if row:
        dy = op.Unsqueeze(dy, [-2])
    da = _reduced_to(op, op.MatMul(dy, _transposed(op, wide_b)), wide_a)
    db = _reduced_to(op, op.MatMul(_transposed(op, wide_a), dy), wide_b)
    return reshape_like(op, da, a) if row else da, reshape_like(op, db, b) if column else db


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
) -> tuple[Value, Value, Value | None]:
    """Y = alpha a' b' + beta c, with a' and b' transposed where the attributes say so."""
    if transA:
        da = op.Gemm(b, dy, alpha=alpha, transA=transB, transB=1)
    else:
        da = op.Gemm(dy, b, alpha=alpha, transB=1 - transB)
    if transB:
        db = op.Gemm(dy, a, alpha=alpha, transA=1, transB=transA)
    else:
        db = op.Gemm(a, dy, alpha=alpha, transA=1 - transA)
    dc = None if c is None else unbroadcast(op, op.Mul(dy, beta), c, y)
    return da, db, dc
