"""Operators of onnxruntime, which its optimiser writes into the files that it saves.

Most are a standard operator with an activation or an addition before or after it, and their rules are
those of the parts. What lies between the parts is computed again by standard operators, and removed
with all dead nodes where the rule turns out not to read it.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from onnx_ir import Value

from onnxcam.contrib import DOMAIN
from onnxcam.emit import Emitter
from onnxcam.errors import OnnxcamError
from onnxcam.vjp import activation as functions
from onnxcam.vjp.conv import conv, kernel_size
from onnxcam.vjp.elementwise import identity
from onnxcam.vjp.linalg import gemm, matmul
from onnxcam.vjp.norm import layer_normalization, rms_normalization
from onnxcam.vjp.registry import vjp
from onnxcam.vjp.shapes import is_constant, rank, unbroadcast

Pair = tuple[Value | None, Value | None]


def _clip(op: Emitter, dy: Value, y: Value, x: Value, *, low: float, high: float) -> Value:
    assert y.dtype is not None
    bounds = [op.constant(np.array(bound, y.dtype.numpy())) for bound in (low, high)]
    return functions.clip(op, dy, y, x, *bounds)[0]


_ACTIVATIONS: Mapping[str, tuple[Callable[..., Value], tuple[str, ...]]] = {
    "": (identity, ()),
    "Celu": (functions.celu, ("alpha",)),
    "Clip": (_clip, ("low", "high")),
    "Elu": (functions.elu, ("alpha",)),
    "HardSigmoid": (functions.hard_sigmoid, ("alpha", "beta")),
    "HardSwish": (functions.hard_swish, ()),
    "LeakyRelu": (functions.leaky_relu, ("alpha",)),
    "Relu": (functions.relu, ()),
    "Selu": (functions.selu, ("alpha", "gamma")),
    "Sigmoid": (functions.sigmoid, ()),
    "Softplus": (functions.softplus, ()),
    "Softsign": (functions.softsign, ()),
    "Tanh": (functions.tanh, ()),
    "ThresholdedRelu": (functions.thresholded_relu, ("alpha",)),
}
"""The rule of each activation and the parameters that onnxruntime requires for it, in FusedConv's order."""


def _through(
    op: Emitter,
    dy: Value,
    y: Value,
    before: Value,
    operator: str,
    activation: str,
    given: "Mapping[str, float | None] | Sequence[float]",
) -> Value:
    """Pass `dy` back through an activation whose parameters are given by name or in order."""
    if activation not in _ACTIVATIONS:
        raise OnnxcamError(f"there is no gradient rule for {operator} with the activation {activation}")
    rule, names = _ACTIVATIONS[activation]
    values = [given[name] for name in names] if isinstance(given, Mapping) else given[: len(names)]
    if len(values) < len(names) or None in values:
        raise OnnxcamError(f"{operator} with the activation {activation} lacks {', '.join(names)}")
    return rule(op, dy, y, before, **dict(zip(names, values, strict=True)))


@vjp("FusedConv", domain=DOMAIN)
def fused_conv(
    op: Emitter,
    dy: Value,
    y: Value,
    x: Value,
    w: Value,
    b: Value | None = None,
    z: Value | None = None,
    *,
    activation: str = "",
    activation_params: Sequence[float] = (),
    auto_pad: str = "NOTSET",
    dilations: list[int] | None = None,
    group: int = 1,
    kernel_shape: list[int] | None = None,
    pads: list[int] | None = None,
    strides: list[int] | None = None,
) -> tuple[Value | None, ...]:
    """Y = activation(Conv(X, W, B) + Z)."""
    kernel = kernel_size(kernel_shape, w)
    n = len(kernel)
    attributes = {
        "auto_pad": auto_pad,
        "dilations": dilations or [1] * n,
        "group": group,
        "kernel_shape": kernel,
        "pads": pads or ([0] * 2 * n if auto_pad == "NOTSET" else None),
        "strides": strides or [1] * n,
    }
    before = op.Conv(x, w, b, **attributes)
    if z is not None:
        before = op.Add(before, z)
    dbefore = _through(op, dy, y, before, "FusedConv", activation, activation_params)
    return *conv(op, dbefore, y, x, w, b, **attributes), dbefore  # type: ignore[arg-type]


@vjp("FusedGemm", domain=DOMAIN)
def fused_gemm(
    op: Emitter,
    dy: Value,
    y: Value,
    a: Value,
    b: Value,
    c: Value | None = None,
    *,
    activation: str = "",
    activation_alpha: float | None = None,
    activation_beta: float | None = None,
    activation_gamma: float | None = None,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,
    transB: int = 0,
) -> tuple[Value | None, Value | None, Value | None]:
    """Y = activation(Gemm(A, B, C))."""
    given = {"alpha": activation_alpha, "beta": activation_beta, "gamma": activation_gamma}
    before = op.Gemm(a, b, c, alpha=alpha, beta=beta, transA=transA, transB=transB)
    dbefore = _through(op, dy, y, before, "FusedGemm", activation, given)
    return gemm(op, dbefore, y, a, b, c, alpha=alpha, beta=beta, transA=transA, transB=transB)


