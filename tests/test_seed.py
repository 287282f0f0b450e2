import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxcam import seed
from onnxcam.emit import Emitter
from onnxcam.targets import resolve_classes
from tests import graphs
from tests.checks import reference, relative_error
from tests.graphs import build, explained, picture, run

# Linear classifiers of a picture [N,3,2,4], each with a trap for a gradient that has more rows than it.
WEIGHTS = """<T[3,5] fc, T[24,5] flat, T[5,24] left, T[8,1] one, T[3,3] mix, T[3] a, T[3] b, T[3] variance,
 int64[2] plane = {2, 3}, int64[1] first = {0}, int64[2] to3 = {-1, 3}, int64[2] to8 = {-1, 8},
 int64[2] merged = {3, -1}, int64[3] apart = {3, -1, 8},
 int64[3] cube = {0, -1, 8}, int64[3] column = {0, 24, 1}, int64[2,2] pairs = {0, 2, 1, 1},
 int64[1] two = {2},
 int64[3] order = {2, 0, 1}, int64[4] fold = {0, 3, 4, 2}, int64[1] minus = {-1}, int64[1] three = {3},
 int64[1] least = {-9223372036854775807}, int64[8] pads = {0, 0, 1, 0, 0, 0, 0, 2}, int64 zero = {0}>"""
MEAN = "p = ReduceMean<keepdims=0>({}, plane) scores = MatMul(p, fc)"
TRAPS = {
    "plain": MEAN.format("x"),
    "batch moved": """t = Transpose<perm=[1,0,2,3]>(x) m = ReduceMean<keepdims=0>(t, plane)
        u = Transpose(m) scores = MatMul(u, fc)""",
    "batch moved, then Gemm": """t = Transpose<perm=[1,0,2,3]>(x) m = ReduceMean<keepdims=0>(t, plane)
        scores = Gemm<transA=1>(m, fc)""",
    "batch moved and merged": """t = Transpose<perm=[1,0,2,3]>(x) r = Reshape(t, merged) s = Reshape(r, apart)
        m = ReduceMean<keepdims=0>(s, two) u = Transpose(m) scores = MatMul(u, fc)""",
    "batch last": "t = Transpose<perm=[1,2,3,0]>(x) u = Transpose<perm=[3,0,1,2]>(t) " + MEAN.format("u"),
    "batch merged": "r = Reshape(x, to8) m = MatMul(r, one) s = Reshape(m, to3) scores = MatMul(s, fc)",
    "batch merged with the channels": """r = Flatten<axis=2>(x) m = MatMul(r, one) s = Reshape(m, to3)
        scores = MatMul(s, fc)""",
    "matrix from the left": "r = Reshape(x, column) m = MatMul(left, r) scores = Squeeze(m, two)",
    "flattened": "f = Flatten(x) scores = MatMul(f, flat)",
    "regrouped": """r = Reshape(x, fold) s = Transpose<perm=[0,1,3,2]>(r) f = Flatten(s)
        scores = MatMul(f, flat)""",
    "another axis in front": "u = Unsqueeze(x, first) v = Add(u, u) s = Squeeze(v, first) "
    + MEAN.format("s"),
    "gather": "r = Gather<axis=1>(x, order) " + MEAN.format("r"),
    "gather pairs": """g = Gather<axis=1>(x, pairs) i = ReduceSum<keepdims=0>(g, two)
        """
    + MEAN.format("i").replace("fc)", "fc2)"),
    "slice, split, concat": """s = Slice(x, minus, least, three, minus)
        a1, b1 = Split<axis=2, num_outputs=2>(s)
        c = Concat<axis=2>(b1, a1) f = Flatten(c) scores = MatMul(f, flat)""",
    "pad": "q = Pad(x, pads) " + MEAN.format("q"),
    "batch normalisation": "n = BatchNormalization(x, a, b, b, variance) " + MEAN.format("n"),
    "average pool": "n = AveragePool<kernel_shape=[2,3], pads=[1,1,0,1], strides=[1,2]>(x) "
    + MEAN.format("n"),
    "einsum": 'e = Einsum<equation="nchw->nc">(x) scores = MatMul(e, fc)',
    "einsum that moves the batch": """e = Einsum<equation="nchw->cn">(x) t = Transpose(e)
        scores = MatMul(t, fc)""",
    "sum over what is one image": "s = ReduceSum(x, first) c = CumSum(s, zero) " + MEAN.format("c"),
    "running sum": "c = CumSum(x, zero) " + MEAN.format("c"),
    "softmax over the images": "s = Softmax<axis=0>(x) c = Add(s, x) " + MEAN.format("c"),
    "shape": """h = Shape<end=1>(x) i = Concat<axis=0>(h, minus) r = Reshape(x, i)
        scores = MatMul(r, flat)""",
    "class maps": """t = Transpose<perm=[0,2,3,1]>(x) m = MatMul(t, fc) u = Transpose<perm=[0,3,1,2]>(m)
        scores = ReduceMean<keepdims=0>(u, plane)""",
}
ONE_IMAGE = {"sum over what is one image", "running sum", "softmax over the images"}
ROWS = {
    "plain", "flattened", "regrouped", "gather", "gather pairs", "slice, split, concat", "pad", "shape",
    "batch normalisation", "average pool", "matrix from the left", "class maps",
}  # fmt: skip


