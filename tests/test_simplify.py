import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnxcam import attaching
from onnxcam.emit import Emitter
from onnxcam.simplify import simplify
from tests import graphs
from tests.checks import reference
from tests.graphs import build, explained, picture, run

RNG = np.random.default_rng(0)
WEIGHTS = RNG.standard_normal((5, 4))
W66, W33 = RNG.standard_normal((6, 6)), RNG.standard_normal((3, 3))


def simplified(emit, shape=("N",), dtype=ir.DataType.INT64, opset=18):
    """Emit a graph of one input `i`, before and after simplifying: its nodes and its value for `i`."""
    results = []
    for go in (False, True):
        i = ir.Value(name="i", shape=ir.Shape(shape), type=ir.TensorType(dtype))
        graph = ir.Graph([i], [], nodes=[], name="g", opset_imports={"": opset})
        op = Emitter(graph, opset, "test")
        y = op.Identity(emit(op, i))
        graph.outputs.append(y)
        if go:
            simplify(op)
        op.remove_dead([y])
        model = ir.to_proto(ir.Model(graph, ir_version=10))
        onnx.checker.check_model(model, full_check=True)
        results.append((sorted(n.op_type for n in graph if n.op_type != "Identity"), reference(model)))
    return results


def one_hot(op, i, depth=5, values=(0, 1), **attributes):
    return op.OneHot(i, np.int64(depth), np.array(values, np.float64), **attributes)


W, WT = WEIGHTS, np.ascontiguousarray(WEIGHTS.T)
GATHERS = {
    "MatMul": (lambda op, i: op.MatMul(one_hot(op, i), W), ["Gather"]),
    "MatMul of a transposed matrix": (
        lambda op, i: op.MatMul(one_hot(op, i), op.Transpose(op.constant(WT), perm=[1, 0])),
        ["Gather", "Transpose"],
    ),
    "MatMul of a transposed matrix, no perm": (
        lambda op, i: op.MatMul(one_hot(op, i), op.Transpose(op.constant(WT))),
        ["Gather", "Transpose"],
    ),
    "MatMul of a matrix that stays": (
        lambda op, i: op.MatMul(one_hot(op, i), op.Transpose(op.constant(W), perm=[0, 1])),
        ["Gather"],
    ),
    "Gemm": (lambda op, i: op.Gemm(one_hot(op, i), W), ["Gather"]),
    "Gemm, transB": (lambda op, i: op.Gemm(one_hot(op, i), WT, transB=1), ["Gather", "Transpose"]),
    "Gemm, transB of a transposed matrix": (
        lambda op, i: op.Gemm(one_hot(op, i), op.Transpose(op.constant(W)), transB=1),
        ["Gather"],
    ),
    "Gemm, alpha": (lambda op, i: op.Gemm(one_hot(op, i), W, alpha=0.25), ["Gather", "Mul"]),
    "Gemm, alpha and transB": (
        lambda op, i: op.Gemm(one_hot(op, i), WT, alpha=-2.0, transB=1),
        ["Gather", "Mul", "Transpose"],
    ),
}
STAYS = {
    "Gemm with a bias": lambda op, i: op.Gemm(one_hot(op, i), W, np.ones(4)),
    "other values": lambda op, i: op.MatMul(one_hot(op, i, values=(0, 2)), W),
    "other rest": lambda op, i: op.MatMul(one_hot(op, i, values=(1, 0)), W),
    "another axis": lambda op, i: op.MatMul(one_hot(op, i, axis=1), W),
    "transA": lambda op, i: op.Gemm(one_hot(op, i), W[:3], transA=1),
    "from the right": lambda op, i: op.MatMul(WT, op.Transpose(one_hot(op, i))),
    "weights that are computed": lambda op, i: op.MatMul(one_hot(op, i), op.Exp(op.constant(W))),
    "batch of matrices": lambda op, i: op.MatMul(one_hot(op, i), np.stack([W, -W])),
}


