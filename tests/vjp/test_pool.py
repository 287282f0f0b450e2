import contextlib
import math

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from onnx.reference.op_run import OpRun

from onnxcam.errors import OnnxcamError
from tests import checks
from tests.checks import check_vjp, dtypes_of_gradients, quiet

RNG = np.random.default_rng(1)
BOTH = pytest.mark.parametrize("symbolic", [False, True])


def normal(*shape):
    return RNG.standard_normal(shape)


def distinct(*shape):
    """Values far enough apart that central differences do not swap the maximum."""
    return RNG.permutation(math.prod(shape)).reshape(shape) / 7.0


def taps(size, kernel, stride, dilation, begin, end, auto_pad, ceil_mode):
    """The positions that each window along one axis reads, [out, kernel], and the padding."""
    extent = dilation * (kernel - 1) + 1
    if auto_pad.startswith("SAME"):
        out = -(-size // stride)
        total = max((out - 1) * stride + extent - size, 0)
        begin = total // 2 if auto_pad == "SAME_UPPER" else total - total // 2
        end = total - begin
    else:
        if auto_pad == "VALID":
            begin = end = 0
        spare = size + begin + end - extent
        out = (-(-spare // stride) if ceil_mode else spare // stride) + 1
        if (out - 1) * stride >= size + begin:
            out -= 1
    return np.arange(out)[:, None] * stride + np.arange(kernel) * dilation - begin, begin, end


def windows(x, fill, count_include_pad=0, **attributes):
    """[N, C, *out, window]; `fill` stands outside the picture, 0 in padding that counts."""
    n = x.ndim - 2
    kernel = attributes["kernel_shape"]
    strides, dilations = attributes.get("strides") or [1] * n, attributes.get("dilations") or [1] * n
    pads = attributes.get("pads") or [0] * 2 * n
    places, edges = [], [(0, 0), (0, 0)]
    for i in range(n):
        at, begin, end = taps(
            x.shape[2 + i],
            kernel[i],
            strides[i],
            dilations[i],
            pads[i],
            pads[n + i],
            attributes.get("auto_pad") or "NOTSET",
            attributes.get("ceil_mode") or 0,
        )
        edges.append((begin, end) if count_include_pad else (0, 0))
        places.append(at + edges[-1][0])
    x = np.pad(x, edges)
    for i, at in enumerate(places):
        axis = 2 + 2 * i
        reach = max(-at.min(), at.max() + 1 - x.shape[axis], 0)
        edges = [(0, 0)] * x.ndim
        edges[axis] = (reach, reach)
        x = np.pad(x, edges, constant_values=fill).take(at + reach, axis=axis)
    order = [0, 1, *range(2, 2 + 2 * n, 2), *range(3, 3 + 2 * n, 2)]
    x = x.transpose(order)
    return x.reshape(*x.shape[: 2 + n], -1)


class AveragePool(OpRun):
    """onnx.reference's own takes pads in another order than the standard, and no dilations."""

    def _run(self, x, count_include_pad=None, **attributes):
        return (np.nanmean(windows(x, np.nan, count_include_pad or 0, **attributes), axis=-1),)


class LpPool(OpRun):
    """onnx.reference's own is built on its AveragePool."""

    def _run(self, x, p=2, **attributes):
        p = p or 2
        return ((windows(np.abs(x), 0.0, **attributes) ** p).sum(-1) ** (1 / p),)


class MaxPool(OpRun):
    """onnx.reference's own numbers the indices wrongly where the strides are 1."""

    def _run(self, x, storage_order=None, **attributes):
        plane = x.shape[2:]
        order = "F" if storage_order else "C"
        numbers = np.arange(x.size).reshape(-1, math.prod(plane))
        numbers = np.stack([row.reshape(plane, order=order) for row in numbers]).reshape(x.shape)
        found = windows(x.astype(np.float64), -np.inf, **attributes)
        first = found.argmax(-1)[..., None]
        indices = np.take_along_axis(windows(numbers, -1, **attributes), first, -1)
        y = np.take_along_axis(found, first, -1)[..., 0].astype(x.dtype)
        return (y, indices[..., 0])[: len(self.output)]


class GlobalMaxPool(OpRun):
    """onnx.reference's own is right for pictures of two dimensions only."""

    def _run(self, x):
        return (x.max(axis=tuple(range(2, x.ndim)), keepdims=True),)


class GlobalLpPool(OpRun):
    """onnx.reference has none."""

    def _run(self, x, p=None):
        p = p or 2
        return ((np.abs(x) ** p).sum(axis=tuple(range(2, x.ndim)), keepdims=True) ** (1 / p),)


class GatherElements(OpRun):
    """onnx.reference's own reads at most 64 elements along the axis."""

    def _run(self, x, indices, axis=None):
        kept = tuple(slice(None if i == axis % x.ndim else n) for i, n in enumerate(indices.shape))
        return (np.take_along_axis(x[kept], indices, axis),)


checks.NEW_OPS += [AveragePool, LpPool, MaxPool, GlobalMaxPool, GlobalLpPool, GatherElements]


def assert_onnxruntime_computes_the_same(op_type, x, **attributes):
    """What central differences differentiate is what onnxruntime computes."""
    node = onnx.helper.make_node(op_type, ["x"], ["y"], **attributes)
    graph = onnx.helper.make_graph(
        [node],
        "graph",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, x.shape)],
        [onnx.helper.make_empty_tensor_value_info("y")],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 22)], ir_version=10)
    feeds = {"x": x.astype(np.float32)}
    (got,) = onnxruntime.InferenceSession(model.SerializeToString(), quiet()).run(None, feeds)
    (want,) = checks.reference(model).run(None, feeds)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@BOTH
