import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxcam.backward import gradient
from onnxcam.emit import Emitter
from onnxcam.errors import OnnxcamError
from onnxcam.onnxfile import normalise
from tests.checks import _one_node_model, check_vjp

RNG = np.random.default_rng(5)

MAX, MIN = np.iinfo(np.int64).max, np.iinfo(np.int64).min
SYMBOLIC = pytest.mark.parametrize("symbolic", [False, True])
CONSTANT = pytest.mark.parametrize("constant", [True, False])


def normal(*shape):
    return RNG.standard_normal(shape)


def ints(*values):
    return np.array(values, np.int64)


@pytest.mark.parametrize(
    "indices",
    [
        np.array(0),
        np.array(-1),
        ints(2),
        ints(-3),
        ints(0, 2, 0),
        ints(-1, 1, 1, 0),
        np.array([[1], [0]]),
        np.array([[2]]),
        np.array([[-3, 2], [2, 0]]),
    ],
)
@pytest.mark.parametrize("axis", [0, 1, -1])
@CONSTANT
@SYMBOLIC
def test_gather(indices, axis, constant, symbolic):
    check_vjp(
        "Gather",
        [normal(3, 3, 3), indices],
        constant=[1] if constant else [],
        symbolic=symbolic,
        axis=axis,
    )


@settings(deadline=None, derandomize=True, max_examples=40)
@given(st.data())
def test_any_gather(data):
    shape = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    size = data.draw(st.lists(st.integers(1, 3), max_size=2))
    indices = RNG.integers(-shape[axis], shape[axis], size)
    constant, symbolic = data.draw(st.booleans()), data.draw(st.booleans())
    check_vjp(
        "Gather",
        [normal(*shape), indices],
        against=lambda x, i: (
            x.index_select(axis, i.flatten() % shape[axis]).unflatten(axis, size or (1,))
            if size
            else x.select(axis, int(indices))
        ),
        constant=[1] if constant else [],
        symbolic=symbolic,
        axis=axis,
    )


def test_gather_with_int32_indices():
    check_vjp("Gather", [normal(3, 4), np.array([1, 1, -1], np.int32)], axis=1)


def test_the_gradient_of_the_class_token_is_padding():
    model = ("Gather", [normal(2, 5, 3), np.array(0)], [1])
    assert _operators(*model, axis=1) == ["Unsqueeze", "Pad"]


def test_the_gradient_of_a_slice_that_keeps_all_is_nothing():
    assert _operators("Slice", [normal(2, 5), ints(0), ints(MAX), ints(0)], [1, 2, 3]) == []


def _operators(op_type, arrays, constant, **attributes):
    arrays = [np.asarray(a) for a in arrays]
    model = _one_node_model(op_type, arrays, np.float32, [], constant, (0,), 1, 20, "", False, attributes)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "N"
    del model.graph.output[:]
    own = normalise(ir.from_proto(model))
    op = Emitter(own.graph, 20, "test")
    y = next(iter(own.graph)).outputs[0]
    seed = ir.Value(name="seed", shape=y.shape, type=y.type)
    gradient(op, y, seed, own.graph.inputs[0])
    return [node.op_type for node in op.nodes]


SLICES = [
    ([1], [4], None, None),
    ([1, 0], [4, 3], None, None),
    ([0], [MAX], [1], [1]),
    ([2], [MAX], [-1], None),
    ([-3], [-1], [1], None),
    ([-100], [100], [1], None),
    ([3], [2], [0], None),
    ([100], [200], [0], None),
    ([0], [MAX], [1], [2]),
    ([1], [MAX], [1], [2]),
    ([1], [-1], [0], [3]),
    ([-1], [MIN], [0], [-1]),
    ([MAX], [MIN], [1], [-2]),
    ([4], [0], [1], [-1]),
    ([4, -1], [0, 0], [0, 1], [-3, -2]),
    ([0, 1], [5, 6], [1, 0], [2, 3]),
    ([5, 0], [1, 5], [0, -1], [-2, 1]),
]


def _slice_inputs(starts, ends, axes, steps):
    optional = [None if v is None else ints(*v) for v in (axes, steps)]
    inputs = [normal(6, 5), ints(*starts), ints(*ends), *optional]
    while inputs[-1] is None:
        inputs.pop()
    return inputs


@pytest.mark.parametrize("bounds", SLICES)
@pytest.mark.parametrize("constant", [(1, 2, 3, 4), (1, 3, 4), (2, 3, 4), (3, 4), (3,)])
@SYMBOLIC
def test_slice(bounds, constant, symbolic):
    inputs = _slice_inputs(*bounds)
    given = [i for i in constant if i < len(inputs) and inputs[i] is not None]
    if symbolic and bounds[2] is None and 1 not in constant:
        with pytest.raises(OnnxcamError, match="the number of axes of a Slice"):
            check_vjp("Slice", inputs, constant=given, symbolic=symbolic)
    else:
        check_vjp("Slice", inputs, constant=given, symbolic=symbolic)