@pytest.mark.parametrize("name", GATHERS)
def test_a_row_is_gathered(name):
    emit, operators = GATHERS[name]
    (_, plain), (found, better) = simplified(emit)
    assert found == operators
    for i in ([0, 4, 2], [3], []):
        feeds = {"i": np.array(i, np.int64)}
        wanted, got = plain.run(None, feeds)[0], better.run(None, feeds)[0]
        assert got.shape == wanted.shape == (len(i), 4)
        np.testing.assert_allclose(got, wanted, rtol=1e-15)


@pytest.mark.parametrize("name", STAYS)
def test_what_is_no_row_stays(name):
    (before, plain), (after, better) = simplified(STAYS[name], shape=(3,))
    assert after == before
    feeds = {"i": np.array([0, 4, 2], np.int64)}
    np.testing.assert_array_equal(better.run(None, feeds)[0], plain.run(None, feeds)[0])


def means(axes, keepdims, to):
    """The mean of a value that was expanded."""

    def emit(op, x):
        return op.ReduceMean(op.Expand(x, list(to)), axes, keepdims=keepdims)

    return emit


@pytest.mark.parametrize("axes", [[2, 3], [3, 2], [-1, -2], [2], [3]])
@pytest.mark.parametrize("keepdims", [0, 1])
def test_the_mean_of_one_number_is_that_number(axes, keepdims):
    reduced = {axis % 4 for axis in axes}
    emit = means(axes, keepdims, to=[1, 1, 4 if 2 in reduced else 1, 5 if 3 in reduced else 1])
    (_, plain), (found, better) = simplified(emit, shape=("N", 3, 1, 1), dtype=ir.DataType.DOUBLE)
    assert found == ([] if keepdims else ["Squeeze"])
    x = RNG.standard_normal((2, 3, 1, 1))
    wanted, got = plain.run(None, {"i": x})[0], better.run(None, {"i": x})[0]
    assert got.shape == wanted.shape
    np.testing.assert_allclose(got, wanted, rtol=1e-14)


@pytest.mark.parametrize(
    ("axes", "shape", "to"),
    [
        ([1], (2, 3, 1, 1), (2, 3, 4, 5)),
        ([2, 3], (2, 3, 1, 5), (2, 3, 4, 5)),
        ([2, 3], (3, 1, 1), (2, 3, 4, 5)),
        ([2, 3], (2, 3, "h", 1), (2, 3, 4, 5)),
        ([], (2, 3, 1, 1), (2, 3, 4, 5)),
        # Another axis was expanded as well: the mean still has it.
        ([2, 3], (1, 3, 1, 1), (2, 3, 4, 5)),
        ([3], (2, 3, 1, 1), (2, 3, 4, 5)),
    ],
)
@pytest.mark.parametrize("keepdims", [0, 1])
def test_the_mean_of_several_numbers_stays_a_mean(axes, shape, to, keepdims):
    (_, plain), (_, better) = simplified(means(axes, keepdims, to=to), shape=shape, dtype=ir.DataType.DOUBLE)
    x = RNG.standard_normal([4 if d == "h" else d for d in shape])
    wanted, got = plain.run(None, {"i": x})[0], better.run(None, {"i": x})[0]
    assert got.shape == wanted.shape
    np.testing.assert_allclose(got, wanted, rtol=1e-14)


def viewed(op, i, index=lambda op, i: i, axis=0, sizes=(4, 1, 1), factor=7.0, start=0):
    """Rows of a matrix that were taken in a line, viewed for the axes of an index."""
    rows = op.Gather((W, WT)[axis], op.Reshape(i, [-1]), axis=axis)
    rows = op.Reshape(rows if axis == 0 else op.Transpose(rows), np.array([0, 0, 1, 1]))
    shape = op.Concat(op.Shape(index(op, i), start=start, end=2), np.array(sizes), axis=0)
    return op.Reshape(op.Div(rows, factor), shape)