@pytest.mark.parametrize("shape", [(2, 3, 4), (2, 3, 4, 5), (1, 2, 2, 3, 4)])
@pytest.mark.parametrize("name", ["avg", "max"])
def test_global_pool(name, shape, symbolic):
    axes = list(range(2, len(shape)))
    if name == "avg":
        check_vjp(
            "GlobalAveragePool", [normal(*shape)], against=lambda x: x.mean(axes, True), symbolic=symbolic
        )
    else:
        check_vjp("GlobalMaxPool", [normal(*shape)], against=lambda x: x.amax(axes, True), symbolic=symbolic)


@BOTH
def test_global_max_pool_gives_the_first_of_equals_everything(symbolic):
    def first_maximum(x):
        return torch.nn.functional.adaptive_max_pool2d(x, 1)

    x = RNG.integers(0, 3, (2, 3, 4, 5)).astype(float)
    check_vjp("GlobalMaxPool", [x], against=first_maximum, symbolic=symbolic)


@BOTH
@pytest.mark.parametrize("p", [1, 2, 3])
def test_global_lp_pool(p, symbolic):
    def norm(x):
        return (x.abs() ** p).sum((2, 3), keepdim=True) ** (1 / p)

    check_vjp("GlobalLpPool", [normal(2, 3, 4, 5)], against=norm, symbolic=symbolic, p=p)


def test_global_lp_pool_of_zeros_has_no_slope():
    check_vjp(
        "GlobalLpPool", [np.zeros((1, 2, 3, 3))], against=lambda x: (x * 0).sum((2, 3), True), ort=False
    )


TORCH_MAX = [
    ((2, 3, 9), {"kernel_shape": [3], "strides": [2], "pads": [1, 1]}),
    ((2, 3, 7, 8), {"kernel_shape": [3, 2], "strides": [2, 3], "pads": [1, 0, 1, 0]}),
    ((2, 3, 7, 8), {"kernel_shape": [2, 3]}),
    ((1, 2, 9, 8), {"kernel_shape": [3, 2], "dilations": [2, 3], "pads": [1, 1, 1, 1]}),
    ((1, 2, 6, 8), {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1}),
    ((1, 2, 6, 7), {"kernel_shape": [3, 3], "strides": [2, 3], "pads": [1, 1, 1, 1], "ceil_mode": 1}),
    ((1, 2, 4, 5, 6), {"kernel_shape": [2, 3, 2], "strides": [2, 1, 2], "pads": [1, 1, 1, 1, 1, 1]}),
    ((1, 2, 5, 5, 6), {"kernel_shape": [2, 2, 2], "dilations": [2, 1, 3], "strides": [1, 2, 1]}),
]


def torch_max_pool(attributes):
    n = len(attributes["kernel_shape"])
    pool = getattr(torch.nn.functional, f"max_pool{n}d")
    return lambda x: pool(
        x,
        attributes["kernel_shape"],
        attributes.get("strides", 1),
        attributes.get("pads", [0] * n)[:n],
        attributes.get("dilations", 1),
        bool(attributes.get("ceil_mode", 0)),
    )


@BOTH
@pytest.mark.parametrize(("shape", "attributes"), TORCH_MAX)
def test_max_pool(shape, attributes, symbolic):
    check_vjp(
        "MaxPool", [normal(*shape)], against=torch_max_pool(attributes), symbolic=symbolic, **attributes
    )


