import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from onnxcam import onnxfile
from onnxcam.vjp.shapes import dims
from tests.checks import quiet
from tests.graphs import build


def agrees_with_a_run(model, feeds):
    """Every size, symbol and constant that a normalised model claims is what onnxruntime finds.

    Returns:
        For each value computed, its shape in the run.
    """
    proto = ir.to_proto(model)
    values = [v for node in model.graph for v in node.outputs if v.name and v.type is not None]
    outputs = {v.name for v in model.graph.outputs}
    for value in values:
        if value.name not in outputs:
            proto.graph.output.append(onnx.helper.make_empty_tensor_value_info(value.name))
    options = quiet()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options)
    names = [v.name for v in session.get_outputs()]
    found = dict(zip(names, session.run(names, feeds), strict=True))
    symbols = {}
    for value in [*model.graph.inputs, *values]:
        array = feeds.get(value.name, found.get(value.name))
        if value.shape is not None:
            assert len(value.shape) == np.ndim(array), value.name
            for size, actual in zip(dims(value), np.shape(array), strict=True):
                known = symbols.setdefault(size, actual) if isinstance(size, str) else size
                assert known in (None, actual), (value.name, size, actual)
        if value.const_value is not None:
            np.testing.assert_array_equal(value.const_value.numpy(), array, err_msg=value.name)
            assert value.const_value.numpy().dtype == array.dtype
    return {name: np.shape(array) for name, array in found.items()}


def settled(graph, weights="", shape="N,4,6,H"):
    """Normalise a chain of nodes that ends in y, and return its values by name."""
    model = build(
        f"(T[{shape}] x) => (int64[R] last) <{weights} int64[1] minus = {{-1}}> {{ {graph} last = Shape(y) }}"
    )
    own = onnxfile.normalise(ir.from_proto(model))
    agrees_with_a_run(own, {"x": np.zeros((3, 4, 6, 8), np.float32)})
    return {v.name: v for node in own.graph for v in node.outputs}


SHAPE = "int64 one = {1}, int64 two = {2}, int64 three = {3}, int64[1] i0 = {0}, int64[1] i2 = {2},"


@pytest.mark.parametrize(
    ("graph", "sizes"),
    [
        # a channel shuffle: every size divided or taken from the shape
        (
            """s = Shape(x) n0 = Gather(s, i0) c = Gather(s, one) h = Gather(s, two) w = Gather(s, three)
            half = Div(c, two) c1 = Unsqueeze(half, i0) h1 = Unsqueeze(h, i0) w1 = Unsqueeze(w, i0)
            t = Concat<axis=0>(n0, i2, c1, h1, w1) r = Reshape(x, t) q = Transpose<perm=[0,2,1,3,4]>(r)
            u = Concat<axis=0>(n0, minus, h1, w1) y = Reshape(q, u)""",
            ["N", 4, 6, "H"],
        ),
        # what Expand is given by exporters: -1 keeps a size
        (
            """s = Shape(x) r = ConstantOfShape<value = int64[1] {1}>(four) m = Mul(r, minus) e = Equal(s, m)
            t = Where(e, r, s) p = ReduceMean<keepdims=1>(x, i2) y = Expand(p, t)""",
            ["N", 4, 6, "H"],
        ),
        # a constant target with one place left open: the batch
        ("p = ReduceMean(x, plane) q = Reshape(p, flat) t = Sigmoid(q) y = Mul(x, t)", ["N", 4, 6, "H"]),
        # a slice of the shape, joined
        ("s = Shape(x) a = Slice(s, i0, i2) t = Concat<axis=0>(a, minus) y = Reshape(x, t)", ["N", 4, None]),
        ("s = Shape<end=2>(x) t = Concat<axis=0>(s, minus) y = Reshape(x, t)", ["N", 4, None]),
        ("s = Shape<start=1>(x) p = ReduceProd<keepdims=0>(s) y = Flatten(x)", ["N", None]),
        ("s = Shape(x) t = Cast<to=6>(s) u = Cast<to=7>(t) y = Reshape(x, u)", ["N", 4, 6, "H"]),
        ("s = Shape(x) t = Add(s, zeros) u = Mul(t, ones) y = Reshape(x, u)", ["N", 4, 6, "H"]),
        ("s = Shape(x) v = Sub(s, s) t = Sub(s, v) y = Reshape(x, t)", [None, 4, 6, None]),
        ("a, b = Split<axis=1>(x, parts) y = Concat<axis=1>(b, a)", ["N", 4, 6, "H"]),
        # padding and cutting by sizes of the run along two axes
        (
            """s = Shape(x) w = Gather(s, three3) m = Mod(w, two1) q = Concat<axis=0>(z3, m, z4) d = Pad(x, q)
            y = Relu(d)""",
            ["N", 4, 6, None],
        ),
        (
            "s = Shape(x) w = Gather(s, three3) y = Slice(x, i0, w, three3)",
            ["N", 4, 6, None],
        ),
    ],
)
def test_shapes_behind_arithmetic(graph, sizes):
    more = """int64[1] four = {4}, int64[4] zeros = {0,0,0,0}, int64[4] ones = {1,1,1,1},
    int64[2] parts = {1,3}, int64[1] three3 = {3}, int64[1] two1 = {2}, int64[3] z3 = {0,0,0},
    int64[4] z4 = {0,0,0,0}, int64[2] plane = {2,3}, int64[4] flat = {-1,4,1,1},"""
    found = dims(settled(graph, SHAPE + more)["y"])
    # "unk__" is what onnx's inference calls a size that it knows nothing of.
    assert [None if str(size).startswith("unk__") else size for size in found] == sizes


def test_constants_are_noted_where_a_part_of_the_shape_is_enough():
    values = settled(
        "s = Shape(x) c = Gather(s, one) d = Div(c, two) e = Unsqueeze(d, i0) y = Identity(x)", SHAPE
    )
    assert values["s"].const_value is None
    assert [values[n].const_value.numpy().tolist() for n in "cde"] == [4, 2, [2]]
