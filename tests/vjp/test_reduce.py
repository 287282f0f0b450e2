import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.checks import check_vjp, dtypes_of_gradients

RNG = np.random.default_rng(3)


def normal(*shape):
    return RNG.standard_normal(shape)


def product(x, axes, keep):
    for axis in sorted(axes, reverse=True):
        x = x.prod(axis, keepdim=keep)
    return x


REDUCTIONS = {
    "ReduceSum": lambda x, axes, keep: x.sum(axes, keepdim=keep),
    "ReduceMean": lambda x, axes, keep: x.mean(axes, keepdim=keep),
    "ReduceMax": lambda x, axes, keep: x.amax(axes, keepdim=keep),
    "ReduceMin": lambda x, axes, keep: x.amin(axes, keepdim=keep),
    "ReduceL1": lambda x, axes, keep: x.abs().sum(axes, keepdim=keep),
    "ReduceL2": lambda x, axes, keep: x.square().sum(axes, keepdim=keep).sqrt(),
    "ReduceSumSquare": lambda x, axes, keep: x.square().sum(axes, keepdim=keep),
    "ReduceLogSum": lambda x, axes, keep: x.sum(axes, keepdim=keep).log(),
    "ReduceLogSumExp": lambda x, axes, keep: x.logsumexp(axes, keepdim=keep),
    "ReduceProd": product,
}
ELEMENTWISE = {
    "ReduceL1": torch.abs,
    "ReduceL2": torch.abs,
    "ReduceSumSquare": torch.square,
    "ReduceLogSum": torch.log,
    "ReduceLogSumExp": lambda x: x * 1.0,
}


def values(op_type, *shape):
    return RNG.uniform(0.5, 2.0, shape) if op_type == "ReduceLogSum" else normal(*shape)


def check_reduction(op_type, x, axes, keepdims, symbolic, at_run_time=False, opset=20, noop=None, ort=True):
    """`axes`: None where the input is left out."""
    inputs = [x] if axes is None else [x, np.array(axes, np.int64)]
    attributes = {} if noop is None else {"noop_with_empty_axes": noop}

    def against(x, *_):
        if not axes and noop:
            return ELEMENTWISE.get(op_type, lambda x: x * 1.0)(x)
        along = sorted(axis % x.ndim for axis in axes) if axes else list(range(x.ndim))
        return REDUCTIONS[op_type](x, along, bool(keepdims))

    check_vjp(
        op_type,
        inputs,
        against=against,
        constant=[] if at_run_time or axes is None else [1],
        symbolic=symbolic,
        keepdims=keepdims,
        opset=opset,
        ort=ort,
        **attributes,
    )


@pytest.mark.parametrize("op_type", REDUCTIONS)
@pytest.mark.parametrize("axes", [None, [], [1], [-1], [0, 2], [-1, 1], [2, 0, 1]])
@pytest.mark.parametrize("keepdims", [0, 1])
@pytest.mark.parametrize("symbolic", [False, True])
def test_reduction(op_type, axes, keepdims, symbolic):
    check_reduction(op_type, values(op_type, 3, 2, 4), axes, keepdims, symbolic)


@pytest.mark.parametrize("op_type", REDUCTIONS)
@pytest.mark.parametrize("axes", [[1], [-1, 0]])
@pytest.mark.parametrize("keepdims", [0, 1])
@pytest.mark.parametrize("symbolic", [False, True])
def test_reduction_along_axes_known_only_at_run_time(op_type, axes, keepdims, symbolic):
    check_reduction(op_type, values(op_type, 3, 2, 4), axes, keepdims, symbolic, at_run_time=True)


@pytest.mark.parametrize("op_type", REDUCTIONS)
@pytest.mark.parametrize("axes", [None, []])
@pytest.mark.parametrize("at_run_time", [False, True])
@pytest.mark.parametrize("noop", [0, 1])
def test_reduction_along_no_axes(op_type, axes, at_run_time, noop):
    # Without axes a composed reduction still squares, takes the logarithm and so on.
    check_reduction(op_type, values(op_type, 3, 2), axes, 1, False, at_run_time, noop=noop)