@BOTH
@pytest.mark.parametrize(("shape", "attributes"), TORCH_MAX)
def test_max_pool_gives_the_first_of_equals_everything(shape, attributes, symbolic):
    x = RNG.integers(0, 2, shape).astype(float)
    check_vjp("MaxPool", [x], against=torch_max_pool(attributes), symbolic=symbolic, **attributes)


@BOTH
@pytest.mark.parametrize("storage_order", [0, 1])
def test_max_pool_whose_indices_are_used(storage_order, symbolic):
    pool = torch_max_pool({"kernel_shape": [2, 3], "strides": [2, 2]})
    check_vjp(
        "MaxPool",
        [normal(2, 3, 6, 7)],
        against=pool,
        count=2,
        symbolic=symbolic,
        kernel_shape=[2, 3],
        strides=[2, 2],
        storage_order=storage_order,
    )


AUTO_PAD = [
    {"kernel_shape": [3, 2], "strides": [2, 3]},
    {"kernel_shape": [4, 3], "strides": [1, 2]},
    {"kernel_shape": [2, 2], "strides": [3, 1]},
]


@BOTH
@pytest.mark.parametrize("auto_pad", ["SAME_UPPER", "SAME_LOWER", "VALID"])
@pytest.mark.parametrize("attributes", AUTO_PAD)
def test_max_pool_auto_pad(attributes, auto_pad, symbolic):
    x = distinct(1, 2, 7, 8)
    check_vjp("MaxPool", [x], auto_pad=auto_pad, symbolic=symbolic, **attributes)
    assert_onnxruntime_computes_the_same("MaxPool", x, auto_pad=auto_pad, **attributes)


@BOTH
@pytest.mark.parametrize("auto_pad", ["SAME_UPPER", "SAME_LOWER"])
@pytest.mark.parametrize("op_type", ["MaxPool", "AveragePool", "LpPool"])
def test_pool_auto_pad_with_dilations(op_type, auto_pad, symbolic):
    # onnxruntime leaves the dilations out of the padding and so makes fewer windows than the standard.
    check_vjp(
        op_type,
        [distinct(1, 2, 7, 8)],
        ort=False,
        symbolic=symbolic,
        auto_pad=auto_pad,
        kernel_shape=[3, 3],
        strides=[2, 2],
        dilations=[1, 2],
    )


CEILED = [
    # rounds down once its last window, which begins in the padding, is left out: along one axis, along both
    {"kernel_shape": [2, 3], "strides": [3, 3], "pads": [1, 1, 1, 1]},
    {"kernel_shape": [2, 2], "strides": [2, 2], "pads": [1, 1, 1, 1]},
    # the other axis has a window that reaches out of the picture
    {"kernel_shape": [2, 3], "strides": [2, 2], "pads": [1, 0, 1, 0]},
    {"kernel_shape": [3, 3], "strides": [3, 3], "pads": [0, 1, 2, 0]},
    # windows that lie apart
    {"kernel_shape": [1, 1], "strides": [2, 3]},
]
"""Paddings in which, for a picture of 5x8, ONNX's formula counts a window too many before opset 22."""


def inferred(op_type, x, opset, **attributes):
    """The size that onnx infers."""
    return onnx.shape_inference.infer_node_outputs(
        onnx.defs.get_schema(op_type, opset),
        onnx.helper.make_node(op_type, ["x"], ["y"], **attributes),
        {"x": onnx.helper.make_tensor_type_proto(onnx.TensorProto.FLOAT, x.shape)},
        opset_imports=[onnx.helper.make_opsetid("", opset)],
    )["y"].SerializeToString()


@BOTH
@pytest.mark.parametrize("op_type", ["MaxPool", "AveragePool", "LpPool"])
@pytest.mark.parametrize("attributes", CEILED)
@pytest.mark.parametrize("opset", [20, 22])
def test_pool_whose_size_onnx_infers_wrongly(op_type, attributes, opset, symbolic):
    x = distinct(1, 2, 5, 8)
    for include in (0, 1) if op_type == "AveragePool" else (None,):
        more = attributes | {"ceil_mode": 1} | ({} if include is None else {"count_include_pad": include})
        assert inferred(op_type, x, 20, **more) != inferred(op_type, x, 22, **more)
        check_vjp(op_type, [x], symbolic=symbolic, opset=opset, **more)
        assert_onnxruntime_computes_the_same(op_type, x, **more)