def test_slice_with_int32_bounds():
    bounds = [np.array([v], np.int32) for v in (1, -1, 1, 2)]
    check_vjp("Slice", [normal(3, 6), *bounds], constant=[3, 4])
    check_vjp("Slice", [normal(3, 6), *bounds], constant=[1, 2, 3, 4])


def test_slice_refuses_axes_known_only_at_run_time():
    with pytest.raises(OnnxcamError, match="the axes of a Slice"):
        check_vjp("Slice", [normal(3, 6), ints(1), ints(2), ints(1)])


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.data())
def test_any_slice(data):
    shape = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    bound = st.one_of(st.integers(-7, 7), st.sampled_from([MAX, MIN]))
    axes = data.draw(st.lists(st.integers(0, len(shape) - 1), unique=True, min_size=1))
    starts, ends = ([data.draw(bound) for _ in axes] for _ in range(2))
    steps = [data.draw(st.sampled_from([1, 2, 3, -1, -2, -3])) for _ in axes]
    axes = [axis - len(shape) if data.draw(st.booleans()) else axis for axis in axes]
    inputs = [normal(*shape), ints(*starts), ints(*ends), ints(*axes), ints(*steps)]
    constant = [3] + [i for i in (1, 2, 4) if data.draw(st.booleans())]
    check_vjp("Slice", inputs, constant=constant, symbolic=data.draw(st.booleans()), ort=False)


@pytest.mark.parametrize("axis", [0, 1, -1])
@CONSTANT
@SYMBOLIC
def test_gather_elements(axis, constant, symbolic):
    check_vjp(
        "GatherElements",
        [normal(3, 4, 3), RNG.integers(-3, 3, (3, 4, 3))],
        constant=[1] if constant else [],
        symbolic=symbolic,
        axis=axis,
    )


@pytest.mark.parametrize(
    ("shape", "indices", "batch_dims"),
    [
        ((3, 3, 2), (4, 2), 0),
        ((3, 3, 2), (4, 1), 0),
        ((3, 3, 2), (2, 2, 3), 0),
        ((4, 3, 3), (4, 1), 1),
        ((4, 3, 3), (4, 5, 2), 1),
        ((2, 4, 3, 3), (2, 4, 1), 2),
        ((2, 4, 3, 3), (2, 4, 2, 2), 2),
    ],
)
@CONSTANT
@SYMBOLIC
def test_gather_nd(shape, indices, batch_dims, constant, symbolic):
    limit = 2
    places = RNG.integers(-limit, limit, indices)
    check_vjp(
        "GatherND",
        [normal(*shape), places],
        constant=[1] if constant else [],
        symbolic=symbolic,
        batch_dims=batch_dims,
    )


REDUCTIONS = [None, "none", "add", "mul", "max", "min"]


def _reduction(name):
    return {} if name is None else {"reduction": name}


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("axis", [0, 1, -1])
@SYMBOLIC
def test_scatter_elements(reduction, axis, symbolic):
    x = normal(4, 4)
    if reduction in (None, "none"):  # no two updates to one place
        indices = RNG.permuted(np.tile(np.arange(4) - 2, (4, 1)), axis=1)
    else:
        indices = RNG.integers(-4, 4, (4, 4))
    # onnx.reference 1.23 wants indices as wide as the data along a negative axis.
    indices = indices.T[:3] if axis == 0 else indices[:, :3] if axis == 1 else indices
    check_vjp(
        "ScatterElements",
        [x, indices, normal(*indices.shape)],
        symbolic=symbolic,
        axis=axis,
        **_reduction(reduction),
    )


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("x", "indices"), [((4, 5), (3, 1)), ((4, 5), (3, 2)), ((4, 5, 2), (2, 2, 2))])
@SYMBOLIC
def test_scatter_nd(reduction, x, indices, symbolic):
    if reduction in (None, "none"):
        flat = RNG.permutation(4)[: np.prod(indices[:-1])].reshape(*indices[:-1], 1)
        places = np.concatenate([flat, flat - 3], -1)[..., : indices[-1]] if indices[-1] > 1 else flat - 4
    else:
        places = RNG.integers(-2, 2, indices)
    updates = normal(*indices[:-1], *x[indices[-1] :])
    check_vjp("ScatterND", [normal(*x), places, updates], symbolic=symbolic, **_reduction(reduction))


@pytest.mark.parametrize("op_type", ["ScatterElements", "ScatterND"])
def test_scatter_of_a_product_with_zeros(op_type):
    x, updates = np.array([2.0, 0.0, 3.0, 4.0]), np.array([0.0, 5.0, 0.0, 7.0, 0.0, 0.0, 2.0])
    indices = ints(0, 0, 1, 1, 2, 2, 3)
    indices = indices if op_type == "ScatterElements" else indices[:, None]
    check_vjp(op_type, [x, indices, updates], reduction="mul")