# onnx.reference 1.23 cannot reduce a scalar by ReduceLogSumExp.
@pytest.mark.parametrize("op_type", sorted(REDUCTIONS.keys() - {"ReduceLogSumExp"}))
def test_reduction_of_a_scalar(op_type):
    check_vjp(op_type, [np.array(0.7)], keepdims=0)


@pytest.mark.parametrize("op_type", REDUCTIONS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "double"])
def test_dtype(op_type, dtype):
    assert dtypes_of_gradients(op_type, [(2, 3)], dtype, 20) == {dtype}


@pytest.mark.parametrize("op_type", ["ReduceMax", "ReduceMin"])
def test_ties_share_the_gradient(op_type):
    check_reduction(op_type, np.array([[1.0, 1.0, 0.0, 0.0], [2.0, 3.0, 2.0, 3.0]]), [1], 1, False)


def test_l1_and_l2_of_zeros():
    x = np.array([[0.0, 0.0], [0.0, 2.0]])
    check_vjp("ReduceL1", [x, np.array([1])], against=lambda x, _: x.abs().sum(1, keepdim=True), constant=[1])
    check_vjp("ReduceL2", [x, np.array([1])], against=lambda x, _: x.norm(dim=1, keepdim=True), constant=[1])


@pytest.mark.parametrize("axes", [None, [0], [1], [0, 1]])
@pytest.mark.parametrize("keepdims", [0, 1])
@pytest.mark.parametrize("symbolic", [False, True])
def test_product_with_zeros(axes, keepdims, symbolic):
    x = normal(4, 3)
    x[1, 1] = x[2, 0] = x[2, 2] = 0.0
    check_reduction("ReduceProd", x, axes, keepdims, symbolic)


@settings(deadline=None, derandomize=True, max_examples=25)
@given(st.data())
def test_any_reduction(data):
    op_type = data.draw(st.sampled_from(sorted(REDUCTIONS)))
    shape = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=4))
    axes = data.draw(st.lists(st.integers(0, len(shape) - 1), unique=True, min_size=1))
    axes = [axis - len(shape) if data.draw(st.booleans()) else axis for axis in axes]
    symbolic, at_run_time, keepdims = (data.draw(st.booleans()) for _ in range(3))
    check_reduction(op_type, values(op_type, *shape), axes, int(keepdims), symbolic, at_run_time, ort=False)


@pytest.mark.parametrize("axis", [np.array(0), np.array(1), np.array(-1)])
@pytest.mark.parametrize("exclusive", [0, 1])
@pytest.mark.parametrize("reverse", [0, 1])
@pytest.mark.parametrize("constant", [[], [1]])
def test_running_sum(axis, exclusive, reverse, constant):
    check_vjp(
        "CumSum",
        [normal(3, 4), axis],
        constant=constant,
        symbolic=not constant,
        exclusive=exclusive,
        reverse=reverse,
    )


@pytest.mark.parametrize("zeros", [[], [(0, 1)], [(1, 1), (2, 1), (2, 3), (0, 0)]])
@pytest.mark.parametrize("axis", [0, -1])
@pytest.mark.parametrize("exclusive", [0, 1])
@pytest.mark.parametrize("reverse", [0, 1])
@pytest.mark.parametrize("symbolic", [False, True])
def test_running_product(zeros, axis, exclusive, reverse, symbolic):
    x = normal(3, 4)
    for place in zeros:
        x[place] = 0.0
    check_vjp(
        "CumProd", [x, np.array(axis)], opset=26, symbolic=symbolic, exclusive=exclusive, reverse=reverse
    )


def test_running_sum_and_product_against_torch():
    x = normal(3, 4)
    check_vjp("CumSum", [x, np.array(1)], against=lambda x, _: x.cumsum(1))
    x[1, 2] = 0.0
    check_vjp("CumProd", [x, np.array(1)], against=lambda x, _: x.cumprod(1), opset=26)