VIEWS = {
    "as columns": (viewed, ["Div", "Gather", "Unsqueeze"]),
    "as rows": (lambda op, i: viewed(op, i, sizes=(4,)), ["Div", "Gather"]),
    "and factors": (lambda op, i: op.Mul(viewed(op, i), 3.0), ["Div", "Gather", "Mul", "Unsqueeze"]),
}
OTHER_VIEWS = {
    "of another index": lambda op, i: viewed(op, i, lambda op, i: op.Transpose(i)),
    "of one axis of it": lambda op, i: viewed(op, i, start=1),
    "in other sizes": lambda op, i: viewed(op, i, sizes=(2, 2, 1)),
    "of columns": lambda op, i: viewed(op, i, axis=1),
    "divided one by one": lambda op, i: viewed(op, i, factor=np.arange(1.0, 5).reshape(4, 1, 1)),
}


@pytest.mark.parametrize("name", VIEWS)
def test_rows_are_gathered_for_all_sums_at_once(name):
    emit, operators = VIEWS[name]
    (_, plain), (found, better) = simplified(emit, shape=("N", "K"))
    assert found == sorted(operators)
    i = np.array([[3, 0, 4], [4, 4, 1]])
    wanted, got = plain.run(None, {"i": i})[0], better.run(None, {"i": i})[0]
    assert got.shape == wanted.shape
    np.testing.assert_allclose(got, wanted, rtol=1e-15)


@pytest.mark.parametrize("name", OTHER_VIEWS)
def test_other_views_of_rows_stay(name):
    (before, plain), (after, better) = simplified(OTHER_VIEWS[name], shape=("N", "K"))
    assert after == before
    i = np.array([[3, 0]])
    np.testing.assert_array_equal(better.run(None, {"i": i})[0], plain.run(None, {"i": i})[0])


@pytest.mark.parametrize(
    ("columns", "dtype", "later"), [(2, "DOUBLE", True), (6, "DOUBLE", False), (2, "FLOAT16", False)]
)
def test_the_smaller_of_a_matrix_and_its_product_is_scaled(columns, dtype, later):
    """In half precision not the product, which may be too large before."""
    dtype = ir.DataType[dtype]
    weights = W66[:, :columns].astype(dtype.numpy())
    found, model = in_order(
        lambda op, x: op.Reshape(op.MatMul(op.Div(x, 7.0), weights), [1, 3, columns]), dtype
    )
    assert found == (["MatMul", "Reshape", "Div"] if later else ["Div", "MatMul", "Reshape"])
    a = RNG.standard_normal((3, 6)).astype(dtype.numpy())
    (got,) = model.run(None, {"x": a})
    np.testing.assert_allclose(got, [a / 7 @ weights], rtol=1e-13 if later else 1e-2)


def test_a_factor_goes_on_behind_views_and_the_product():
    def emit(op, x):
        column = op.Reshape(op.Div(op.Unsqueeze(x, [0, 3]), 7.0), [1, 3, 6, 1])
        return op.Reshape(op.MatMul(op.Squeeze(column, [0, 3]), W66[:, :2]), [1, 3, 2])

    found, model = in_order(emit, ir.DataType.DOUBLE)
    assert found == ["Unsqueeze", "Reshape", "Squeeze", "MatMul", "Reshape", "Div"]
    a = RNG.standard_normal((3, 6))
    (got,) = model.run(None, {"x": a})
    np.testing.assert_allclose(got, [a / 7 @ W66[:, :2]], rtol=1e-13)


def in_order(emit, dtype):
    """The operators that are left of a graph of one input `x` [3,6], in order, and the model."""
    x = ir.Value(name="x", shape=ir.Shape((3, 6)), type=ir.TensorType(dtype))
    graph = ir.Graph([x], [], nodes=[], name="g", opset_imports={"": 18})
    op = Emitter(graph, 18, "test")
    graph.outputs.append(op.Identity(emit(op, x)))
    simplify(op)
    op.remove_dead(list(graph.outputs))
    *operators, identity = [node.op_type for node in graph]
    assert identity == "Identity"
    return operators, reference(ir.to_proto(ir.Model(graph, ir_version=10)))