def trap(name, batch, dtype):
    weights = WEIGHTS.replace("T[3,5] fc,", "T[3,5] fc, T[2,5] fc2,")
    return build(
        f"(T[{batch},3,2,4] x) => (T[{batch},5] scores) {weights} {{ {TRAPS[name]} }}",
        dtype=dtype,
        variance=[0.5, 1, 2],
    )


def jacobian(model, n):
    """d scores / d x [n,5,3,2,4] of a linear model, image by image, from its values at the unit pictures."""
    forward = reference(model)
    zero = np.zeros((n, 3, 2, 4))
    base = forward.run(["scores"], {"x": zero})[0]
    found = np.zeros((n, 5, 24))
    for i in range(n):
        for j in range(24):
            x = zero.copy()
            x[i].reshape(-1)[j] = 1
            found[i, :, j] = (forward.run(["scores"], {"x": x})[0] - base)[i]
    return found.reshape(n, 5, 3, 2, 4)


@pytest.mark.parametrize("name", TRAPS)
@pytest.mark.parametrize("batch", ["1", "3", "N", "anonymous"])
def test_rows_of_the_gradient(name, batch):
    """Three images, as many as there are channels: no size tells the two apart."""
    n = 1 if batch == "1" or name in ONE_IMAGE else 3
    if batch == "3" and name in ONE_IMAGE:
        pytest.skip("these images influence each other")
    model = trap(name, "N" if batch == "anonymous" else batch, "double")
    if batch == "anonymous":
        for value in (*model.graph.input, *model.graph.output):
            value.type.tensor_type.shape.dim[0].Clear()
    added = explained(model, layer="x")
    classes = np.array([[3, 0, 3, 4], [1, 2, 0, 0], [4, 4, 1, 2]])[:n]
    x = picture(n, 3, 2, 4, dtype=np.float64) if name != "softmax over the images" else np.zeros((1, 3, 2, 4))
    wanted = np.concatenate([j[c] for j, c in zip(jacobian(model, n), classes, strict=True)])
    got = run(added, {"x": x, "cam_class": classes}, by="ref")
    assert got["cam_gradients"].shape == wanted.shape
    assert relative_error(got["cam_gradients"], wanted) <= 1e-9
    single = explained(trap(name, batch if batch != "anonymous" else "N", "float"), layer="x")
    by_ort = run(single, {"x": x.astype(np.float32), "cam_class": classes})
    assert relative_error(by_ort["cam_gradients"], wanted) <= 1e-5
    if name in ROWS and batch != "anonymous":
        assert all(node.op_type != "Scan" for node in added.graph.node), "a Scan where none is needed"


@pytest.mark.parametrize("batch", ["3", "N"])
@pytest.mark.parametrize(
    "text",
    [
        "m = Mul(x, each) ",
        "m = Div(x, each) ",
        "r = Reshape(x, rows) q = MatMul(r, square) m = Reshape(q, back) ",
    ],
)
def test_a_weight_for_each_image(text, batch):
    model = build(
        f"""(T[{batch},3,2,4] x) => (T[{batch},5] scores)
        <T[3,3,1,1] each, T[3,8,8] square, T[3,5] fc, int64[2] plane = {{2, 3}}, int64[3] rows = {{0, 3, 8}},
         int64[4] back = {{0, 3, 2, 4}}> {{ {text} {MEAN.format("m")} }}""",
        dtype="double",
    )
    classes = np.array([[3, 0], [1, 2], [4, 4]])
    wanted = np.concatenate([j[c] for j, c in zip(jacobian(model, 3), classes, strict=True)])
    feeds = {"x": picture(3, 3, 2, 4, dtype=np.float64), "cam_class": classes}
    got = run(explained(model, layer="x"), feeds, by="ref")
    assert relative_error(got["cam_gradients"], wanted) <= 1e-9