def test_pool_that_cannot_be_written_in_another_way():
    attributes = {"kernel_shape": [1, 3], "strides": [2, 2], "ceil_mode": 1}
    x = distinct(1, 2, 4, 6)
    check_vjp("MaxPool", [x], opset=22, **attributes)
    check_vjp("MaxPool", [x], opset=20, symbolic=True, **attributes)
    with pytest.raises(OnnxcamError, match="'node', which has ceil_mode and windows that lie apart; convert"):
        check_vjp("MaxPool", [x], opset=20, **attributes)


def test_max_pool_asymmetric_padding():
    check_vjp("MaxPool", [distinct(1, 2, 6, 7)], kernel_shape=[3, 3], strides=[2, 2], pads=[0, 2, 1, 0])


@BOTH
@pytest.mark.parametrize("auto_pad", ["SAME_UPPER", "SAME_LOWER", "VALID"])
@pytest.mark.parametrize("attributes", AUTO_PAD)
@pytest.mark.parametrize("count_include_pad", [0, 1])
def test_average_pool_auto_pad(count_include_pad, attributes, auto_pad, symbolic):
    x = normal(1, 2, 7, 8)
    attributes = attributes | {"auto_pad": auto_pad, "count_include_pad": count_include_pad}
    check_vjp("AveragePool", [x], symbolic=symbolic, **attributes)
    assert_onnxruntime_computes_the_same("AveragePool", x, **attributes)


@BOTH
def test_average_pool_of_the_whole_picture(symbolic):
    pool = torch.nn.functional.avg_pool2d
    x = normal(2, 3, 4, 5)
    check_vjp("AveragePool", [x], against=lambda x: pool(x, (4, 5)), symbolic=symbolic, kernel_shape=[4, 5])


@BOTH
@pytest.mark.parametrize("count_include_pad", [0, 1])
@pytest.mark.parametrize(
    ("shape", "attributes"),
    [
        ((2, 3, 9), {"kernel_shape": [3], "strides": [2], "pads": [1, 1]}),
        ((2, 3, 7, 8), {"kernel_shape": [3, 2], "strides": [2, 3], "pads": [1, 0, 1, 0]}),
        ((2, 3, 7, 8), {"kernel_shape": [2, 3]}),
        ((1, 2, 6, 8), {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1}),
        ((1, 2, 6, 7), {"kernel_shape": [3, 3], "strides": [2, 3], "pads": [1, 1, 1, 1], "ceil_mode": 1}),
        ((1, 2, 4, 5, 6), {"kernel_shape": [2, 3, 2], "strides": [2, 1, 2], "pads": [1, 1, 1, 1, 1, 1]}),
    ],
)
def test_average_pool(shape, attributes, count_include_pad, symbolic):
    n = len(shape) - 2
    pool = getattr(torch.nn.functional, f"avg_pool{n}d")

    def against(x):
        return pool(
            x,
            attributes["kernel_shape"],
            attributes.get("strides", 1),
            attributes.get("pads", [0] * n)[:n],
            bool(attributes.get("ceil_mode", 0)),
            bool(count_include_pad),
        )

    x = normal(*shape)
    attributes = attributes | {"count_include_pad": count_include_pad}
    check_vjp("AveragePool", [x], against=against, symbolic=symbolic, **attributes)
    assert_onnxruntime_computes_the_same("AveragePool", x, **attributes)


@st.composite
def geometry(draw):
    n = draw(st.integers(1, 3))
    largest = [9, 7, 4][n - 1]
    kernel = [draw(st.integers(1, 3)) for _ in range(n)]
    dilations = [draw(st.integers(1, 2)) for _ in range(n)]
    extents = [d * (k - 1) + 1 for k, d in zip(kernel, dilations, strict=True)]
    attributes = {
        "kernel_shape": kernel,
        "strides": [draw(st.integers(1, 3)) for _ in range(n)],
        "ceil_mode": int(draw(st.booleans())),
        "dilations": dilations,
    }
    auto_pad = draw(st.sampled_from(["NOTSET", "NOTSET", "SAME_UPPER", "SAME_LOWER", "VALID"]))
    if auto_pad == "NOTSET":
        attributes["pads"] = [draw(st.integers(0, k - 1)) for k in kernel + kernel]
    else:
        attributes |= {"auto_pad": auto_pad, "ceil_mode": 0, "dilations": [1] * n}
        # onnxruntime fails where windows lie apart, which makes the padding negative.
        attributes["strides"] = [min(s, k) for s, k in zip(attributes["strides"], kernel, strict=True)]
    shape = (draw(st.integers(1, 2)), 2, *(draw(st.integers(e, e + largest - 3)) for e in extents))
    return shape, attributes