@pytest.mark.parametrize("reduction", ["max", "min"])
def test_scatter_elements_that_tie_share_the_gradient(reduction):
    x = np.array([1.0, 1.0, 5.0, -5.0])
    updates = np.array([1.0, 1.0, 1.0, 3.0, 3.0, 2.0])
    check_vjp(
        "ScatterElements",
        [x, ints(0, 0, 1, 2, 2, 3), updates],
        against=lambda x, i, u: x.scatter_reduce(0, i, u, "a" + reduction),
        reduction=reduction,
    )


@pytest.mark.parametrize("mode", [None, "linear", "circular"])
@pytest.mark.parametrize("axis", [None, 1, -1])
@pytest.mark.parametrize("begin", [None, (1, 0), (0, 2)])
@SYMBOLIC
def test_tensor_scatter(mode, axis, begin, symbolic):
    if mode == "circular" and begin is not None:
        begin = (begin[0] + 2, begin[1] + 3)
    at = 1 if axis == 1 else 2 if axis is None else 3
    cache, update = [2, 3, 4, 3], [2, 3, 4, 3]
    cache[at], update[at] = 5, 3
    inputs = [normal(*cache), normal(*update)] + ([] if begin is None else [ints(*begin)])
    options = {key: value for key, value in (("mode", mode), ("axis", axis)) if value is not None}
    check_vjp("TensorScatter", inputs, opset=24, symbolic=symbolic, **options)


@pytest.mark.parametrize("axis", [None, 0, 1, -1])
@pytest.mark.parametrize("condition", [(True, False, True), (False, True), (False, False, False)])
@CONSTANT
@SYMBOLIC
def test_compress(axis, condition, constant, symbolic):
    given = {} if axis is None else {"axis": axis}
    check_vjp(
        "Compress",
        [normal(3, 4), np.array(condition)],
        constant=[1] if constant else [],
        symbolic=symbolic,
        **given,
    )


@pytest.mark.parametrize("axis", [None, 0, 1, -2])
@pytest.mark.parametrize("largest", [None, 0, 1])
@pytest.mark.parametrize("is_sorted", [0, 1])
@SYMBOLIC
def test_top_k(axis, largest, is_sorted, symbolic):
    options = {key: value for key, value in (("axis", axis), ("largest", largest)) if value is not None}
    inputs = [normal(4, 5), ints(2)]
    # Values that are not sorted may come in any order.
    check_vjp("TopK", inputs, count=2, symbolic=symbolic, ort=bool(is_sorted), sorted=is_sorted, **options)


@pytest.mark.parametrize("axis", [None, 0, 1, -2])
@SYMBOLIC
def test_one_hot(axis, symbolic):
    options = {} if axis is None else {"axis": axis}
    indices = RNG.integers(-4, 5, (2, 3))
    check_vjp("OneHot", [indices, np.array(4), normal(2)], symbolic=symbolic, **options)


@pytest.mark.parametrize("dtype", ["FLOAT16", "BFLOAT16", "DOUBLE"])
@pytest.mark.parametrize(
    ("op_type", "rest", "attributes"),
    [
        ("Gather", [ints(0, 1)], {}),
        ("Gather", [np.array(1)], {}),
        ("Slice", [ints(0), ints(3), ints(0), ints(2)], {}),
        ("GatherElements", [np.zeros((4, 2), np.int64)], {}),
        ("GatherND", [np.zeros((4, 1), np.int64)], {"batch_dims": 1}),
        ("ScatterElements", [np.zeros((4, 2), np.int64), normal(4, 2)], {"reduction": "mul"}),
        ("ScatterND", [np.zeros((4, 1), np.int64), normal(4, 2)], {"reduction": "max"}),
        ("TensorScatter", [normal(4, 2)], {"axis": 1}),
        ("Compress", [np.array([True, False])], {"axis": 0}),
        ("TopK", [ints(2)], {}),
        ("Pad", [ints(1, 1, 1, 1)], {"mode": "edge"}),
        ("Tile", [ints(2, 2)], {}),
    ],
)
def test_dtype(op_type, rest, attributes, dtype):
    if (op_type, dtype) == ("Compress", "BFLOAT16"):
        pytest.skip("ONNX has no Compress of this dtype before opset 28")
    narrow = ir.DataType[dtype].numpy()
    count = 2 if op_type == "TopK" else 1
    constant = [3] if op_type == "Slice" else []
    for symbolic in (False, True):
        arrays = [normal(4, 2), *rest]
        model = _one_node_model(
            op_type, arrays, narrow, [0], constant, (0,), count, 24, "", symbolic, attributes, [1]
        )
        assert model.graph.output[0].type.tensor_type.elem_type == ir.DataType[dtype]