# Between the pooling and the scores stand what MobileNetV3 and ConvNeXt have there, and a Softmax.
BENT_HEAD = """(T[N,3,8,10] x) => (T[N,5] scores)
<T[4,3,3,3] w, T[7,4] fc1, T[5,7] fc2, T[5] bias, T[4] scale, T[4] shift>
{
    c = Conv<kernel_shape=[3,3], pads=[1,1,1,1]>(x, w)
    r = Relu(c)
    p = GlobalAveragePool(r)
    t = Transpose<perm=[0,2,3,1]>(p)
    n = LayerNormalization(t, scale, shift)
    u = Transpose<perm=[0,3,1,2]>(n)
    f = Flatten(u)
    g = Gemm<transB=1>(f, fc1)
    h = HardSwish(g)
    k = Softmax(h)
    scores = Gemm<transB=1, alpha=0.5>(k, fc2, bias)
}"""


@pytest.mark.parametrize(
    ("graph", "layer"),
    [
        (graphs.LINEAR, "r"),
        (graphs.DEEP, "s"),
        (graphs.CONV_HEAD, "r"),
        (graphs.CONV_HEAD, "p"),
        (graphs.FLAT_HEAD, "m"),
        (BENT_HEAD, "r"),
    ],
)
def test_both_routes_give_the_same_numbers(graph, layer, monkeypatch):
    if layer == "p":
        graph, layer = (
            graphs.LINEAR.replace("GlobalAveragePool", "Identity").replace("T[4,5]", "T[320,5]"),
            "p",
        )
    feeds = {"x": picture(3, dtype=np.float64), "cam_class": np.array([[0, 4], [2, 2], [-1, 3]])}
    rows = explained(build(graph, dtype="double"), layer=layer)
    monkeypatch.setattr(seed, "_rows_stay_apart", lambda *_: False)
    loop = explained(build(graph, dtype="double"), layer=layer)
    assert [any(n.op_type == "Scan" for n in m.graph.node) for m in (rows, loop)] == [False, True]
    got, wanted = run(rows, feeds, by="ref"), run(loop, feeds, by="ref")
    for name, value in wanted.items():
        assert relative_error(got[name], value) <= 1e-6 if value.dtype == np.float32 else 1e-12, name


def test_slopes_of_the_head_are_computed_once_for_all_sums():
    graph = ir.from_proto(explained(build(BENT_HEAD), layer="r", emit=("cam",))).graph
    slopes = [node for node in graph if node.op_type == "HardSigmoid"]
    assert len(slopes) == 3
    of_classes = {value for value in graph.inputs if value.name == "cam_class"}
    for node in graph:
        if of_classes.intersection(node.inputs):
            assert node not in slopes
            of_classes.update(node.outputs)


def resolve(scores, classes):
    given = [
        ir.Value(name="scores", shape=ir.Shape(["N", "M"]), type=ir.TensorType(ir.DataType.DOUBLE)),
        ir.Value(name="classes", shape=ir.Shape(["n", "K"]), type=ir.TensorType(ir.DataType.INT64)),
    ]
    graph = ir.Graph(given, [], nodes=[], name="classes", opset_imports={"": 18})
    graph.outputs.extend(resolve_classes(Emitter(graph, 18, "test"), *given))
    model = ir.to_proto(ir.Model(graph, ir_version=10))
    onnx.checker.check_model(model, full_check=True)
    return reference(model).run(None, {"scores": scores, "classes": classes})


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.data())
def test_classes_are_resolved_as_sorting_would(data):
    n, m, k = (data.draw(st.integers(1, top)) for top in (3, 6, 4))
    scores = np.array(data.draw(st.lists(st.sampled_from([-1.0, 0.0, 2.0]), min_size=n * m, max_size=n * m)))
    scores = scores.reshape(n, m)
    rows = data.draw(st.sampled_from([1, n]))
    asked = st.one_of(st.integers(-m - 2, m + 2), st.sampled_from([2**63 - 1, -(2**63)]))
    classes = np.array(data.draw(st.lists(asked, min_size=rows * k, max_size=rows * k))).reshape(rows, k)
    index, valid = resolve(scores, classes)
    assert index.shape == valid.shape == (n, k)
    order = np.argsort(-scores, axis=1, kind="stable")
    for i in range(n):
        for j in range(k):
            c = int(classes[i % rows, j])
            assert valid[i, j] == (-m <= c < m)
            assert 0 <= index[i, j] < m
            if valid[i, j]:
                assert index[i, j] == (order[i, -1 - c] if c < 0 else c)