def swish(x_of_y=0, alpha=-1.0):
    """The gradient of Y = x sigmoid(x) by its factors, as the rules of Mul and Sigmoid write it."""

    def emit(op, x):
        s = op.Sigmoid(x)
        y = op.Mul((x, op.Neg(x))[x_of_y], s)
        dy = op.Cos(y)
        slope = op.Mul(s, op.HardSigmoid(s, alpha=alpha, beta=1.0))
        return op.Add(op.Mul(dy, s), op.Mul(op.Mul(dy, x), slope))

    return emit


def parts(*pads, fill=None, sizes=(2, 1, 3), axis=1):
    """A sum of parts of some sizes, each padded along an axis."""

    def emit(op, x):
        starts = np.cumsum([0, *sizes])
        found = []
        for (before, after), start, size in zip(pads, starts, sizes, strict=False):
            every = np.zeros((2, 2), np.int64)
            every[:, axis] = before, after
            part = op.Slice(x, [start], [start + size], [axis])
            found.append(op.Pad(op.Tanh(part), every.ravel(), fill))
        total = found[0]
        for part in found[1:]:
            total = op.Add(part, total)
        return total

    return emit


ONE = parts((2, 3), sizes=(1,))

SAME = {
    "a factor of a part": (lambda op, x: op.Mul(x, ONE(op, x)), ["Mul", "Pad", "Slice", "Slice", "Tanh"]),
    "a factor for every entry": (
        lambda op, x: op.Mul(ONE(op, x), op.ReduceSum(x, [1])),
        ["Mul", "Pad", "ReduceSum", "Slice", "Tanh"],
    ),
    "a factor of fewer axes": (
        lambda op, x: op.Mul(ONE(op, x), op.ReduceSum(x, [0], keepdims=0)),
        ["Mul", "Pad", "ReduceSum", "Slice", "Slice", "Tanh"],
    ),
    "a difference of parts": (
        lambda op, x: op.Sub(ONE(op, x), ONE(op, op.Cos(x))),
        ["Cos", "Pad", "Slice", "Slice", "Sub", "Tanh", "Tanh"],
    ),
    "a product of parts": (
        lambda op, x: op.Mul(ONE(op, x), ONE(op, op.Cos(x))),
        ["Cos", "Mul", "Pad", "Slice", "Slice", "Tanh", "Tanh"],
    ),
    "a matrix for each entry": (
        lambda op, x: op.MatMul(parts((0, 5), sizes=(1,), axis=0)(op, op.Transpose(x)), W33),
        ["MatMul", "Pad", "Slice", "Tanh", "Transpose"],
    ),
    "a mean over another axis": (
        lambda op, x: op.ReduceMean(ONE(op, x), [0]),
        ["Pad", "ReduceMean", "Slice", "Tanh"],
    ),
    "a slope of SiLU": (swish(), ["Add", "Cos", "HardSigmoid", "Mul", "Mul", "Mul", "Sigmoid"]),
    "parts of a whole": (parts((0, 4), (2, 3), (3, 0)), ["Concat", *["Slice", "Tanh"] * 3]),
    "parts in another order": (parts((4, 0), (3, 2), (0, 3)), ["Concat", *["Slice", "Tanh"] * 3]),
    "axes put in and taken out": (lambda op, x: op.Squeeze(op.Unsqueeze(op.Tanh(x), [1]), [1]), ["Tanh"]),
    "a repeated summand": (
        lambda op, x: op.Add(op.Expand(op.Tanh(op.ReduceSum(x, [1])), [3, 6]), op.Cos(x)),
        ["Add", "Cos", "ReduceSum", "Tanh"],
    ),
    "a repeated factor": (
        lambda op, x: op.Mul(op.Cos(x), op.Expand(op.Tanh(op.ReduceSum(x, [1])), [3, 6])),
        ["Cos", "Mul", "ReduceSum", "Tanh"],
    ),
}
OTHER = {
    "parts in another mode": lambda op, x: op.Add(
        op.Pad(op.Tanh(x), [0, 3, 0, 0], mode="edge"),
        op.Pad(op.Slice(x, [0], [3], [1]), [0, 0, 0, 6], mode="edge"),
    ),
    "a large part": lambda op, x: op.Mul(parts((0, 3), sizes=(3,))(op, x), x),
    "parts that lie elsewhere": lambda op, x: op.Sub(
        parts((0, 5), sizes=(1,))(op, x), parts((5, 0), sizes=(1,))(op, x)
    ),
    "a product over the part": lambda op, x: op.MatMul(parts((0, 5), sizes=(1,))(op, x), W66),
    "a sum over the part": lambda op, x: op.ReduceSum(parts((0, 5), sizes=(1,))(op, x), [1]),
    "a slope of another product": swish(x_of_y=1),
    "a slope with another complement": swish(alpha=-0.5),
    "parts of more than they fill": parts((0, 5), (2, 4), (3, 1)),
    "parts that overlap": parts((0, 4), (1, 4), (3, 0)),
    "parts that leave a gap": parts((0, 4), (3, 0), sizes=(2, 3)),
    "parts in ones": parts((0, 4), (2, 3), (3, 0), fill=1.0),
    "axes put in before others": lambda op, x: op.Squeeze(op.Unsqueeze(op.ReduceSum(x, [1]), [0]), [2]),
    "a summand that is repeated too": lambda op, x: op.Add(
        op.Expand(op.ReduceSum(x, [1]), [3, 6]), op.ReduceSum(x, [0])
    ),
}