any_geometry = settings(
    max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)


OPSETS = st.sampled_from([20, 22])


@contextlib.contextmanager
def if_it_can_be_written():
    """Pass over what no opset before 22 can describe."""
    try:
        yield
    except OnnxcamError as error:
        assert "windows that lie apart" in str(error)
        assume(False)


@any_geometry
@given(geometry=geometry(), include=st.integers(0, 1), symbolic=st.booleans(), opset=OPSETS)
def test_any_average_pool(geometry, include, symbolic, opset):
    shape, attributes = geometry
    x = normal(*shape)
    with if_it_can_be_written():
        check_vjp("AveragePool", [x], symbolic=symbolic, opset=opset, count_include_pad=include, **attributes)
    assert_onnxruntime_computes_the_same("AveragePool", x, count_include_pad=include, **attributes)


@any_geometry
@given(geometry=geometry(), symbolic=st.booleans(), opset=OPSETS)
def test_any_max_pool(geometry, symbolic, opset):
    shape, attributes = geometry
    x = distinct(*shape)
    with if_it_can_be_written():
        check_vjp("MaxPool", [x], symbolic=symbolic, opset=opset, **attributes)
    assert_onnxruntime_computes_the_same("MaxPool", x, **attributes)


@any_geometry
@given(geometry=geometry(), symbolic=st.booleans())
def test_any_max_pool_gives_the_first_of_equals_everything(geometry, symbolic):
    shape, attributes = geometry
    x = RNG.integers(0, 2, shape).astype(float)
    numbers = windows(np.arange(x.size).reshape(shape), -1, **attributes)
    first = windows(x, -np.inf, **attributes).argmax(-1)[..., None]
    chosen = torch.tensor(np.take_along_axis(numbers, first, -1)[..., 0])
    check_vjp(
        "MaxPool", [x], against=lambda x: x.flatten()[chosen], symbolic=symbolic, opset=22, **attributes
    )


@any_geometry
@given(geometry=geometry(), p=st.sampled_from([1, 2, 3]), symbolic=st.booleans(), opset=OPSETS)
def test_any_lp_pool(geometry, p, symbolic, opset):
    shape, attributes = geometry
    x = normal(*shape)
    with if_it_can_be_written():
        check_vjp("LpPool", [x], symbolic=symbolic, opset=opset, p=p, **attributes)
    assert_onnxruntime_computes_the_same("LpPool", x, p=p, **attributes)


@BOTH
def test_lp_pool_of_zeros_has_no_slope(symbolic):
    x = np.zeros((1, 1, 4, 4))
    x[0, 0, 0, 0] = 3.0

    def norm(x):
        tiles = x.reshape(1, 1, 2, 2, 2, 2).transpose(3, 4).flatten(4)
        return torch.where((tiles == 0).all(-1), 0.0, (tiles**2 + 1e-300).sum(-1).sqrt())

    check_vjp("LpPool", [x], against=norm, symbolic=symbolic, kernel_shape=[2, 2], strides=[2, 2])


@BOTH
@pytest.mark.parametrize("shape", [(2, 3, 8), (2, 3, 6, 8), (1, 2, 4, 4, 6)])
def test_max_unpool(shape, symbolic):
    n = len(shape) - 2
    x, indices = getattr(torch.nn.functional, f"max_pool{n}d")(
        torch.tensor(normal(*shape)), 2, 2, return_indices=True
    )
    planes = np.arange(math.prod(shape[:2])).reshape(shape[:2] + (1,) * n) * math.prod(shape[2:])
    unpool = getattr(torch.nn.functional, f"max_unpool{n}d")
    check_vjp(
        "MaxUnpool",
        [x.numpy(), indices.numpy() + planes],
        against=lambda x, _: unpool(x, indices, 2, 2),
        symbolic=symbolic,
        kernel_shape=[2] * n,
        strides=[2] * n,
    )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(
    ("op_type", "attributes"),
    [
        ("MaxPool", {"kernel_shape": [2, 2]}),
        ("AveragePool", {"kernel_shape": [2, 2], "pads": [1, 0, 1, 0]}),
        ("LpPool", {"kernel_shape": [2, 2], "p": 3}),
        ("GlobalAveragePool", {}),
        ("GlobalMaxPool", {}),
        ("GlobalLpPool", {"p": 3}),
    ],
)
def test_pools_of_half_precision(op_type, attributes, dtype):
    assert dtypes_of_gradients(op_type, [(1, 2, 4, 4)], dtype, 22, **attributes) == {dtype}