@vjp("FusedMatMul", "TransposeMatMul", domain=DOMAIN)
def fused_matmul(
    op: Emitter,
    dy: Value,
    y: Value,
    a: Value,
    b: Value,
    *,
    alpha: float = 1.0,
    transA: int = 0,
    transB: int = 0,
    transBatchA: int = 0,
    transBatchB: int = 0,
) -> Pair:
    """Y = alpha MatMul(a', b'), with the axes of a' and b' in the order that the attributes tell."""
    order_a = _order(rank(a), transA, transBatchA)
    order_b = _order(rank(b), transB, transBatchB)
    scaled = dy if alpha == 1.0 else op.Mul(dy, alpha)
    da, db = matmul(op, scaled, y, _in_order(op, a, order_a), _in_order(op, b, order_b))
    return (
        None if da is None else _in_order(op, da, [int(i) for i in np.argsort(order_a)]),
        None if db is None else _in_order(op, db, [int(i) for i in np.argsort(order_b)]),
    )


def _order(ndim: int, transposed: int, batch_transposed: int) -> list[int]:
    """The order of the axes in which an operand with these attributes enters the product."""
    order = list(range(ndim))
    if batch_transposed:
        order = [*order[1:-1], 0, order[-1]]
    if transposed and ndim > 1:
        order[-2:] = [order[-1], order[-2]]
    return order


def _in_order(op: Emitter, v: Value, order: list[int]) -> Value:
    return v if order == sorted(order) else op.Transpose(v, perm=order)


@vjp("Gelu", domain=DOMAIN)
def gelu(op: Emitter, dy: Value, y: Value, x: Value) -> Value:
    return functions.gelu(op, dy, y, x)


@vjp("BiasGelu", domain=DOMAIN)
def bias_gelu(op: Emitter, dy: Value, y: Value, x: Value, bias: Value) -> Pair:
    """Y = Gelu(X + bias)."""
    dx = functions.gelu(op, dy, y, op.Add(x, bias))
    return dx, None if is_constant(bias) else unbroadcast(op, dx, bias, y)


@vjp("FastGelu", domain=DOMAIN)
def fast_gelu(op: Emitter, dy: Value, y: Value, x: Value, bias: Value | None = None) -> Pair:
    """Y = Gelu(X + bias) in its tanh form."""
    before = x if bias is None else op.Add(x, bias)
    dx = functions.gelu(op, dy, y, before, approximate="tanh")
    return dx, None if bias is None or is_constant(bias) else unbroadcast(op, dx, bias, y)


@vjp("QuickGelu", domain=DOMAIN)
def quick_gelu(op: Emitter, dy: Value, y: Value, x: Value, *, alpha: float = 1.702) -> Value:
    return functions.swish(op, dy, y, x, alpha=alpha)


@vjp("SkipLayerNormalization", domain=DOMAIN)
def skip_layer_normalization(
    op: Emitter,
    dys: tuple[Value | None, ...],
    ys: tuple[Value, ...],
    x: Value,
    skip: Value,
    scale: Value,
    bias: Value | None = None,
    offset: Value | None = None,
    *,
    epsilon: float = 1e-12,
) -> tuple[Value | None, ...]:
    """Y = LayerNormalization(S, scale, bias) with S = X + skip + offset, which is the fourth output."""
    dscale = dbias = None
    total, dtotal = _total(op, dys, ys, x, skip, offset)
    if dys[0] is not None:
        found, dscale, dbias = layer_normalization(op, dys[0], ys[0], total, scale, bias, epsilon=epsilon)
        dtotal = found if dtotal is None else op.Add(found, dtotal)
    return dtotal, _share(op, dtotal, skip, ys[0]), dscale, dbias, _share(op, dtotal, offset, ys[0])


@vjp("SkipSimplifiedLayerNormalization", domain=DOMAIN)
def skip_simplified_layer_normalization(
    op: Emitter,
    dys: tuple[Value | None, ...],
    ys: tuple[Value, ...],
    x: Value,
    skip: Value,
    scale: Value,
    offset: Value | None = None,
    *,
    epsilon: float = 1e-12,
) -> tuple[Value | None, ...]:
    """Y = RMSNormalization(S, scale) with S = X + skip + offset, which is the fourth output."""
    dscale = None
    total, dtotal = _total(op, dys, ys, x, skip, offset)
    if dys[0] is not None:
        found, dscale = rms_normalization(op, dys[0], ys[0], total, scale, epsilon=epsilon)
        dtotal = found if dtotal is None else op.Add(found, dtotal)
    return dtotal, _share(op, dtotal, skip, ys[0]), dscale, _share(op, dtotal, offset, ys[0])


def _total(
    op: Emitter,
    dys: tuple[Value | None, ...],
    ys: tuple[Value, ...],
    x: Value,
    skip: Value,
    offset: Value | None,
) -> tuple[Value, Value | None]:
    """Return the sum that is normalised, and the gradient that arrives at it where it is an output."""
    if any(dy is not None for dy in dys[1:3]):
        raise OnnxcamError("there is no gradient through the mean and deviation of a SkipLayerNormalization")
    total = op.Add(x, skip)
    if offset is not None:
        total = op.Add(total, offset)
    return total, dys[3] if len(dys) > 3 else None


def _share(op: Emitter, dtotal: Value | None, part: Value | None, y: Value) -> Value | None:
    return None if part is None or is_constant(part) else unbroadcast(op, dtotal, part, y)


@vjp("SimplifiedLayerNormalization")
def simplified_layer_normalization(
    op: Emitter,
    dy: Value,
    y: Value,
    x: Value,
    scale: Value,
    *,
    axis: int = -1,
    epsilon: float = 1e-5,
    stash_type: int = 1,
) -> Pair:
    """RMSNormalization under the name that onnxruntime gave it, in ONNX's own domain."""
    return rms_normalization(op, dy, y, x, scale, axis=axis, epsilon=epsilon, stash_type=stash_type)