@pytest.mark.parametrize("name", SAME)
def test_the_same_numbers_from_less_work(name):
    emit, operators = SAME[name]
    (_, plain), (found, better) = simplified(emit, shape=(3, 6), dtype=ir.DataType.DOUBLE)
    assert found == sorted(operators)
    x = RNG.standard_normal((3, 6))
    wanted, got = plain.run(None, {"i": x})[0], better.run(None, {"i": x})[0]
    assert got.shape == wanted.shape
    np.testing.assert_allclose(got, wanted, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("name", OTHER)
def test_what_only_looks_alike_stays(name):
    (before, plain), (after, better) = simplified(OTHER[name], shape=(3, 6), dtype=ir.DataType.DOUBLE)
    assert after == before
    x = RNG.standard_normal((3, 6))
    np.testing.assert_array_equal(better.run(None, {"i": x})[0], plain.run(None, {"i": x})[0])


@pytest.mark.parametrize("graph", [graphs.LINEAR, graphs.DEEP, graphs.FLAT_HEAD, graphs.CONV_HEAD])
@pytest.mark.parametrize("layer", ["r", "x"])
@pytest.mark.parametrize("score", ["before", "after"])
def test_explained_models_say_the_same_with_and_without(graph, layer, score, monkeypatch):
    feeds = {"x": picture(3, dtype=np.float64), "cam_class": np.array([[0, 4], [2, 2], [-1, 3]])}
    with_it = explained(build(graph, dtype="double"), layer=layer, score=score)
    monkeypatch.setattr(attaching, "simplify", lambda op: None)
    without = explained(build(graph, dtype="double"), layer=layer, score=score)
    got, wanted = run(with_it, feeds, by="ref"), run(without, feeds, by="ref")
    assert len(with_it.graph.node) <= len(without.graph.node)
    for name, value in wanted.items():
        tolerance = 1e-6 if value.dtype == np.float32 else 1e-12
        np.testing.assert_allclose(got[name], value, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("graph", [graphs.LINEAR, graphs.FLAT_HEAD])
def test_a_linear_head_reads_one_row_of_its_matrix(graph):
    def operators(nodes):
        for node in nodes:
            yield node.op_type
            for attribute in node.attribute:
                yield from operators(attribute.g.node)

    model = build(graph)
    added = explained(model, layer="r", emit=("cam",))
    found = list(operators(added.graph.node[len(model.graph.node) :]))
    assert "OneHot" not in found
    assert "Gather" in found


def test_the_plane_is_not_averaged_where_the_pooling_has_repeated_one_number():
    added = explained(build(graphs.LINEAR), layer="r", emit=("cam",))
    assert all(
        node.op_type not in ("ReduceMean", "Expand") for node in added.graph.node if "gradcam" in node.name
    )
